"""The fused operations in the place of a model's own norms, gated activations and rotary positions, on the CPU.

Nothing here knows a model by name: a part is replaced if it has the structure and if, on random input, the fused
operation gives its outputs and its gradients. Linear layers stay modules, so adapters keep working inside.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastppo import ops, reference_fused
from fastppo.models import lora
from fastppo.ops.fused import is_native

# Of the largest number: sums in another order; in 16 bits also roundings that the fused operation leaves out.
_TOLERANCE = {torch.float64: 5e-6, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True, eq=False)
class Fusion:
    """One part of a model that a fused operation computes inside `fused`."""

    name: str  # of the module in the model; of the function with its Python module
    kind: str
    deviation: float  # of outputs and gradients on random input, relative to the largest number
    owner: Any  # `replacement` becomes an attribute of this module, in the place of `original`
    attribute: str
    original: Any
    replacement: Callable[..., Any]


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Compute with fused operations inside, where C++ serves the model; a nested use changes nothing."""
    parameter = next(model.parameters(), None)
    is_served = parameter is not None and is_native(parameter)
    attached: list[Fusion] = []
    try:
        for fusion in find(model) if is_served else ():
            # Anything else there is another's, such as accelerate's hooks: that part stays as it is.
            if vars(fusion.owner).get(fusion.attribute) is fusion.original:
                vars(fusion.owner)[fusion.attribute] = fusion.replacement
                attached.append(fusion)
        yield
    finally:
        for fusion in attached:
            if fusion.original is None:
                del vars(fusion.owner)[fusion.attribute]
            else:
                vars(fusion.owner)[fusion.attribute] = fusion.original


# What was found, and the parts in which it was looked for, without the model itself, which has to remain mortal.
_FOUND: WeakKeyDictionary[nn.Module, tuple[list[Any], tuple[Fusion, ...]]] = WeakKeyDictionary()


def find(model: nn.Module) -> tuple[Fusion, ...]:
    """Return what can be fused in a model, with what it deviates; found once, until a part of it is replaced."""
    parts = [module for module in model.modules() if module is not model]
    if model not in _FOUND or _FOUND[model][0] != parts:
        # Gradients are compared wherever the call comes from.
        with torch.inference_mode(False), torch.enable_grad():
            _FOUND[model] = parts, tuple(_search(model))
    return _FOUND[model][1]


def _search(model: nn.Module) -> Iterator[Fusion]:
    seen = set()
    for name, module in model.named_modules():
        yield from _norm(name, module)
        yield from _gated(name, module)
        yield from _lora(name, module)
        namespace = sys.modules[type(module).__module__]
        if hasattr(namespace, _ROTARY) and namespace not in seen:
            seen.add(namespace)
            yield from _rotary(namespace)


def _norm(name: str, module: Any) -> Iterator[Fusion]:
    """Yield the fusion of x̂·w or x̂·(1 + w), for a module with nothing but a weight and an epsilon."""
    eps = next((vars(module)[key] for key in ("variance_epsilon", "eps", "epsilon") if key in vars(module)), None)
    tensors = [*module.named_parameters(), *module.named_buffers(), *module.named_children()]
    if not isinstance(eps, float) or [key for key, _ in tensors] != ["weight"] or module.weight.dim() != 1:
        return
    inputs = _random(2, 3, len(module.weight)), _random(len(module.weight), seed=1)
    for offset in (0.0, 1.0):
        ours = partial(ops.rms_norm, eps=eps, offset=offset)
        deviation = _deviation(lambda x, weight: functional_call(module, {"weight": weight}, (x,)), ours, inputs)
        if deviation <= _TOLERANCE[torch.float32]:
            replacement = partial(_run_norm, module, eps, offset)
            yield Fusion(name, f"rms_norm, offset {offset:g}", deviation, module, "forward", None, replacement)


def _run_norm(module: nn.Module, eps: float, offset: float, x: Tensor, *rest: Any, **named: Any) -> Any:
    weight: Any = module.weight
    if rest or named or not is_native(x, weight):
        return type(module).forward(module, x, *rest, **named)
    return ops.rms_norm(x, weight, eps, offset)


def _gated(name: str, module: nn.Module) -> Iterator[Fusion]:
    """Yield the fusion of down(act(gate(x))·up(x)), gate and up apart or in one projection."""
    children = dict(module.named_children())
    act = next((key for key in ("act_fn", "activation_fn") if callable(getattr(module, key, None))), None)
    projections = [key for key in children if key != act]
    if act is None or set(projections) not in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}):
        return
    activation = _known_activation(getattr(module, act))
    size = getattr(children[projections[0]], "in_features", None)
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)
    if activation is None or not isinstance(size, int) or dtype not in _TOLERANCE:
        return
    replacement = partial(_run_gated, module, activation)
    deviation = _deviation(module, replacement, [_random(2, 3, size).to(dtype)]) if _has_numbers(module) else 0.0
    if deviation <= _TOLERANCE[dtype]:
        yield Fusion(name, f"gated {activation}", deviation, module, "forward", None, replacement)


def _lora(name: str, module: Any) -> Iterator[Fusion]:
    """Yield the fusion of scale·B(A x) with the sum that it joins."""
    replacement = lora.find_layer(module)
    if replacement is None:
        return
    dtype = module.base_layer.weight.dtype
    dtype = dtype if dtype in _TOLERANCE else torch.float32  # quantised weights take any
    x = _random(2, 3, module.in_features).to(dtype)
    deviation = _deviation(module, replacement, [x]) if _has_numbers(module) else 0.0
    if deviation <= _TOLERANCE[dtype]:
        yield Fusion(name, "lora", deviation, module, "forward", None, replacement)


def _has_numbers(module: nn.Module) -> bool:
    """Whether there is anything to compare: a model on the meta device is taken to be like its twin."""
    return not any(parameter.is_meta for parameter in module.parameters())


def _known_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    x = torch.linspace(-10, 10, 201, dtype=torch.float64)
    for name, known in reference_fused.ACTIVATIONS.items():
        if torch.allclose(function(x), known(x), rtol=0, atol=1e-7):
            return name
    return None


def _run_gated(module: Any, activation: str, x: Tensor, *rest: Any, **named: Any) -> Any:
    if rest or named:
        return type(module).forward(module, x, *rest, **named)
    if hasattr(module, "gate_up_proj"):
        return module.down_proj(ops.gated_activation(module.gate_up_proj(x), None, activation))
    return module.down_proj(ops.gated_activation(module.gate_proj(x), module.up_proj(x), activation))


def _rotary(namespace: Any) -> Iterator[Fusion]:
    """Yield the fusion of a Python module's `apply_rotary_pos_emb(q, k, cos, sin)`, of whole heads or also of parts."""
    own = getattr(namespace, _ROTARY)
    if isinstance(own, partial) and own.func is _run_rotary:  # another model of the kind is inside `fused`
        own = own.args[0]
    q, k, cos, sin = _random(2, 3, 5, 8), _random(2, 2, 5, 8), _random(2, 5, 8), _random(2, 5, 8, seed=1)
    whole, part = (
        _deviation(lambda q, k, a=angles: own(q, k, *a), lambda q, k, a=angles: _run_rotary_pair(q, k, *a), (q, k))
        for angles in ((cos, sin), (cos[..., :4], sin[..., :4]))
    )
    is_partial = part <= _TOLERANCE[torch.float32]
    if whole <= _TOLERANCE[torch.float32]:
        replacement = partial(_run_rotary, own, is_partial)
        kind, deviation = ("rotary, partial", max(whole, part)) if is_partial else ("rotary", whole)
        yield Fusion(f"{namespace.__name__}.{_ROTARY}", kind, deviation, namespace, _ROTARY, own, replacement)


def _run_rotary_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)


def _run_rotary(
    own: Any, is_partial: bool, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any
) -> Any:
    is_usual = q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3 and cos.shape[1] == q.shape[2] == k.shape[2]
    is_whole = cos.shape[-1] == q.shape[-1] == k.shape[-1]
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu") and cos.dtype == sin.dtype == torch.float32:
        q, k = q.float(), k.float()  # which is what the model's own product with fp32 angles makes of them
    if rest or named or not is_usual or not (is_whole or is_partial) or not is_native(q, k, cos, sin):
        return own(q, k, cos, sin, *rest, **named)
    return _run_rotary_pair(q, k, cos, sin)


def _random(*shape: int, seed: int = 0) -> Tensor:
    """Return fp32 numbers that are the same each time, and leave the global generator alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _deviation(own: Callable[..., Any], ours: Callable[..., Any], inputs: Any) -> float:
    """Return by how much outputs and gradients differ, relative to the largest number; inf if `own` takes no such."""
    try:
        expected = _with_gradients(own, inputs)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # another function of that name
        return math.inf
    actual = _with_gradients(ours, inputs)
    if [(part.shape, part.dtype) for part in actual] != [(part.shape, part.dtype) for part in expected]:
        return math.inf
    pairs = zip(actual, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _with_gradients(function: Callable[..., Any], inputs: Any) -> list[Tensor]:
    inputs = [part.detach().requires_grad_() for part in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    total = torch.stack([(part * _random(*part.shape, seed=2).to(part)).sum() for part in outputs]).sum()
    return [part.detach() for part in (*outputs, *torch.autograd.grad(total, inputs))]

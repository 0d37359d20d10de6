"""By which formula a module, or what lies between two of them, made its output from its input."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.engine.linears import active
from fastppo.engine.structure import Norm, Rope
from fastppo.engine.tracing import NUM_TOKENS, Call, RotaryCall, UnsupportedModelError

# Of the largest number; the candidates differ by far more.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

# The numbers of csrc/decode_operations.hpp's Nonlinearity.
NONLINEARITIES = (
    nn.functional.silu,
    nn.functional.gelu,
    partial(nn.functional.gelu, approximate="tanh"),
    lambda x: x * torch.sigmoid(1.702 * x),
    nn.functional.relu,
    lambda x: nn.functional.relu(x).square(),
)


def norm_of_call(call: Call) -> Norm:
    """Find the formula by which a module makes its output from its input."""
    module = active(call.module)
    weight: Any = getattr(module, "weight", None)
    epsilons = [v for name, v in vars(module).items() if "eps" in name and isinstance(v, float)]
    known = isinstance(weight, Tensor) and weight.dim() in (1, 2) and len(epsilons) == 1
    if known and call.inputs.shape[-1] == weight.shape[-1] and call.inputs.shape == call.computed.shape:
        for is_centred, offset in ((False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)):
            x = call.inputs.double()
            x = x - x.mean(-1, keepdim=True) if is_centred else x
            x = x / (x.square().mean(-1, keepdim=True) + epsilons[0]).sqrt() * (weight.double() + offset)
            x = x if getattr(module, "bias", None) is None else x + module.bias.double()
            if is_close(call.computed, x):
                return Norm(call.module, is_centred, offset, epsilons[0])
    raise UnsupportedModelError(
        f"{type(module).__name__} is neither RMSNorm nor LayerNorm nor another part that is known"
    )


def nonlinearity(module: Any) -> int:
    """Return the number in NONLINEARITIES of what an activation module computes."""
    x = torch.linspace(-8, 8, 1601)
    expected = module(x)
    for index, function in enumerate(NONLINEARITIES):
        if torch.allclose(expected, function(x), rtol=1e-6, atol=1e-6):  # type: ignore[operator]
            return index
    raise UnsupportedModelError(f"the activation {type(module).__name__} is not known here")


# From cosines or sines as a module returns them to a table with a column for every column that is turned.
LAYOUTS: dict[str, Any] = {
    "halves": lambda angles: angles,
    "pairs": lambda angles: angles,
    "repeated halves": lambda angles: torch.cat((angles, angles), -1),
    "pairs of the first half": lambda angles: angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1),
    "repeated pairs": lambda angles: angles.repeat_interleave(2, -1),
}


def best_rope(rotaries: list[RotaryCall], before: Tensor, after: Tensor) -> Rope | None:
    """Return the rope that turned heads, the nearest where several are near; None if none is."""
    near: list[tuple[float, Rope]] = []
    for index, rotary in enumerate(rotaries):
        for layout, arrange in LAYOUTS.items():
            cosines, sines = (arrange(angles.reshape(NUM_TOKENS, -1).float()) for angles in rotary.angles)
            turned = _turn(before, cosines, sines, Rope(index, layout).is_interleaved)
            if is_close(after, turned):
                near.append((float((after - turned).abs().max()), Rope(index, layout)))
    return min(near, key=lambda entry: entry[0])[1] if near else None


def _turn(states: Tensor, cosines: Tensor, sines: Tensor, is_interleaved: bool) -> Tensor:
    """Turn the first columns of heads (T, heads, size) by angles (T, width)."""
    width = cosines.shape[-1]
    if width > states.shape[-1]:
        return torch.full_like(states, math.nan)
    x, rest = states.float().split((width, states.shape[-1] - width), -1)
    if is_interleaved:
        crossed = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        crossed = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1)
    return torch.cat((x * cosines[:, None] + crossed * sines[:, None], rest), -1)


def gather(passed: Tensor, columns: tuple[int, ...], size: int) -> Tensor:
    """Return heads (NUM_TOKENS, heads, size) from the columns of a projection."""
    rows = passed.reshape(NUM_TOKENS, -1)
    return torch.stack([rows[:, column : column + size] for column in columns], 1)


def by_token(states: Tensor, heads: int) -> Tensor:
    """Return (NUM_TOKENS, heads, size) of states that may have their heads before their tokens."""
    if states.dim() == 4 and states.shape[1] == heads and states.shape[2] == NUM_TOKENS:
        states = states.transpose(1, 2)
    return states.reshape(NUM_TOKENS, heads, -1)


def columns_of(states: Tensor, first: int, size: int) -> Tensor:
    """Return `size` columns from the first on."""
    return states[..., first : first + size]


def is_same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers in the same order."""
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1).to(a.dtype))


# Standard deviations of a least-squares factor within which a number of fewer digits may be meant.
_DEVIATIONS = 4.0


def is_close(a: Tensor, b: Tensor) -> bool:
    """Tell whether `a` holds the numbers of `b` within its dtype's rounding."""
    if a.numel() != b.numel():
        return False
    exact = b.reshape(-1).double()
    error = (a.reshape(-1).double() - exact).abs().max()
    return bool(error <= TOLERANCES.get(a.dtype, 1e-4) * exact.abs().max())


def ratio(a: Tensor, b: Tensor) -> float:
    """Return the number s for which a is s·b, of few digits if the rounding of a and b hides the rest; 0 for none."""
    if a.numel() != b.numel():
        return 0.0
    x, y = a.detach().reshape(-1).double(), b.detach().reshape(-1).double()
    scale = float(x @ y / (y @ y))
    left, tolerance = x - scale * y, TOLERANCES.get(b.dtype, 1e-4)
    if not bool(left.abs().max() <= tolerance * x.abs().max()):
        return 0.0
    # Of a sum in bf16 the scale is known to three digits or so: 0.9996 would be read for 1, and scale every layer.
    deviation = float((left @ left / (y @ y) / len(y)).sqrt())
    hidden = max(1e-2 * tolerance * abs(scale), _DEVIATIONS * deviation)
    rounded = (float(f"{scale:.{digits}g}") for digits in range(1, 7))
    return next((r for r in rounded if abs(r - scale) <= hidden), scale)

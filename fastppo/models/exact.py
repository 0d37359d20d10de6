"""Linear layers whose result for a row depends on that row alone, to the last bit: for `consistency="exact"`.

torch's matmuls sum in another order for another number of rows, so that a token decoded beside 31 others gets other
last digits than in the update. Inside `exact_linears` every linear layer runs on the kernel that decodes, which keeps
one order; its backward pass, which nobody compares, stays torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastppo import ops
from fastppo.models.network import causal_lm
from fastppo.ops.matmul import row_invariant, small_linear

NOT_EXACT = "its samples cannot be packed here (see fastppo inspect); use consistency='bounded'"


class _ExactLinear(torch.autograd.Function):
    """x Wᵀ + b by `small_linear`; weight (N, K)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        return small_linear(rows, weight, bias).to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (d_out,) = ctx.saved_tensors, upstream
        rows = d_out.reshape(-1, d_out.shape[-1])
        d_x = d_out @ weight if ctx.needs_input_grad[0] else None
        d_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _linear(module: Any, x: Tensor) -> Tensor:
    result: Tensor = _ExactLinear.apply(x, module.weight, module.bias)
    return result


def _conv1d(module: Any, x: Tensor) -> Tensor:
    result: Tensor = _ExactLinear.apply(x, module.weight.t(), module.bias)
    return result


@contextmanager
def exact_linears(model: nn.Module) -> Iterator[None]:
    """Compute linear layers and the head row by row inside; a nested use changes nothing.

    Raises NotImplementedError where that cannot be: without the C++ extension, on a GPU, with 4-bit weights of fp16,
    with experts.
    """
    _check(model)  # before anything is replaced
    replaced = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in (nn.Linear, Conv1D) and "v_head" not in name and "forward" not in vars(module):
            replaced.append(module)
            module.forward = partial(_linear if kind is nn.Linear else _conv1d, module)
    try:
        with row_invariant():
            yield
    finally:
        for module in replaced:
            del module.forward


def _check(model: nn.Module) -> None:
    device, dtype = next(model.parameters()).device, causal_lm(model).get_input_embeddings().weight.dtype
    if ops.backend(device) != "native":
        raise NotImplementedError(
            f"consistency='exact' needs the C++ extension and a model in host memory, got one on {device} with backend "
            f"{ops.backend(device)!r}; use consistency='bounded'"
        )
    for name, module in model.named_modules():
        if hasattr(module, "four_bits"):
            if module.four_bits().type_for(dtype) is None:
                raise NotImplementedError(
                    f"consistency='exact' does not know 4-bit weights of {module.four_bits().dtype} beside {dtype} "
                    f"({name}); use 'bounded'"
                )
        elif _multiplies_itself(module):
            raise NotImplementedError(
                f"consistency='exact' knows linear layers, but {name} ({type(module).__name__}) multiplies by weights "
                "of its own, as experts do; use 'bounded'"
            )


def _multiplies_itself(module: nn.Module) -> bool:
    """Whether a module that is no linear layer has matrices: nobody is to know in which order it sums."""
    if type(module) in (nn.Linear, Conv1D) or isinstance(module, nn.Embedding):
        return False
    return any(weight.dim() > 1 and weight.is_floating_point() for weight in module.parameters(recurse=False))

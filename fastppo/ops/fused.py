"""RMSNorm, gated activation and rotary positions in one pass each, differentiable: C++ in host memory, else plain.

fp32 and bf16 tensors are served by the C++ kernels; other dtypes and devices by `fastppo.reference_fused`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo import reference_fused
from fastppo.ops.backends import backend, kind_of, native
from fastppo.ops.recipes import with_recipe

# Norms' weight gradients are summed over this many blocks of rows at most, one after another within a block.
_MAX_BLOCKS = 64
_MIN_BLOCK_ROWS = 16


def is_native(*tensors: Tensor) -> bool:
    """Whether the C++ kernels serve these tensors together: in host memory, all fp32 or all bf16."""
    dtype = tensors[0].dtype
    is_served = dtype in (torch.float32, torch.bfloat16) and all(
        tensor.dtype == dtype and kind_of(tensor.device) == "cpu" for tensor in tensors
    )
    return is_served and backend(tensors[0].device) == "native"


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return x / √(mean(x²) + eps) · (offset + weight) for x (..., H) and weight (H,). Raises ValueError."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}: the last axis of x")
    if not is_native(x, weight):
        return reference_fused.rms_norm(x, weight, eps, offset)
    x, weight = x.contiguous(), weight.contiguous()
    read = x.detach(), weight.detach()
    y: Tensor = _RMSNorm.apply(x, weight, eps, offset)
    return with_recipe(y, lambda: _normed(*read, eps, offset)[0])


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Return act(gate)·up (..., I), where `up` None stands for the second half of gate (..., 2 I).

    activation is silu, gelu or gelu_tanh. Raises ValueError.
    """
    if activation not in reference_fused.ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(reference_fused.ACTIVATIONS)}")
    if (up is None and gate.shape[-1] % 2) or (up is not None and up.shape != gate.shape):
        other = "" if up is None else f" and up {tuple(up.shape)}"
        raise ValueError(f"gate has shape {tuple(gate.shape)}{other}, expected two equal ones or two halves in one")
    if not is_native(gate, *([] if up is None else [up])):
        return reference_fused.gated_activation(gate, up, activation)
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    read = gate.detach(), None if up is None else up.detach()
    number = list(reference_fused.ACTIVATIONS).index(activation)
    y: Tensor = _Gated.apply(gate, up, number)
    return with_recipe(y, lambda: _gated(*read, number))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the heads x (B, heads, L, D) turned by their token's angles: cos and sin (B or 1, L, R), R even.

    The first R numbers of a head are turned, as two halves, and the rest copied. Differentiable in x, and where the
    angles need a gradient in them too. Raises ValueError.
    """
    batch, _, length, size = x.shape
    rotary = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[:-1] not in ((batch, length), (1, length)) or rotary % 2 or rotary > size:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}, expected ({batch} or 1, {length}, R) with "
            f"an even R of at most {size} for x {tuple(x.shape)}"
        )
    if cos.requires_grad or sin.requires_grad or not is_native(x, cos, sin):
        return reference_fused.rotary(x, cos, sin)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, inverse_rms = _normed(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.scalars = eps, offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, inverse_rms = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        block_rows = max(_MIN_BLOCK_ROWS, -(-inverse_rms.numel() // _MAX_BLOCKS))
        blocks = -(-inverse_rms.numel() // block_rows)
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        partial = x.new_empty(blocks if dweight is not None else 0, len(weight), dtype=torch.float32)
        addresses = x.data_ptr(), weight.data_ptr(), inverse_rms.data_ptr()
        gradients = dy.data_ptr(), dx.data_ptr(), 0 if dweight is None else dweight.data_ptr()
        native().norm_gradient(_shape(x), addresses, ctx.scalars, gradients, (partial.data_ptr(), block_rows))
        return dx, dweight, None, None


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return the normed x, and 1 / √(mean(x²) + eps) (...) in fp32."""
    y, inverse_rms = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    addresses = x.data_ptr(), weight.data_ptr(), inverse_rms.data_ptr()
    native().norm(_shape(x), addresses, (eps, offset), y.data_ptr())
    return y, inverse_rms


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dy, dgate = dy.contiguous(), torch.empty_like(gate)
        dup = None if up is None else torch.empty_like(up)
        gradients = (dy.data_ptr(), dy.shape[-1]), *_halves(dgate, dup)
        native().gated_gradient(_shape(dy), _halves(gate, up), ctx.activation, gradients)
        return dgate, dup, None


def _gated(gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
    size = gate.shape[-1] // (2 if up is None else 1)
    y = gate.new_empty(*gate.shape[:-1], size)
    native().gated(_shape(y), _halves(gate, up), activation, (y.data_ptr(), size))
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, is_transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _turned(dy, *ctx.saved_tensors, is_transposed=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, is_transposed: bool) -> Tensor:
    """Rotate, and lay the result out token by token, as matmuls write it and attention reads it."""
    x, cos, sin = (part if part.stride(-1) == 1 else part.contiguous() for part in (x, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, length, size = x.shape
    out = x.new_empty(batch, length, heads, size).transpose(1, 2)
    angles = cos.data_ptr(), sin.data_ptr(), 0 if len(cos) == 1 else cos.stride(0), cos.stride(1)
    native().rotate(
        (*x.shape, cos.shape[-1]),
        (x.data_ptr(), x.stride()[:3]),
        (out.data_ptr(), out.stride()[:3]),
        angles,
        (x.dtype == torch.bfloat16, is_transposed, torch.get_num_threads()),
    )
    return out


def _shape(x: Tensor) -> tuple[int, int, bool, int]:
    """Describe contiguous rows to the C++ kernels: how many, their size, whether bf16, and the threads."""
    size = x.shape[-1]
    return (x.numel() // size if size else 0), size, x.dtype == torch.bfloat16, torch.get_num_threads()


def _halves(gate: Tensor, up: Tensor | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return address and elements from row to row of gate and up, which may lie side by side in gate."""
    size = gate.shape[-1]
    if up is None:
        return (gate.data_ptr(), size), (gate.data_ptr() + size // 2 * gate.element_size(), size)
    return (gate.data_ptr(), size), (up.data_ptr(), size)

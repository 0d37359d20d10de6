"""Linear layers over quantised weights that are not trained: one effective weight for every number of rows.

Whatever the codes stand for, a weight is the same number in the rollout, in the update and in the backward pass: codes
are exact in fp32 and in bf16, and a row's scale multiplies its finished sum. No outlier columns, no rounding of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastppo.ops.backends import backend, kind_of, on_device
from fastppo.ops.matmul import FLOAT_TYPES, is_row_invariant, multiply

# Codes are turned into floats so many bytes at a time: on a CPU a part that its cache holds, on a GPU one large
# enough to keep the matmul busy.
_SCRATCH = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
# Up to so many rows codes are multiplied as they are. Measured on two cores of an AMD EPYC 9004 at 768x2048 and
# 4096x4096: our own matmul takes 0.9 to 1.1 times what one with widened weights does at 96 rows in bf16, 1.05 from 256
# on, and in fp32 0.8 at 512. The Triton kernel's limit is its tile's; what it takes was not measured yet.
FEW_ROWS = {torch.bfloat16: 96, torch.float32: 1024}
_FEW_ROWS_CUDA = 64


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., K) times the transpose of W (N, K) = codes · scales, plus bias (N,), as (..., N) in x's dtype.

    `codes` (N, K) are int8 and `scales` (N,) fp32, one a row; neither gets a gradient. Sums of products with codes are
    exact to x's dtype; a scale multiplies afterwards. Differentiable in x and bias, and keeps no activation for it.
    Inside `row_invariant` on the native backend a row's result depends on that row alone. Raises ValueError.
    """
    _check(x, codes, scales, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        product: Tensor = _Int8Linear.apply(x, codes, scales)
    else:  # a decode step is a hundred of these, which are over sooner than autograd has looked at them
        product = _forward(x.reshape(-1, x.shape[-1]), codes, scales).view(*x.shape[:-1], len(codes))
    return product if bias is None else product + bias.to(product.dtype)


class _Int8Linear(torch.autograd.Function):
    """x (..., K) · Wᵀ; W (N, K) is never a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.codes, ctx.scales = codes, scales  # frozen, and held by the layer anyway
        rows = x.reshape(-1, x.shape[-1])
        return _forward(rows, codes, scales).view(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None]:
        (d_out,) = upstream
        if not ctx.needs_input_grad[0]:
            return None, None, None
        rows = d_out.reshape(-1, d_out.shape[-1])
        return _backward(rows, ctx.codes, ctx.scales).view(*d_out.shape[:-1], ctx.codes.shape[1]), None, None


def _forward(rows: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    kind = backend(rows.device)
    if kind == "native" and rows.dtype in FLOAT_TYPES and (len(rows) <= FEW_ROWS[rows.dtype] or is_row_invariant()):
        return multiply(rows, codes, None, scales, rows.new_empty(len(rows), len(codes), dtype=torch.float32)).to(rows)
    if kind == "triton" and rows.dtype == torch.bfloat16 and len(rows) <= _FEW_ROWS_CUDA:
        from fastppo.kernels.int8_linear import int8_linear as few_rows

        with on_device(rows):
            return few_rows(rows, codes, scales)  # type: ignore[no-any-return]
    out = rows.new_empty(len(rows), len(codes))
    for part in _parts(codes.shape[0], codes.shape[1], rows):
        product = out[:, part]
        torch.mm(rows, codes[part].to(rows.dtype).t(), out=product)
        product *= scales[part]
    return out


def _backward(rows: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    # A part of the columns, not of the rows, whose sums would be cut up.
    rows, out = (rows * scales).to(rows.dtype), rows.new_empty(len(rows), codes.shape[1])
    for part in _parts(codes.shape[1], codes.shape[0], rows):
        torch.mm(rows, codes[:, part].to(rows.dtype), out=out[:, part])
    return out


def _parts(count: int, size: int, rows: Tensor) -> Iterator[slice]:
    """Yield slices of `count` vectors of codes, each of which becomes `size` floats of rows' dtype."""
    step = max(64, _SCRATCH.get(kind_of(rows.device), _SCRATCH["cuda"]) // (size * rows.element_size()))
    for start in range(0, count, step):
        yield slice(start, start + step)


def _check(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2 or x.shape[-1:] != codes.shape[1:]:
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)} and x is {tuple(x.shape)}, expected torch.int8 (N, K) and "
            "(..., K)"
        )
    if not x.is_floating_point() or x.dtype == torch.float16:
        raise ValueError(
            f"x is {x.dtype}, expected torch.bfloat16 or wider: sums of int8 codes leave the range of float16; load "
            "the model with dtype=torch.bfloat16"
        )
    for name, part in (("scales", scales), ("bias", bias)):
        if part is not None and part.shape != codes.shape[:1]:
            raise ValueError(f"{name} have shape {tuple(part.shape)}, expected {tuple(codes.shape[:1])}: one a row")

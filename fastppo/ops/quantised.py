"""Linear layers over quantised weights that are not trained: one effective weight for every number of rows.

Whatever the codes stand for, a weight is the same number in the rollout, in the update and in the backward pass: codes
are exact in fp32 and in bf16, and a row's scale multiplies its finished sum. No outlier columns; x is rounded only
where that is asked for by name, each row alone, and then in the rollout and in the update alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastppo.ops.backends import backend, kind_of, native, on_device
from fastppo.ops.matmul import FLOAT_TYPES, INT8_BFLOAT16, MIN_PARALLEL, WEIGHT_TYPES, is_row_invariant

# Codes are turned into floats so many bytes at a time: on a CPU a part that its cache holds, on a GPU one large
# enough to keep the matmul busy.
_SCRATCH = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
# Up to so many rows codes are multiplied as they are. Measured on two cores of an AMD EPYC 9004 at 768x2048 and
# 4096x4096: our own matmul takes 0.9 to 1.1 times what one with widened weights does at 96 rows in bf16, 1.05 from 256
# on, and in fp32 0.8 at 512. The Triton kernel's limit is its tile's; what it takes was not measured yet.
FEW_ROWS = {torch.bfloat16: 96, torch.float32: 1024}
_FEW_ROWS_CUDA = 64
# Codes for activations of a dtype, as the C++ kernels number them.
_CODE_TYPES = {torch.float32: WEIGHT_TYPES[torch.int8], torch.bfloat16: INT8_BFLOAT16}
# What a layer on int8 weights may compute: products with x as it is, or with each row of x rounded to int8.
MEANINGS = ("weight_only", "row_wise")


def int8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *, meaning: str = "weight_only"
) -> Tensor:
    """Return x (..., K) times the transpose of W (N, K) = codes · scales, plus bias (N,), as (..., N) in x's dtype.

    `codes` (N, K) are int8 and `scales` (N,) fp32, one a row; neither gets a gradient. Sums of products with codes are
    exact to x's dtype; a scale multiplies afterwards. Differentiable in x and bias, and keeps no activation for it.
    Inside `row_invariant` on the native backend a row's result depends on that row alone.

    With the meaning "row_wise" each row of x is rounded to 255 steps, the largest number of the row being the last, and
    sums are exact, so that a row's result always depends on that row alone; gradients are as if it were not rounded.

    Raises ValueError.
    """
    _check(x, codes, scales, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        product: Tensor = _Int8Linear.apply(x, codes, scales, meaning)
    else:  # a decode step is a hundred of these, which are over sooner than autograd has looked at them
        product = _forward(x, codes, scales, meaning)
    return product if bias is None else product + bias.to(product.dtype)


class _Int8Linear(torch.autograd.Function):
    """x (..., K) · Wᵀ; W (N, K) is never a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, meaning: str) -> Tensor:
        ctx.codes, ctx.scales = codes, scales  # frozen, and held by the layer anyway
        return _forward(x, codes, scales, meaning)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (d_out,) = upstream
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        rows = d_out.reshape(-1, d_out.shape[-1])
        return _backward(rows, ctx.codes, ctx.scales).view(*d_out.shape[:-1], ctx.codes.shape[1]), None, None, None


def _forward(x: Tensor, codes: Tensor, scales: Tensor, meaning: str) -> Tensor:
    if meaning == "weight_only" and x.dtype in FLOAT_TYPES and backend(x.device) == "native":
        outputs, inputs = codes.shape
        count = x.numel() // inputs if inputs else math.prod(x.shape[:-1])
        if count <= FEW_ROWS[x.dtype] or is_row_invariant():
            return _few_rows(x, codes, scales, (count, inputs, outputs))
    rows = x.reshape(-1, x.shape[-1])
    product = _row_wise(rows, codes, scales) if meaning == "row_wise" else _many_rows(rows, codes, scales)
    return product.view(*x.shape[:-1], len(codes))


def _few_rows(x: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Do it on the native backend, without a tensor or a look at one that could be spared."""
    _, inputs, outputs = shape
    out = torch.empty((*x.shape[:-1], outputs), dtype=torch.float32, device=x.device)
    wide, codes, scales = x.float().contiguous(), codes.contiguous(), scales.contiguous()
    native().small_matmul(
        shape,
        (wide.data_ptr(), inputs),
        (codes.data_ptr(), inputs, _CODE_TYPES[x.dtype], False, scales.data_ptr()),
        (0, False),
        1.0,
        False,
        (out.data_ptr(), outputs),
        is_row_invariant(),
        torch.get_num_threads() if shape[0] * inputs * outputs >= MIN_PARALLEL else 1,
    )
    return out.to(x.dtype)


def _many_rows(rows: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    kind = backend(rows.device)
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


def _row_wise(rows: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    wide = rows.float()
    # A row of zeros has steps of some size, and its products are zeros.
    steps = (wide.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (wide / steps).round_().to(torch.int8)
    return (_int32_products(rounded, codes).float() * (steps * scales)).to(rows.dtype)


def _int32_products(rows: Tensor, codes: Tensor) -> Tensor:
    count = len(rows)
    if rows.is_cuda:  # cuBLAS multiplies no fewer rows than 17, and eights of them
        rows = torch.nn.functional.pad(rows, (0, 0, 0, max(32, -(-count // 8) * 8) - count))
    return torch._int_mm(rows, codes.t())[:count]


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

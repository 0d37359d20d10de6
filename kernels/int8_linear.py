"""A linear layer over int8 weights for the few rows of a decode step, which reading the weights bounds.

The weight is the left operand of the product, so that its codes become halves in registers: as the right one they
would go back to shared memory first. A code is exact in half precision, and a row's scale multiplies its finished sum.
Long rows are cut into parts, as many as the layer's size asks for and never the number of rows of x, that are summed
in their order: a row's result does not depend on the others.
Source of the layout: Dettmers et al. 2022, arXiv:2208.07339, whose treatment of outlying columns is left out.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_K = 64, 128
MIN_ROWS, MAX_ROWS = 16, 64  # tensor cores want 16; more than 64 are for a matmul with the weights in half precision
# Programs that keep a large GPU reading, and the shortest part of a row that is worth one.
PROGRAMS, MIN_PART = 264, 512
LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True}


@triton.jit
def _part_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    part_inputs,
    stride_x,
    stride_codes,
    ACC: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    output, part = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    is_output, is_row = output < num_outputs, row < num_rows
    codes_row = codes_ptr + output.to(tl.int64)[:, None] * stride_codes
    x_row = x_ptr + row.to(tl.int64)[None, :] * stride_x
    end = tl.minimum((part + 1) * part_inputs, num_inputs)
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for start in range(part * part_inputs, end, BLOCK_K):
        k = start + column
        codes = tl.load(codes_row + k[None, :], mask=is_output[:, None] & (k < end)[None, :], other=0)
        x = tl.load(x_row + k[:, None], mask=is_row[None, :] & (k < end)[:, None], other=0.0)
        acc += tl.dot(codes.to(x.dtype), x, input_precision="ieee", out_dtype=ACC)
    if IS_WHOLE:
        acc *= tl.load(scales_ptr + output, mask=is_output, other=0.0).to(ACC)[:, None]
    at = (part.to(tl.int64) * num_rows + row)[None, :] * num_outputs + output[:, None]
    tl.store(out_ptr + at, acc, mask=is_output[:, None] & is_row[None, :])


@triton.jit
def _sum_kernel(
    parts_ptr, scales_ptr, out_ptr, num_rows, num_outputs, num_parts, ACC: tl.constexpr, WIDTH: tl.constexpr
):
    row, output = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_output, total = output < num_outputs, tl.zeros((WIDTH,), ACC)
    for part in range(num_parts):
        total += tl.load(parts_ptr + (part * num_rows + row) * num_outputs + output, mask=is_output, other=0.0)
    total *= tl.load(scales_ptr + output, mask=is_output, other=0.0).to(ACC)
    tl.store(out_ptr + row * num_outputs + output, total, mask=is_output)


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return x (M, K) · (codes · scales)ᵀ as (M, N) in x's dtype, for at most 64 rows.

    `codes` (N, K) are int8, `scales` (N,) fp32. Sums are fp32, or fp64 for fp64. Raises ValueError.
    """
    _check(x, codes, scales)
    (num_rows, num_inputs), num_outputs = x.shape, len(codes)
    dtype, acc = (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)
    parts, part_inputs = parts_of(num_outputs, num_inputs)
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    sums = out if parts == 1 else torch.empty(parts, num_rows, num_outputs, dtype=dtype, device=x.device)
    if num_rows and num_outputs:
        _part_kernel[(triton.cdiv(num_outputs, BLOCK_N), parts)](
            x, codes, scales, sums, num_rows, num_outputs, num_inputs, part_inputs, x.stride(0), codes.stride(0),
            ACC=acc, IS_WHOLE=parts == 1,
            BLOCK_M=max(MIN_ROWS, triton.next_power_of_2(num_rows)), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, **LAUNCH,
        )  # fmt: skip
        if parts > 1:
            _sum_kernel[(num_rows, triton.cdiv(num_outputs, 1024))](
                sums, scales, out, num_rows, num_outputs, parts, ACC=acc, WIDTH=1024, num_warps=4, enable_fp_fusion=True
            )
    return out


def parts_of(num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Return into how many parts a row of the weight is cut, and the inputs of each."""
    wanted = PROGRAMS // triton.cdiv(num_outputs, BLOCK_N) if num_outputs else 1
    parts = max(1, min(wanted, num_inputs // MIN_PART))
    part_inputs = triton.cdiv(triton.cdiv(num_inputs, parts), BLOCK_K) * BLOCK_K
    return max(1, triton.cdiv(num_inputs, part_inputs) if num_inputs else 1), max(part_inputs, BLOCK_K)


def _check(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    is_dense = x.dim() == codes.dim() == 2 and x.stride(1) == 1 and codes.stride(1) == 1
    if not is_dense or x.shape[1] != codes.shape[1] or len(x) > MAX_ROWS or codes.dtype != torch.int8:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and codes are {codes.dtype} {tuple(codes.shape)}, expected at most "
            f"{MAX_ROWS} rows (M, K) and torch.int8 (N, K), dense within a row"
        )
    if scales.dtype != torch.float32 or scales.shape != codes.shape[:1] or not scales.is_contiguous():
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}, expected torch.float32 ({len(codes)},)")

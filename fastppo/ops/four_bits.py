"""Linear layers over weights in four bits as bitsandbytes stores them, read in place where there are few rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.backends import backend, kind_of, native
from fastppo.ops.matmul import MIN_PARALLEL, is_row_invariant

# As csrc/small_matmul.hpp numbers them, by the dtype that a weight is rounded to.
TYPES = {torch.float32: 4, torch.bfloat16: 5}
# Up to so many rows the codes are multiplied as they are. Measured on one core of an AMD EPYC 9004 that others used as
# well, at 768x2048 and 4096x4096: of what widening by bitsandbytes and torch's matmul take, in bf16 0.03 to 0.4 at one
# row, 0.5 to 0.9 at 128 and about 1 at 256, in fp32 0.02 to 0.2 at one row and 0.85 at 512.
FEW_ROWS = {torch.bfloat16: 128, torch.float32: 512}


class Nested(NamedTuple):
    """Absolute maxima that are themselves in 8 bits: table[code i] · absmax[i // block] + offset."""

    table: Tensor  # (256,) fp32
    absmax: Tensor  # fp32, of each block of codes
    block: int
    offset: Tensor  # () fp32


@dataclass(frozen=True, eq=False)
class FourBits:
    """A weight (N, K), K even: weight i of N·K is table[code i] · absmax of block i // block, rounded to `dtype`."""

    codes: Tensor  # uint8, two in a byte, the first in its upper half
    shape: tuple[int, int]
    table: Tensor  # (16,) fp32
    absmax: Tensor  # of each block: fp32, or codes in uint8
    block: int
    dtype: torch.dtype
    nested: Nested | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What the addresses in `described` belong to."""
        nested = [] if self.nested is None else [self.nested.table, self.nested.absmax, self.nested.offset]
        return [self.codes, self.table, self.absmax, *nested]

    @property
    def described(self) -> Any:
        """The C++'s description of what the codes stand for; valid for as long as the tensors live."""
        addresses = (0, 0, 1, 0.0)
        if self.nested is not None:
            table, absmax, block, offset = self.nested
            addresses = (table.data_ptr(), absmax.data_ptr(), block, 0.0 if offset.is_meta else float(offset))
        return native().FourBits(self.table.data_ptr(), self.absmax.data_ptr(), self.block, addresses)

    def type_for(self, dtype: torch.dtype) -> int | None:
        """Return the C++'s number for these weights where they meet activations of a dtype, None if it has none.

        A weight that meets bf16 is rounded to that, but not twice.
        """
        is_known = self.dtype in TYPES and (dtype == torch.bfloat16 or dtype == self.dtype) and self.shape[1] % 2 == 0
        return TYPES.get(dtype) if is_known else None


def four_bit_linear(x: Tensor, weight: FourBits, widen: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
    """Return x (..., K) times the transpose of the weight (N, K), plus bias (N,), as (..., N) in x's dtype.

    `widen` returns the whole weight in its dtype, for many rows, for other backends, and for the backward pass, to
    which nothing is kept. Differentiable in x and bias. Inside `row_invariant` on the native backend a row's result
    depends on that row alone.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        product: Tensor = _FourBitLinear.apply(x, weight, widen)
    else:
        product = _product(x, weight, widen)
    return product if bias is None else product + bias.to(product.dtype)


class _FourBitLinear(torch.autograd.Function):
    """x (..., K) · Wᵀ, whose W is widened again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FourBits, widen: Callable[[], Tensor]) -> Tensor:
        ctx.widen = widen
        return _product(x, weight, widen)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (d_out,) = upstream
        return d_out @ ctx.widen().to(d_out.dtype), None, None


def _product(x: Tensor, weight: FourBits, widen: Callable[[], Tensor]) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    is_known = kind_of(x.device) == "cpu" and backend(x.device) == "native" and weight.type_for(x.dtype) is not None
    if is_known and (len(rows) <= FEW_ROWS[x.dtype] or is_row_invariant()):
        return _few_rows(rows, weight).view(*x.shape[:-1], weight.shape[0])
    return x @ widen().to(x.dtype).t()


def _few_rows(rows: Tensor, weight: FourBits) -> Tensor:
    """Return rows (M, K) times the transpose of the weight, (M, N) in their dtype; sums are fp32."""
    x, outputs = rows.float().contiguous(), weight.shape[0]
    out = x.new_empty(len(x), outputs)
    native().small_matmul(
        (*x.shape, outputs),
        (x.data_ptr(), x.shape[1]),
        (weight.codes.data_ptr(), 0, weight.type_for(rows.dtype), False, 0),
        (0, False),
        1.0,
        False,
        (out.data_ptr(), outputs),
        is_row_invariant(),
        torch.get_num_threads() if x.numel() * outputs >= MIN_PARALLEL else 1,
        weight.described,
    )
    return out.to(rows.dtype)

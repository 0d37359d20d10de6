"""Sums of the head's gradients over chunks, in fp32 or wider whatever the weights are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastppo.ops import rows as row_ops
from fastppo.ops.backends import backend, native
from fastppo.ops.chunks import Chunk
from fastppo.ops.row_types import Scaling, Statistics, Upstream

# bf16 products are added this many rows of the weight at a time, which stay in the processor's cache in between.
_SLICE_ROWS = 4096
# From this share on, rows without a gradient are left out of the matmuls: moving others into their places costs less.
_UNUSED_SHARE = 0.1
# Rows that are moved at a time, through a copy.
_MOVED_ROWS = 32


class Gradients:
    """The gradients of hidden (T, H), weight (V, H) and bias (V,), those that are wanted, added chunk by chunk.

    That of the weight is added to `into` (V, H) if that is given.
    """

    def __init__(
        self,
        needs: tuple[bool, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        is_single: bool,
        into: Tensor | None = None,
    ):
        self.weight, self.into = weight, into
        self.d_hidden = torch.empty_like(hidden) if needs[0] else None
        self.d_weight = _sum_of(weight, is_single, into) if needs[1] else None
        self.d_bias: Tensor | None = None
        if bias is not None and needs[2]:
            self.d_bias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))

    @property
    def are_wanted(self) -> bool:
        """Whether anything at all needs a gradient."""
        return any(part is not None for part in (self.d_hidden, self.d_weight, self.d_bias))

    def add(self, du: Tensor, hidden: Tensor, rows: slice, is_used: Tensor | None = None) -> None:
        """Add what a chunk with dLoss/d(logits) du (C, V) and hidden (C, H) contributes.

        Where enough rows have no gradient, according to is_used (C,), the matmuls leave them out, and du is reordered.
        """
        d_hidden = None if self.d_hidden is None else self.d_hidden[rows]
        if is_used is not None and len(is_used) - int(is_used.sum()) >= _UNUSED_SHARE * len(is_used):
            order = _move_to_front(du, is_used)
            if d_hidden is not None:
                d_hidden.zero_()[order] = du[: len(order)] @ self.weight
            du, hidden, d_hidden = du[: len(order)], hidden[order], None
        if d_hidden is not None:
            torch.mm(du, self.weight, out=d_hidden)
        if self.d_weight is not None:
            self.d_weight.add(du, hidden)
        if self.d_bias is not None:
            self.d_bias += du.sum(0, dtype=self.d_bias.dtype)

    def add_chunk(
        self, chunk: Chunk, hidden: Tensor, labels: Tensor, stats: Statistics, upstream: Upstream, scaling: Scaling
    ) -> None:
        """Add what a chunk contributes, from dLoss by its statistics; hidden (T, H) and labels (T,) are all rows'."""
        rows, buffer, logits, ref = chunk
        out = buffer.gradient(len(logits))
        du = row_ops.gradient(logits, labels[rows], stats, upstream, scaling, out=out, ref=ref)
        self.add(du, hidden[rows], rows)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the dtypes of what they belong to; none of the weight if it was added elsewhere."""
        d_bias = None if self.d_bias is None else self.d_bias.to(self.weight.dtype)
        d_weight = None if self.d_weight is None else self.d_weight.finish()
        if d_weight is not None and self.into is not None:
            if d_weight is not self.into:
                self.into += d_weight
            d_weight = None
        return self.d_hidden, d_weight, d_bias


def _move_to_front(du: Tensor, is_used: Tensor) -> Tensor:
    """Fill the places of unused rows among the first ones with the last used ones; return which rows are first now."""
    order = torch.arange(len(is_used))
    count = int(is_used.sum())
    holes, late = (~is_used[:count]).nonzero()[:, 0], count + is_used[count:].nonzero()[:, 0]
    order[holes] = late
    for some_holes, some_late in zip(holes.split(_MOVED_ROWS), late.split(_MOVED_ROWS), strict=True):
        du[some_holes] = du[some_late]
    return order[:count]


def _sum_of(weight: Tensor, is_single: bool, into: Tensor | None) -> _PlainSum | _HalvesSum | _WideSum:
    if is_single or weight.dtype in (torch.float32, torch.float64):
        return _PlainSum(weight, into)
    if weight.dtype == torch.bfloat16 and backend(weight.device) == "native":
        return _HalvesSum(weight, into)
    return _WideSum(weight)


class _PlainSum:
    """A sum in the weight's own dtype, with what lies in `total` if that is given."""

    def __init__(self, weight: Tensor, total: Tensor | None):
        self.is_first = total is None
        self.total = torch.empty_like(weight, memory_format=torch.contiguous_format) if total is None else total

    def add(self, du: Tensor, hidden: Tensor) -> None:
        if self.is_first:
            torch.mm(du.t(), hidden, out=self.total)
        else:
            torch.addmm(self.total, du.t(), hidden, out=self.total)
        self.is_first = False

    def finish(self) -> Tensor:
        return self.total.zero_() if self.is_first else self.total


class _WideSum:
    """A sum in fp32 of 16-bit products."""

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.total = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)

    def add(self, du: Tensor, hidden: Tensor) -> None:
        if du.device.type == "cuda":
            torch.addmm(self.total, du.t(), hidden, out_dtype=torch.float32, out=self.total)
        else:
            self.total += du.t() @ hidden

    def finish(self) -> Tensor:
        return self.total.to(self.dtype)


class _HalvesSum:
    """A sum in fp32 of bf16 products, on the CPU: the upper halves lie where the bf16 gradient is to be.

    So the sum costs 2 bytes a weight beside the gradient itself, not 4. It begins with what lies in `total`, if that is
    given.
    """

    def __init__(self, weight: Tensor, total: Tensor | None):
        self.is_first = total is None
        self.high = torch.empty_like(weight, memory_format=torch.contiguous_format) if total is None else total
        self.low = torch.empty_like(self.high) if total is None else torch.zeros_like(self.high)
        self.product = self.high.new_empty(min(_SLICE_ROWS, len(weight)), weight.shape[1])

    def add(self, du: Tensor, hidden: Tensor) -> None:
        threads = torch.get_num_threads()
        for start in range(0, len(self.high), len(self.product)):
            high, low = self.high[start : start + len(self.product)], self.low[start : start + len(self.product)]
            product = self.product[: len(high)]
            torch.mm(du[:, start : start + len(high)].t(), hidden, out=product)
            places = (product.data_ptr(), self.is_first, high.data_ptr(), low.data_ptr())
            native().accumulate(high.numel(), *places, threads)
        self.is_first = False

    def finish(self) -> Tensor:
        if self.is_first:
            return self.high.zero_()
        native().round_halves(self.high.numel(), self.high.data_ptr(), self.low.data_ptr(), torch.get_num_threads())
        increment_version(self.high)  # written to behind torch's back
        return self.high

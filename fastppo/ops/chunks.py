"""The language-model head chunk by chunk: which rows, and their raw logits in a buffer that is used again and again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.backends import backend, kind_of, memory_of
from fastppo.ops.logit_memory import give_back, room
from fastppo.ops.matmul import FLOAT_TYPES, small_linear
from fastppo.ops.row_types import Reference, Scaling

# Rows of a chunk follow from vocabulary and device alone, so that a result does not depend on how many rows there are.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "small card": 256 * 2**20, "large card": 1024 * 2**20}
# The matmuls want hundreds of rows: with fewer, reading the weight costs more than the arithmetic.
_MIN_CHUNK_ROWS = 256
_ROW_MULTIPLE = 64
_SMALL_CARD_BYTES = 24 * 2**30


def chunk_rows(vocabulary: int, device: torch.device | None = None) -> int:
    """Return how many rows of the head are computed at a time for this vocabulary on this device (CPU by default)."""
    size = "cpu"
    if device is not None and kind_of(device) == "cuda":
        size = "small card" if is_small_card(device) else "large card"
    rows = _CHUNK_BYTES[size] // (4 * vocabulary)
    return max(_MIN_CHUNK_ROWS, rows // _ROW_MULTIPLE * _ROW_MULTIPLE)


def is_small_card(device: torch.device) -> bool:
    """Whether a CUDA device has at most 24 GiB of memory."""
    return memory_of(device) <= _SMALL_CARD_BYTES


def cut(num_rows: int, step: int, offsets: Tensor | None = None) -> list[slice]:
    """Cut rows into chunks of `step`; given offsets (B + 1,), into whole sequences of at most `step` rows together.

    A sequence that is longer than `step` is a chunk of its own.
    """
    if offsets is None:
        return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    chunks, start, end = [], 0, 0
    for bound in offsets.tolist()[1:]:
        if bound - start > step and end > start:
            chunks.append(slice(start, end))
            start = end
        end = bound
    return [*chunks, slice(start, end)] if end > start else chunks


class RefHead(NamedTuple):
    """The head of the model that the exact KL is measured from: hidden (T, H'), weight (V, H'), bias, scaling."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scaling: Scaling


class LogitBuffer:
    """Raw logits of up to `rows` rows, always in the same place, which is that of their gradient too if it can be.

    fp32 or wider on CUDA and by the native backend, where a row's logits depend on that row alone; else in the weight's
    dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.weight, self.bias = weight, bias
        # From 32,000 words on, in fp32 on two cores, 180 to 205 GFLOP/s, where torch's matmul reaches 90 to 155. And of
        # torch's matmuls only CUDA's can widen: bf16 logits cost 0.02 nats a token, as much as a step of PPO moves.
        self.is_native = backend(weight.device) == "native" and weight.dtype in FLOAT_TYPES
        is_half = weight.dtype in (torch.float16, torch.bfloat16)
        widens = self.is_native or (kind_of(weight.device) == "cuda" and is_half)
        self.dtype = torch.float32 if widens else weight.dtype
        self._allocate(rows)

    def make_room(self, rows: int) -> None:
        """Enlarge it to so many rows if it has fewer, which moves it."""
        if rows > len(self.buffer):
            self._allocate(rows)

    def _allocate(self, rows: int) -> None:
        self.buffer = room(rows, self.weight, self.dtype)
        self._gradient = self.buffer if self.dtype == self.weight.dtype else None
        if self.is_native and self._gradient is None:  # the row kernels never overtake what is still to be read
            self._gradient = self.buffer.view(self.weight.dtype)[:, : len(self.weight)]

    def fill(self, hidden: Tensor) -> Tensor:
        """Return the raw logits (C, V) of hidden (C, H)."""
        out, transposed = self.buffer[: len(hidden)], self.weight.t()
        if self.is_native:
            return small_linear(hidden, self.weight, self.bias, out=out)
        if self.dtype != hidden.dtype:
            torch.mm(hidden, transposed, out_dtype=self.dtype, out=out)
            return out if self.bias is None else out.add_(self.bias)
        args = hidden, transposed
        return torch.mm(*args, out=out) if self.bias is None else torch.addmm(self.bias, *args, out=out)

    @property
    def parts(self) -> list[Tensor]:
        """What takes memory: the logits, and their gradient, which may lie in the same."""
        return [part for part in (self.buffer, self._gradient) if part is not None]

    def gradient(self, rows: int) -> Tensor:
        """Return where dLoss/d(logits) of `rows` rows goes, in the weight's dtype."""
        if self._gradient is None:
            self._gradient = self.weight.new_empty(len(self.buffer), len(self.weight))
        return self._gradient[:rows]


class Chunk(NamedTuple):
    """One chunk: its rows, the buffer that holds its raw logits (C, V), those, and the reference's if there is one."""

    rows: slice
    buffer: LogitBuffer
    logits: Tensor
    ref: Reference | None


def passes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref: RefHead | None, offsets: Tensor | None = None
) -> Iterator[Chunk]:
    """Yield the chunks in order; each is overwritten by the next."""
    chunks = cut(len(hidden), chunk_rows(len(weight), weight.device), offsets)
    most = max((rows.stop - rows.start for rows in chunks), default=0)
    buffer = LogitBuffer(weight, bias, most)
    ref_buffer = None if ref is None else LogitBuffer(ref.weight, ref.bias, most)
    try:
        for rows in chunks:
            logits = None if ref is None or ref_buffer is None else ref_buffer.fill(ref.hidden[rows])
            other = None if ref is None or logits is None else Reference(logits, ref.scaling)
            yield Chunk(rows, buffer, buffer.fill(hidden[rows]), other)
    finally:
        give_back(*(each.buffer for each in (buffer, ref_buffer) if each is not None))

"""Memory for the logits of a chunk, which on the CPU goes from one pass over the head to the next.

Fresh pages are cleared by the kernel before they are written to: tens of megabytes in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastppo.ops.backends import kind_of

_kept: list[Tensor] | None = None  # what no pass uses at the moment; None outside of `keeping_logits`


@contextmanager
def keeping_logits() -> Iterator[None]:
    """Let every pass over a head on the CPU use the memory of the one before, inside."""
    global _kept
    previous, _kept = _kept, []
    try:
        yield
    finally:
        _kept = previous


def room(rows: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for at least these rows of logits (rows, V) of a head: what was kept, if that is enough."""
    for i, memory in enumerate(_kept or ()):
        if _kept and memory.dtype == dtype and memory.device == weight.device and memory.shape[1] == len(weight):
            kept = _kept.pop(i)
            if len(kept) >= rows:
                return kept
            del kept, memory  # freed before more is taken
            break
    return weight.new_empty(rows, len(weight), dtype=dtype)


def give_back(*memory: Tensor) -> None:
    """Keep what a pass no longer uses for the next."""
    if _kept is not None:
        _kept.extend(each for each in memory if kind_of(each.device) == "cpu")

"""Memory for the logits of a chunk, which on the CPU goes from one pass over the head to the next.

Fresh pages are cleared by the kernel before they are written to: tens of megabytes in every pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastppo.ops.backends import kind_of


class _Kept(threading.local):  # or two trainers would take memory from each other, and the last keep some for good
    memory: list[Tensor] | None = None  # what no pass uses at the moment; None outside of `keeping_logits`


_kept = _Kept()


@contextmanager
def keeping_logits() -> Iterator[None]:
    """Let every pass over a head on the CPU use the memory of the one before, inside."""
    previous, _kept.memory = _kept.memory, []
    try:
        yield
    finally:
        _kept.memory = previous


def room(rows: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for at least these rows of logits (rows, V) of a head: what was kept, if that is enough."""
    free = _kept.memory or []
    for i, memory in enumerate(free):
        if memory.dtype == dtype and memory.device == weight.device and memory.shape[1] == len(weight):
            kept = free.pop(i)
            if len(kept) >= rows:
                return kept
            del kept, memory  # freed before more is taken
            break
    return weight.new_empty(rows, len(weight), dtype=dtype)


def give_back(*memory: Tensor) -> None:
    """Keep what a pass no longer uses for the next."""
    if _kept.memory is not None:
        _kept.memory.extend(each for each in memory if kind_of(each.device) == "cpu")

"""Matmuls counted as they are called: torch's, by its dispatcher, and the head's own in C++, which that cannot see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastppo.ops import chunks


class MatmulCount:
    """The FLOPs of the matmuls inside `counting`: two for each multiplication."""

    def __init__(self, counter: FlopCounterMode):
        self.counter, self.own = counter, 0

    @property
    def flops(self) -> int:
        """All of them."""
        return self.own + int(self.counter.get_total_flops())


def addmm_flops(_: Any, a: tuple[int, int], b: tuple[int, int], *args: Any, out_shape: Any = None, **more: Any) -> int:
    """Count the FLOPs of an addmm of two shapes; torch's own formula has no place for the dtype that may follow."""
    return 2 * a[0] * a[1] * b[1]


@contextmanager
def counting() -> Iterator[MatmulCount]:
    """Count the matmuls that are called inside."""
    small_linear = chunks.small_linear

    def counted(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
        count.own += 2 * x.shape[0] * x.shape[1] * weight.shape[0]
        return small_linear(x, weight, *rest, **named)

    with (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: addmm_flops}) as counter,
        patch.object(chunks, "small_linear", counted),
    ):
        count = MatmulCount(counter)
        yield count

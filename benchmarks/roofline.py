"""How fast generation could be on this machine: its FLOPs and bytes over the rates measured in the same run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.recompute import DTYPES


@dataclass(frozen=True)
class Shape:
    """A Llama with as many key and value heads as query heads and a tied head."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    element_bytes: int

    @property
    def body(self) -> int:
        """Weights of the layers' matmuls."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the head's matmul."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True)
class Rates:
    """What the machine does: bytes read from memory and floating-point operations, per second."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Work:
    """What must be done at least: operations, and bytes read."""

    flops: float
    read_bytes: float

    def seconds(self, rates: Rates) -> float:
        """Return the time of whichever takes longer."""
        return max(self.flops / rates.flops_per_s, self.read_bytes / rates.bytes_per_s)


def prefill(shape: Shape, prompts: Sequence[int]) -> Work:
    """Count one pass over the prompts, whose last positions alone go through the head."""
    attention = 4 * shape.hidden * shape.layers * sum(length * (length + 1) / 2 for length in prompts)
    flops = 2 * shape.body * sum(prompts) + 2 * shape.head * len(prompts) + attention
    return Work(flops, (shape.body + shape.head) * shape.element_bytes)


def decode(shape: Shape, prompts: Sequence[int], new_tokens: Sequence[int], rows: int) -> Work:
    """Count the steps after the first token of each response, `rows` sequences at a time.

    A step reads all weights once, and the keys and values of every context once, its own token's included.
    """
    tokens = sum(count - 1 for count in new_tokens)
    contexts = sum(
        (count - 1) * (length + 1 + length + count - 1) // 2 for length, count in zip(prompts, new_tokens, strict=True)
    )
    steps = max(-(-tokens // rows), max(new_tokens) - 1)
    flops = 2 * (shape.body + shape.head) * tokens + 4 * shape.hidden * shape.layers * contexts
    elements = (shape.body + shape.head) * steps + 2 * shape.hidden * shape.layers * contexts
    return Work(flops, elements * shape.element_bytes)


def floor_seconds(
    shape: Shape, rates: Rates, prompts: Sequence[int], new_tokens: Sequence[int], rows: int, samples: int = 1
) -> float:
    """Return the least seconds to answer each prompt `samples` times, each prompt being read once."""
    lengths, counts = ([value for value in values for _ in range(samples)] for values in (prompts, new_tokens))
    return prefill(shape, prompts).seconds(rates) + decode(shape, lengths, counts, rows).seconds(rates)


def _fastest(run: Callable[[], object], times: int) -> float:
    run()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure_rates(dtype: str, is_quick: bool = False) -> Rates:
    """Measure torch's fastest pass over a matrix that no cache holds, and its fastest large matmul in the dtype."""
    rows = 2**12 if is_quick else 2**17
    matrix, vector = torch.ones(rows, 1024), torch.ones(1024)
    read = _fastest(lambda: torch.mv(matrix, vector), 3 if is_quick else 15)
    size = 256 if is_quick else 2048
    square = torch.ones(size, size, dtype=DTYPES[dtype])
    multiply = _fastest(lambda: square @ square, 3 if is_quick else 15)
    return Rates(rows * 1024 * 4 / read, 2 * size**3 / multiply)

"""What benchmarks/generate.py runs: prompts, answer lengths and who takes part."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.roofline import Rates, Shape, floor_seconds
from benchmarks.step import SIZES

PEERS = {
    "transformers": ["transformers", "transformers-tokens"],
    "generate_batch": ["transformers-batch"],
    "llama.cpp": ["llama.cpp", "llama.cpp-numpy"],
}
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
KV_BLOCK = 16  # tokens


@dataclass(frozen=True)
class Case:
    """Prompts by their lengths, each with its number of new tokens and answered `samples` times."""

    title: str
    size: str
    dtype: str
    prompts: tuple[int, ...]
    new_tokens: tuple[int, ...]
    rows: int
    ours: tuple[str, ...] = ("fastppo",)
    samples: int = 1
    has_peers: bool = True

    def __str__(self) -> str:
        return f"{self.size}, {self.title}, {self.dtype}"

    @property
    def tokens(self) -> int:
        """Tokens that everybody must generate."""
        return self.samples * sum(self.new_tokens)

    def ids(self) -> list[list[int]]:
        """Draw the prompts, always the same."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = SIZES[self.size][-1]
        return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in self.prompts]

    def workload(self, model_dir: str) -> dict[str, Any]:
        """Spell the case for a contender's process."""
        known = {
            name: value for name, value in asdict(self).items() if name in ("dtype", "new_tokens", "rows", "samples")
        }
        return known | {"model_dir": model_dir, "prompts": self.ids(), "vocabulary": SIZES[self.size][-1]}

    def floor_seconds(self, rates: Rates) -> float:
        """Return the least seconds by the roofline."""
        hidden, layers, _, intermediate, vocabulary = SIZES[self.size]
        shape = Shape(hidden, layers, intermediate, vocabulary, ELEMENT_BYTES[self.dtype])
        return floor_seconds(shape, rates, self.prompts, self.new_tokens, self.rows, self.samples)

    def kv_blocks(self, is_shared: bool) -> int:
        """Count the blocks of all samples at their end, with a prompt's whole blocks in common or not.

        The last token of a response is drawn and never read, so it has no place in a block.
        """
        total = 0
        for prompt, count in zip(self.prompts, self.new_tokens, strict=True):
            common = prompt // KV_BLOCK if is_shared else 0
            total += common + self.samples * (math.ceil((prompt + count - 1) / KV_BLOCK) - common)
        return total


def ragged(count: int, low: int, high: int) -> tuple[int, ...]:
    """Draw lengths from `low` to `high`, always the same."""
    return tuple(torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(1)).tolist())


def lognormal(count: int, median: int, low: int, high: int) -> tuple[int, ...]:
    """Draw answer lengths as they are spread in practice: log-normal with a deviation of 0.8, held within limits."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(2))
    return tuple((median * torch.exp(0.8 * normal)).round().long().clamp(low, high).tolist())


def plain(size: str, dtype: str, rows: int, lengths: tuple[int, int], new_tokens: int) -> list[Case]:
    """Return the cases of one size: prompts of one length, and ragged ones."""
    low, high = lengths
    counts = (new_tokens,) * rows
    return [
        Case(f"{rows}x{2 * low}+{new_tokens}", size, dtype, (2 * low,) * rows, counts, rows),
        Case(f"{rows}x{low}-{high}+{new_tokens}", size, dtype, ragged(rows, low, high), counts, rows),
    ]


def refill(size: str, dtype: str, requests: int, rows: int, median: int) -> Case:
    """Return the case of answers of very different lengths."""
    counts = lognormal(requests, median, 4, 6 * median)
    ours = ("fastppo", "fastppo-calls", "fastppo-longest")
    title = f"{requests} log-normal answers, {rows} rows"
    return Case(title, size, dtype, (16,) * requests, counts, rows, ours, has_peers=False)


def several(size: str, dtype: str, prompts: int, length: int, samples: int, new_tokens: int) -> Case:
    """Return the case of several samples of each prompt."""
    ours = ("fastppo", "fastppo-repeated")
    title = f"{samples} samples of {prompts}x{length}+{new_tokens}"
    rows, counts = prompts * samples, (new_tokens,) * prompts
    return Case(title, size, dtype, (length,) * prompts, counts, rows, ours, samples, has_peers=False)


def cases_of(name: str, dtype: str, is_quick: bool) -> list[Case]:
    """Return the cases that a name on the command line stands for; none for the checks without a clock."""
    if is_quick:
        rows, size = 3, "tiny"
        return {
            "15m": plain(size, dtype, rows, (4, 12), 5)[1:],
            "lognormal": [refill(size, dtype, 7, rows, 4)],
            "samples": [several(size, dtype, 2, 32, 3, 5)],
        }.get(name, [])
    return {
        "15m": plain("15m", dtype, 32, (8, 64), 64),
        "110m": plain("110m", dtype, 32, (8, 64), 64),
        "lognormal": [refill("15m", dtype, 256, 32, 64)],
        "samples": [several("15m", dtype, 4, 512, 8, 64)],
    }.get(name, [])

"""The memory of the paged KV cache: taken for a rollout, given back after it unless sequences are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastppo.attention import LayerCache, LayerShape
from fastppo.engine.blocks import Held, Ledger, blocks_of


@dataclass(frozen=True, eq=False)
class Kept:
    """A sequence of an earlier call."""

    held: Held
    tokens: Tensor  # (L,) int64, of which the first `held.length` are stored


class PagedCache:
    """Keys and values of all layers in blocks of 16 tokens, and the sequences that are kept from call to call.

    Args:
        layers: what each layer stores, by its layer_idx.
        like: a tensor with the dtype and the device of keys and values.
        budget: bytes that they may take; None for a quarter of what is free when they are taken.
    """

    def __init__(self, layers: Mapping[int, LayerShape], like: Tensor, budget: int | None):
        self.shapes, self.like, self.budget = dict(sorted(layers.items())), like.new_empty(0), budget
        self.windows = tuple(dict.fromkeys(shape.window for shape in self.shapes.values()))
        self.kept: dict[int, Kept] = {}  # by the request's number, the oldest first
        self.version: tuple[int, ...] = ()  # of the weights that computed what is kept
        self.release()

    def release(self) -> None:
        """Give all memory back, that of kept sequences too."""
        self.kept.clear()
        self.ledger: Ledger | None = None
        self.pools: dict[int, tuple[Tensor, Tensor]] = {}
        self.tables: list[Tensor] = []
        self._edits = -1

    @property
    def num_bytes(self) -> int:
        """Bytes taken at the moment."""
        return sum(part.nbytes for pool in self.pools.values() for part in pool)

    def take(self, lengths: Sequence[int], max_rows: int, prefill_tokens: int) -> Ledger:
        """Take or enlarge the memory for sequences that may get these lengths; what is stored stays.

        Raises ValueError if one of them does not fit into the budget by itself.
        """
        old = self.ledger
        ledger = old or Ledger(self.windows, [0] * len(self.windows), 0)
        costs = [self._block_bytes(window) for window in self.windows]
        budget = self.budget if self.budget is not None else free_bytes(self.like.device) // 4 + self.num_bytes
        least = [ledger.least(group, max(lengths)) for group in range(len(costs))]
        self._check_fit(lengths, least, costs, budget)
        sizes = []
        for group, (pool, window) in enumerate(zip(ledger.pools, self.windows, strict=True)):
            # A chunk needs room before the window lets go of what lies behind it.
            chunk = 0 if window is None else blocks_of(min(prefill_tokens, max(lengths)))
            needs = sorted(ledger.least(group, length) for length in lengths)
            sizes.append(sum(needs[-max_rows:]) + chunk + pool.size - pool.free)
        wanted = sum(cost * size for cost, size in zip(costs, sizes, strict=True))
        if wanted > budget:
            spare = budget - sum(cost * count for cost, count in zip(costs, least, strict=True))
            sizes = [low + int((size - low) * spare / wanted) for low, size in zip(least, sizes, strict=True)]
        self._resize([max(size, pool.size) for size, pool in zip(sizes, ledger.pools, strict=True)])
        ledger.grow(sizes, blocks_of(max(lengths)))
        self.ledger = ledger
        return ledger

    def least_bytes(self, length: int) -> int:
        """Return the bytes that one sequence of this length needs."""
        ledger = Ledger(self.windows, [0] * len(self.windows), 0)
        return sum(self._block_bytes(window) * ledger.least(i, length) for i, window in enumerate(self.windows))

    def _check_fit(self, lengths: Sequence[int], least: list[int], costs: list[int], budget: int) -> None:
        needed = sum(cost * count for cost, count in zip(costs, least, strict=True))
        if needed > budget:
            longest = max(range(len(lengths)), key=lambda i: lengths[i])
            source = "a quarter of the free memory" if self.budget is None else "kv_memory"
            raise ValueError(
                f"prompt {longest} may grow to {lengths[longest]} tokens, whose keys and values need {sum(least)} "
                f"blocks of the KV cache, {needed} bytes, but {source} is {budget} bytes; raise kv_memory, lower "
                "max_new_tokens, or shorten the prompt"
            )

    def _resize(self, sizes: Sequence[int]) -> None:
        for layer, shape in self.shapes.items():
            size, old = sizes[self.windows.index(shape.window)], self.pools.get(layer)
            if old is None or len(old[0]) < size:
                self.pools[layer] = shape.pool(size, self.like)
                for part, before in zip(self.pools[layer], old or (), strict=False):
                    part[: len(before)] = before

    def _block_bytes(self, window: int | None) -> int:
        """Return the bytes of one block in all layers of a group."""
        shapes = [shape for shape in self.shapes.values() if shape.window == window]
        return sum(part.nbytes for shape in shapes for part in shape.pool(1, self.like))

    def layers(self) -> dict[int, LayerCache]:
        """Return the cache of each layer with the tables as they are now."""
        self._update_tables()
        groups = dict(zip(self.windows, self.tables, strict=True))
        return {layer: LayerCache(self.pools[layer], groups[shape.window]) for layer, shape in self.shapes.items()}

    def addresses(self) -> tuple[int, ...]:
        """Return where keys, values and tables lie and how wide those are: graphs are captured for that."""
        self._update_tables()
        parts = [part for pool in self.pools.values() for part in pool]
        return (*(part.data_ptr() for part in (*parts, *self.tables)), *(table.numel() for table in self.tables))

    def _update_tables(self) -> None:
        """Bring the device's tables up to date, in the same place as long as they have the same size."""
        if self.ledger is None or self._edits == self.ledger.edits:
            return
        self._edits = self.ledger.edits
        news = [torch.from_numpy(table) for table in self.ledger.tables]
        if [table.shape for table in news] != [table.shape for table in self.tables]:
            self.tables = [table.to(self.like.device) for table in news]
        else:
            for table, new in zip(self.tables, news, strict=True):
                table.copy_(new)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy whole blocks, given as (group, from, to)."""
        for group, window in enumerate(self.windows):
            pairs = [(source, target) for where, source, target in copies if where == group]
            if pairs:
                source, target = torch.tensor(pairs, device=self.like.device).unbind(1)
                for layer, shape in self.shapes.items():
                    if shape.window == window:
                        for part in self.pools[layer]:
                            part[target] = part[source]

    def drop(self, numbers: Iterable[int]) -> None:
        """Stop keeping these sequences, and give all memory back if none is left."""
        for number in numbers:
            kept = self.kept.pop(number, None)
            if kept is not None and self.ledger is not None:
                self.ledger.free(kept.held)
        if not self.kept:
            self.release()

    def spare(self) -> Held | None:
        """Stop keeping the oldest sequence, and return it."""
        return self.kept.pop(next(iter(self.kept))).held if self.kept else None

    def recall(self, number: int, tokens: Tensor) -> Held | None:
        """Return the sequence that was kept for a request, cut to what agrees with these tokens but for the last."""
        kept = self.kept.pop(number, None)
        if kept is None or self.ledger is None:
            return None
        count = min(kept.held.length, len(tokens) - 1)
        differ = (kept.tokens[:count] != tokens[:count]).nonzero()
        self.ledger.truncate(kept.held, int(differ[0]) if len(differ) else count)
        if not kept.held.length:
            self.ledger.free(kept.held)
            return None
        return kept.held


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that could be taken on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

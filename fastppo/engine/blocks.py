"""Which blocks of the KV cache hold which tokens: reference counts and tables, without the keys and values.

Layers whose queries see equally far back form a group and share tables; every group has a pool of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastppo.reference_attention import BLOCK


class BlockPool:
    """Blocks 0..size - 1, each free or held by as many sequences as it has references."""

    def __init__(self, size: int):
        self.size = self.peak = 0
        self._free: list[int] = []
        self._references: list[int] = []
        self.grow(size)

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Return a free block, with one reference."""
        block = self._free.pop()
        self._references[block] = 1
        self.peak = max(self.peak, self.size - len(self._free))
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Count one more holder for each of these blocks."""
        for block in blocks:
            self._references[block] += 1

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence holds the block."""
        return self._references[block] > 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """Count one holder less for each of these blocks. Raises RuntimeError if one was free already."""
        for block in blocks:
            if not self._references[block]:
                raise RuntimeError(f"block {block} of the KV cache was given back twice")
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def grow(self, size: int) -> None:
        """Add blocks until there are `size` of them; those in use keep their numbers."""
        self._free[:0] = range(size - 1, self.size - 1, -1)
        self._references += [0] * (size - self.size)
        self.size = max(self.size, size)


class Held:
    """The blocks of one sequence, in every group."""

    __slots__ = ("blocks", "first", "length", "slot")

    def __init__(self, groups: int):
        self.length = 0  # tokens that are stored, or that the step under way stores
        self.slot = -1  # its row in the tables, -1 while it has none
        self.blocks: list[list[int]] = [[] for _ in range(groups)]
        self.first = [0] * groups  # logical number of the first block that is still held


class Ledger:
    """Hands the blocks of all groups to sequences and keeps the block tables.

    Args:
        windows: for each group, how many tokens a query sees, its own included; None for all.
        sizes: blocks in each group's pool.
        width: logical blocks of the longest sequence.
    """

    def __init__(self, windows: Sequence[int | None], sizes: Sequence[int], width: int):
        self.windows = tuple(windows)
        self.pools = [BlockPool(size) for size in sizes]
        self.tables: list[NDArray[np.int32]] = [np.zeros((0, width), np.int32) for _ in windows]
        self._slots: list[int] = []
        self.edits = 0  # changes of the tables
        self.shared = 0  # blocks that forks did not have to copy

    def grow(self, sizes: Sequence[int], width: int) -> None:
        """Enlarge the pools to these sizes and the tables to this width."""
        for pool, size in zip(self.pools, sizes, strict=True):
            pool.grow(size)
        more = max(0, width - self.tables[0].shape[1])
        self.tables = [np.pad(table, ((0, 0), (0, more))) for table in self.tables]
        self.edits += 1

    @property
    def longest(self) -> int:
        """Tokens that a row of the tables has room for."""
        return int(self.tables[0].shape[1]) * BLOCK

    def least(self, group: int, length: int) -> int:
        """Return how many blocks a sequence of this length needs at least, when it grows token by token."""
        window, whole = self.windows[group], blocks_of(length)
        return whole if window is None else min(whole, (window - 1) // BLOCK + 2)

    def fits(self, wanted: Sequence[int]) -> bool:
        """Whether every group has as many free blocks as are wanted of it."""
        return all(pool.free >= count for pool, count in zip(self.pools, wanted, strict=True))

    def missing(self, helds: Iterable[Held], more: int) -> list[int]:
        """Return how many blocks each group lacks for sequences to grow by so many tokens."""
        helds = list(helds)
        return [
            sum(max(0, blocks_of(held.length + more) - held.first[group] - len(held.blocks[group])) for held in helds)
            for group in range(len(self.pools))
        ]

    def seat(self, held: Held) -> None:
        """Give a sequence a row of the tables."""
        if held.slot >= 0:
            return
        if not self._slots:
            old = len(self.tables[0])
            spare = max(16, old)
            self.tables = [np.pad(table, ((0, spare), (0, 0))) for table in self.tables]
            self._slots = list(range(old + spare - 1, old - 1, -1))
        held.slot = self._slots.pop()
        self.edits += 1
        for table, first, blocks in zip(self.tables, held.first, held.blocks, strict=True):
            table[held.slot, first : first + len(blocks)] = blocks

    def unseat(self, held: Held) -> None:
        """Take the row of a sequence away, not its blocks."""
        if held.slot >= 0:
            self._slots.append(held.slot)
            held.slot = -1

    def open(self) -> Held:
        """Return a new sequence without blocks."""
        held = Held(len(self.pools))
        self.seat(held)
        return held

    def forget(self, held: Held, position: int) -> None:
        """Give back the blocks that no query of the sequence from `position` on sees."""
        for group, window in enumerate(self.windows):
            if window is not None:
                hidden = max(0, position - window + 1) // BLOCK - held.first[group]
                if hidden > 0:
                    self.pools[group].give_back(held.blocks[group][:hidden])
                    del held.blocks[group][:hidden]
                    held.first[group] += hidden

    def reach(self, held: Held, length: int) -> int:
        """Return how long, up to `length`, the free blocks let the sequence become now."""
        for pool, first, blocks in zip(self.pools, held.first, held.blocks, strict=True):
            length = min(length, (first + len(blocks) + pool.free) * BLOCK)
        return max(length, held.length)

    def extend(self, held: Held, length: int) -> None:
        """Make room for the tokens up to `length`, which `reach` has promised."""
        end = blocks_of(length)
        for pool, table, first, blocks in zip(self.pools, self.tables, held.first, held.blocks, strict=True):
            for logical in range(first + len(blocks), end):
                block = pool.take()
                blocks.append(block)
                table[held.slot, logical] = block
                self.edits += 1
        held.length = length

    def fork(self, held: Held) -> tuple[Held, list[tuple[int, int, int]]] | None:
        """Return a sequence with the same tokens, and the (group, from, to) of blocks that must be copied for it.

        Full blocks are shared. None if there is no free block for a last one that is not full.
        """
        is_partial = held.length % BLOCK > 0
        if is_partial and not self.fits([1] * len(self.pools)):
            return None
        fork = Held(len(self.pools))
        fork.length, fork.first, copies = held.length, list(held.first), []
        for group, (pool, blocks) in enumerate(zip(self.pools, held.blocks, strict=True)):
            fork.blocks[group] = blocks[: len(blocks) - is_partial]
            pool.share(fork.blocks[group])
            self.shared += len(fork.blocks[group])
            if is_partial:
                copies.append((group, blocks[-1], pool.take()))
                fork.blocks[group].append(copies[-1][2])
        self.seat(fork)
        return fork, copies

    def truncate(self, held: Held, length: int) -> None:
        """Drop the tokens from `length` on: some more if a block is shared, all if a window has forgotten too much."""
        is_lost = any(
            window is not None and first > max(0, length - window + 1) // BLOCK
            for window, first in zip(self.windows, held.first, strict=True)
        )
        number = length // BLOCK
        for pool, first, blocks in zip(self.pools, held.first, held.blocks, strict=True):
            if length % BLOCK and first <= number < first + len(blocks) and pool.is_shared(blocks[number - first]):
                length -= length % BLOCK
        length = 0 if is_lost else min(length, held.length)
        for group, (pool, blocks) in enumerate(zip(self.pools, held.blocks, strict=True)):
            stay = max(0, blocks_of(length) - held.first[group])
            pool.give_back(blocks[stay:])
            del blocks[stay:]
            held.first[group] = held.first[group] if length else 0
        held.length = length

    def free(self, held: Held) -> None:
        """Give back the row and all blocks of a sequence."""
        self.unseat(held)
        for pool, blocks in zip(self.pools, held.blocks, strict=True):
            pool.give_back(blocks)
            blocks.clear()


def blocks_of(length: int) -> int:
    """Return how many blocks hold this many tokens."""
    return -(-length // BLOCK)

"""Tokenised documents: many of them in three flat tensors, rows made of one or several, and batches without padding.

In a batch all tokens lie side by side in one row, (1, T); `position_ids` begin anew at each document, which is how
documents are told apart. `labels` name the tokens to learn at their own places, IGNORED elsewhere; a document's first
token follows nothing and is never learned.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.models.passes import length_groups
from fastppo.types import offsets_of

IGNORED = -100  # what torch's cross-entropy skips

Row = dict[str, list[int]]


class Corpus(torch.utils.data.Dataset[Row]):
    """Documents in flat int32 tensors, 8 bytes a token, as rows of one document each or, packed, of several."""

    def __init__(self, documents: Iterable[Row]):
        parts = [torch.tensor([row["input_ids"], row["labels"]], dtype=torch.int32) for row in documents]
        self.offsets = offsets_of([part.shape[1] for part in parts])
        self.tokens, self.labels = torch.cat(parts, dim=1) if parts else torch.empty(2, 0, dtype=torch.int32)
        self.rows = [[number] for number in range(len(parts))]

    def pack(self, max_length: int) -> Corpus:
        """Make rows of up to `max_length` tokens, in which documents stay whole; return self."""
        self.rows = best_fit(self.offsets.diff().tolist(), max_length)
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        parts = [slice(*self.offsets[number : number + 2].tolist()) for number in self.rows[index]]
        return {
            "input_ids": [token for part in parts for token in self.tokens[part].tolist()],
            "labels": [label for part in parts for label in self.labels[part].tolist()],
            "position_ids": [place for part in parts for place in range(part.stop - part.start)],
        }


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the numbers of documents by row: longest first, each into the fullest row that still has room for it.

    Rows are in the order of their first documents, and so are the documents in a row. A document that is longer than
    `capacity` has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[number], -1))
        free, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(room, (free - lengths[number], row))
    return sorted(sorted(row) for row in rows)


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Collate rows into one of (1, T): `input_ids`, `labels` and `position_ids`, which a row may lack."""
    placed = [{"position_ids": range(len(row["input_ids"])), **row} for row in rows]
    return {
        name: torch.tensor([[number for row in placed for number in row[name]]])
        for name in ("input_ids", "labels", "position_ids")
    }


def sequences_of(batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the sequences, 1-D int64, of a batch of `input_ids` (B, S); see `Documents.of` for where they begin."""
    kept, is_first = _layout(batch)
    sequences: tuple[Tensor, ...] = batch["input_ids"][kept].split(_lengths(kept, is_first))
    return sequences


def _layout(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what is not padding and what begins a sequence, (B, S) bool each."""
    ids = batch["input_ids"]
    kept = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    is_first = kept & (kept.cumsum(1) == 1)
    if "position_ids" in batch:
        is_first |= kept & (batch["position_ids"] == 0)
    return kept, is_first


def _lengths(kept: Tensor, is_first: Tensor) -> list[int]:
    starts = is_first[kept].nonzero()[:, 0].tolist()
    lengths: list[int] = torch.tensor([*starts, int(kept.sum())]).diff().tolist()
    return lengths


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch, from whatever collator."""

    tokens: tuple[Tensor, ...]  # B documents, 1-D int64
    labels: tuple[Tensor, ...]  # of the same lengths; the first is IGNORED

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Documents:
        """Read a batch of (B, S) `input_ids` and `labels`, without what `attention_mask` says is padding.

        A document begins with a row, and where `position_ids`, if there are any, are 0.
        """
        kept, is_first = _layout(batch)
        lengths = _lengths(kept, is_first)
        learned = batch["labels"].masked_fill(is_first, IGNORED)[kept]
        return cls(batch["input_ids"][kept].split(lengths), learned.split(lengths))

    @property
    def count(self) -> Tensor:
        """The number of tokens to learn, ()."""
        return torch.stack([(labels != IGNORED).sum() for labels in self.labels]).sum()

    def targets(self) -> list[Tensor]:
        """Return for every token of every document the one to learn after it, IGNORED where there is none."""
        return [torch.cat([labels[1:], labels.new_full((1,), IGNORED)]) for labels in self.labels]

    def parts(self, is_packed: bool, max_tokens: int | None) -> Iterator[dict[str, Tensor]]:
        """Yield batches of at most `max_tokens` tokens, or one document, and of similar lengths if they are padded."""
        lengths = [len(tokens) for tokens in self.tokens]
        for group in length_groups(lengths, len(lengths), is_packed, max_tokens):
            places = torch.cat([torch.arange(lengths[number]) for number in group])
            yield {
                "input_ids": torch.cat([self.tokens[number] for number in group])[None],
                "labels": torch.cat([self.labels[number] for number in group])[None],
                "position_ids": places[None].to(self.tokens[0].device),
            }

    def padded(self) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, (B, S), padded on the right: the form that models take."""
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        columns = (self.tokens, tuple(torch.ones_like(tokens) for tokens in self.tokens), self.labels)
        return {
            name: torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
            for (name, fill), rows in zip(fills.items(), columns, strict=True)
        }

"""Pairs of a preferred text and another: from the rows of a dataset to tokens, and to batches without padding."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.models.passes import length_groups
from fastppo.reward_models import text_ids
from fastppo.trainers.chats import ChatTemplate, is_chat, messages_of
from fastppo.trainers.documents import sequences_of

Pair = dict[str, Any]
SIDES = ("chosen", "rejected")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairEncoder:
    """How rows become the tokens of `chosen` and `rejected`, of each the first `max_length`, and a `margin`.

    `adds_eos` ends every text by EOS where the tokenizer has one.
    """

    tokenizer: Any
    max_length: int
    adds_eos: bool = True

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> list[Pair]:
        """Tokenise a dataset. Raises ValueError for rows that are no pairs, or if the cut leaves no difference."""
        pairs = [self._pair(row) for row in rows]
        same = sum(pair["chosen"] == pair["rejected"] for pair in pairs)
        if pairs and same == len(pairs):
            raise ValueError(
                f"none of {same} pairs differs within {self.max_length} tokens; raise max_length, or check the columns"
            )
        if same:
            _log.warning("%d of %d pairs do not differ within %d tokens", same, len(pairs), self.max_length)
        return pairs

    def _pair(self, row: Mapping[str, Any]) -> Pair:
        pair: Pair = {side: self._ids(row, side)[: self.max_length] for side in SIDES}
        empty = [side for side in SIDES if not pair[side]]
        if empty:
            raise ValueError(f"{' and '.join(empty)} of a row has no tokens: {dict(row)!r:.120}; leave such rows out")
        if row.get("margin") is not None:
            pair["margin"] = float(row["margin"])
            if not math.isfinite(pair["margin"]):
                raise ValueError(f"a row has margin={row['margin']!r}, expected a finite number, or None for no margin")
        return pair

    def _ids(self, row: Mapping[str, Any], side: str) -> list[int]:
        if row.get(f"input_ids_{side}") is not None:  # TRL's columns, padded perhaps
            ids = torch.as_tensor(row[f"input_ids_{side}"])
            mask = row.get(f"attention_mask_{side}")
            kept: list[int] = (ids if mask is None else ids[torch.as_tensor(mask).bool()]).tolist()
            return kept
        text, prompt = row.get(side), row.get("prompt")
        if isinstance(text, str) and (prompt is None or isinstance(prompt, str)):
            return self._text_ids((prompt or "") + text)
        if is_chat(text) and (prompt is None or is_chat(prompt)):
            messages = messages_of([*(prompt or []), *(text or [])])
            return self._text_ids(ChatTemplate(self.tokenizer).render(messages, row), add_special_tokens=False)
        raise ValueError(
            f"a row has columns {sorted(row)} with {side}={text!r:.60} and prompt={prompt!r:.60}, expected texts or "
            "chats in `chosen` and `rejected`, after a `prompt` of the same kind if there is one, or token ids in "
            "`input_ids_chosen` and `input_ids_rejected`"
        )

    def _text_ids(self, text: str, **options: Any) -> list[int]:
        if self.adds_eos:
            return text_ids(text, self.tokenizer, verbose=False, **options)
        ids: list[int] = self.tokenizer(text, verbose=False, **options)["input_ids"]
        return ids


def pairs_side_by_side(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Collate pairs: all chosen texts, then all rejected ones, in one row of (1, T), and margins (B,) if there are any.

    `position_ids` (1, T) begin anew at each text.
    """
    texts = [pair[side] for side in SIDES for pair in pairs]
    batch = {
        "input_ids": torch.tensor([[token for text in texts for token in text]]),
        "position_ids": torch.tensor([[place for text in texts for place in range(len(text))]]),
    }
    if any("margin" in pair for pair in pairs):
        batch["margin"] = torch.tensor([pair.get("margin", 0.0) for pair in pairs])
    return batch


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of a batch."""

    chosen: tuple[Tensor, ...]  # B texts, 1-D int64
    rejected: tuple[Tensor, ...]
    margins: Tensor | None  # (B,)

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Pairs:
        """Read a batch of chosen and then rejected texts, side by side or padded (2B, S) with an `attention_mask`."""
        texts = sequences_of(batch)
        return cls(texts[: len(texts) // 2], texts[len(texts) // 2 :], batch.get("margin"))

    def __len__(self) -> int:
        return len(self.chosen)

    def parts(self, is_packed: bool, max_tokens: int | None) -> Iterator[Pairs]:
        """Yield them in groups of at most `max_tokens` tokens, or one pair; of similar lengths if they are padded."""
        sizes = [(len(a), len(b)) for a, b in zip(self.chosen, self.rejected, strict=True)]
        lengths = [sum(both) if is_packed else 2 * max(both) for both in sizes]
        for group in length_groups(lengths, len(lengths), is_packed, max_tokens):
            chosen, rejected = (tuple(texts[number] for number in group) for texts in (self.chosen, self.rejected))
            yield Pairs(chosen, rejected, None if self.margins is None else self.margins[group])

    def batch(self) -> dict[str, Tensor]:
        """Return them in the form that `of` reads."""
        texts = [*self.chosen, *self.rejected]
        places = torch.cat([torch.arange(len(text)) for text in texts])
        result = {"input_ids": torch.cat(texts)[None], "position_ids": places[None].to(texts[0].device)}
        return result if self.margins is None else result | {"margin": self.margins}

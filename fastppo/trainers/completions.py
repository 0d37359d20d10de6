"""Which part of a text is an answer, found by the templates that stand before it: TRL's way, and without its traps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.trainers.documents import IGNORED

Span = tuple[int, int]  # begin and end, of characters or of tokens
_log = logging.getLogger(__name__)


class DataCollatorForCompletionOnlyLM:
    """Learn only what follows `response_template`, up to the next `instruction_template` if there is one.

    With a response template alone, that is what follows its last occurrence. In an SFTTrainer, templates that are texts
    are searched in the texts of the dataset, so it does not matter how a tokenizer cuts them where they stand; in rows
    of ids that are handed to the collator itself, and for templates given as lists of ids, their tokens are searched.
    A row without them is not learned at all, with a warning. No token is left out for being the padding token.
    Raises ValueError for an empty template and for `mlm=True`.
    """

    def __init__(
        self,
        response_template: str | list[int],
        instruction_template: str | list[int] | None = None,
        tokenizer: Any = None,
        mlm: bool = False,
        ignore_index: int = IGNORED,
    ):
        if tokenizer is None or mlm:
            raise ValueError(f"tokenizer is {type(tokenizer).__name__} and mlm={mlm}, expected a tokenizer and False")
        templates = [response_template] if instruction_template is None else [response_template, instruction_template]
        if not all(templates) or len({isinstance(template, str) for template in templates}) > 1:
            raise ValueError(
                f"the templates are {response_template!r} and {instruction_template!r}, expected texts, or lists of "
                "token ids, that are not empty"
            )
        self.templates, self.tokenizer, self.ignore_index = templates, tokenizer, ignore_index
        self.reads_text = isinstance(response_template, str)

    def spans(self, text: str) -> list[Span]:
        """Return the answers' characters in a text, none if there is no template, which is warned of."""
        return self._spans(text, self.templates)

    def _spans(self, sequence: Any, templates: Sequence[Any]) -> list[Span]:
        ends = [place + len(templates[0]) for place in _places(sequence, templates[0])]
        if len(templates) == 1:
            spans = [(end, len(sequence)) for end in ends[-1:]]
        else:
            starts = _places(sequence, templates[1])
            spans = [(end, next((s for s in starts if s >= end), len(sequence))) for end in ends] if starts else []
        if not spans:
            _log.warning("a row holds no %s and is not learned: %.100r", " or no ".join(map(repr, templates)), sequence)
        return spans

    def labels(self, ids: Sequence[int]) -> list[int]:
        """Return the token ids (L,) of the answers, `ignore_index` elsewhere."""
        templates = [
            self.tokenizer(template, add_special_tokens=False)["input_ids"] if isinstance(template, str) else template
            for template in self.templates
        ]
        labels = [self.ignore_index] * len(ids)
        for begin, end in self._spans(list(ids), templates):
            labels[begin:end] = ids[begin:end]
        return labels

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, (B, S) each, padded on the tokenizer's side.

        Rows are lists of ids, or dicts with `input_ids` and, where it is known already, `labels`.
        """
        columns = [row if isinstance(row, Mapping) else {"input_ids": row} for row in rows]
        ids = [torch.as_tensor(row["input_ids"]).tolist() for row in columns]
        pairs = zip(columns, ids, strict=True)
        labels = [list(row["labels"]) if "labels" in row else self.labels(own) for row, own in pairs]
        masks = [[1] * len(own) for own in ids]
        pad_id = self.tokenizer.pad_token_id or 0
        filled = {"input_ids": (ids, pad_id), "attention_mask": (masks, 0), "labels": (labels, self.ignore_index)}
        return {name: self._padded(values, fill) for name, (values, fill) in filled.items()}

    def _padded(self, rows: Sequence[list[int]], fill: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        side = self.tokenizer.padding_side
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


def _places(sequence: Any, part: Any) -> list[int]:
    """Return where `part` stands in a text or list."""
    size = len(part)
    return [place for place in range(len(sequence) - size + 1) if sequence[place : place + size] == part]

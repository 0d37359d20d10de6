"""Rows of a dataset become tokens and labels: texts, prompts with completions, chats, and what is tokenised already.

What is to be learned is known as characters of the text, and a token is learned if it reaches into them. So it does not
matter how the tokenizer cuts a prompt, a template or a turn where they stand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch

from fastppo.trainers.chats import ChatTemplate, is_chat, messages_of
from fastppo.trainers.completions import DataCollatorForCompletionOnlyLM, Span
from fastppo.trainers.documents import IGNORED, Corpus, Row

_CHAT_COLUMNS = ("messages", "conversations")
_log = logging.getLogger(__name__)


class _Passage(NamedTuple):
    text: str
    learned: Sequence[Span] | None  # characters; None stands for all of them
    is_whole: bool  # a template has written all special tokens that there are to be: neither BOS nor EOS is added


@dataclass(frozen=True)
class Encoder:
    """How the rows of a dataset become `input_ids` and `labels` of at most `max_length` tokens.

    A text that is no chat is ended by EOS where the tokenizer has one; a chat ends as its template ends it. Args:

        text_field: the column of the text or chat; `text_field_first` prefers it to `prompt` and `completion`.
        formatting_func: makes the text of one row, or a list of texts of a dict of columns, TRL 0.7's other form.
        completion_only: learn completions only; None does so where there are any.
        assistant_only: learn only what the assistant wrote in a chat.
        answers: templates that tell the answers in a text, the only part that is then learned.
        add_special_tokens: whether the tokenizer adds those that begin a text.
        batch_size: rows that are tokenised at a time.
    """

    tokenizer: Any
    max_length: int
    text_field: str = "text"
    text_field_first: bool = False
    formatting_func: Callable[[Any], Any] | None = None
    completion_only: bool | None = None
    assistant_only: bool = False
    answers: DataCollatorForCompletionOnlyLM | None = None
    add_special_tokens: bool = True
    batch_size: int = 1000

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> Corpus:
        """Tokenise a dataset. Raises ValueError if a row has no known column, or if no row has a token to learn."""
        count = 0
        documents = []
        for document in self.documents(rows):
            count += 1
            documents += [] if document is None else [document]
        if count and not documents:
            raise ValueError(
                f"none of {count} rows has a token to learn within {self.max_length} tokens; raise max_seq_length, or "
                "check what is to be learned"
            )
        if len(documents) < count:
            _log.warning(
                "left out %d rows with nothing to learn within %d tokens", count - len(documents), self.max_length
            )
        return Corpus(documents)

    def documents(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row | None]:
        """Yield each row's tokens and labels, None where there is nothing to learn."""
        remaining = iter(rows)
        if self.formatting_func is not None and self.completion_only:
            raise ValueError(
                "completion_only_loss=True with formatting_func=, in whose texts no completion can be told; give rows "
                "of `prompt` and `completion` instead, or a DataCollatorForCompletionOnlyLM"
            )
        format_rows = None if self.formatting_func is None else _Formatter(self.formatting_func)
        while batch := list(islice(remaining, self.batch_size)):
            prepared: list[Row | _Passage]
            if format_rows is None:
                prepared = [self._prepare(row) for row in batch]
            else:
                prepared = [self._passage_of(text) for text in format_rows(batch)]
            for row in self._tokenised(prepared):
                cut = {name: ids[: self.max_length] for name, ids in row.items()}
                # Nothing precedes the first token, and in a packed row the one before it is another document's.
                cut["labels"][:1] = [IGNORED] * len(cut["labels"][:1])
                yield cut if any(label != IGNORED for label in cut["labels"]) else None

    def _prepare(self, row: Mapping[str, Any]) -> Row | _Passage:
        """Return what a row says in one of the forms that a dataset may have."""
        if "input_ids" in row:
            return self._given(row)
        if "prompt" in row and "completion" in row and not (self.text_field_first and self.text_field in row):
            return self._prompted(row, row["prompt"], row["completion"])
        if self.completion_only:
            raise ValueError(f"completion_only_loss=True, but a row has columns {sorted(row)}, expected `completion`")
        column = next((name for name in (self.text_field, *_CHAT_COLUMNS) if row.get(name) is not None), None)
        if column is None or not (isinstance(row[column], str) or is_chat(row[column])):
            raise ValueError(
                f"a row has columns {sorted(row)}, expected a text in {self.text_field!r}, a chat in `messages`, "
                "`prompt` with `completion`, or `input_ids`; name the text's column with dataset_text_field= or pass "
                "formatting_func="
            )
        return self._chat(row, row[column]) if is_chat(row[column]) else self._passage_of(row[column])

    def _given(self, row: Mapping[str, Any]) -> Row:
        """Return tokens that a row has already, without what its `attention_mask` says is padding."""
        columns = {name: torch.as_tensor(row[name]) for name in ("input_ids", "labels") if row.get(name) is not None}
        if row.get("attention_mask") is not None:
            kept = torch.as_tensor(row["attention_mask"]).bool()
            columns = {name: column[kept] for name, column in columns.items()}
        ids, labels = columns["input_ids"].tolist(), columns.get("labels")
        if labels is not None:
            return {"input_ids": ids, "labels": labels.tolist()}
        return {"input_ids": ids, "labels": list(ids) if self.answers is None else _found(self.answers, ids)}

    def _prompted(self, row: Mapping[str, Any], prompt: Any, completion: Any) -> Row | _Passage:
        is_learning_all = self.completion_only is False
        if is_chat(prompt) and is_chat(completion):
            prompt, completion = messages_of(prompt), messages_of(completion)
            if is_learning_all or self.assistant_only:
                return self._chat(row, [*prompt, *completion])
            return _Passage(*ChatTemplate(self.tokenizer).completion(prompt, completion, row), True)
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise ValueError(
                f"`prompt` is {prompt!r:.60} and `completion` {completion!r:.60}, expected two texts or two chats"
            )
        text = prompt + completion
        return _Passage(text, None if is_learning_all or not prompt else [(len(prompt), len(text))], False)

    def _chat(self, row: Mapping[str, Any], messages: Any) -> Row | _Passage:
        template, messages = ChatTemplate(self.tokenizer), messages_of(messages)
        if not self.assistant_only:
            text = template.render(messages, row)
            return _Passage(text, self._answers_in(text), True)
        return _Passage(*template.answers(messages, row), True)

    def _passage_of(self, text: str) -> _Passage:
        if self.assistant_only:
            raise ValueError(f"assistant_only_loss=True, but a row is the text {text!r:.60}, expected a chat")
        return _Passage(text, self._answers_in(text), False)

    def _answers_in(self, text: str) -> list[Span] | None:
        return self.answers.spans(text) if self.answers is not None and self.answers.reads_text else None

    def _tokenised(self, prepared: Sequence[Row | _Passage]) -> list[Row]:
        """Tokenise what is still text, all of a kind together."""
        rows: list[Any] = list(prepared)
        for is_whole in (False, True):
            found = {i: part for i, part in enumerate(rows) if isinstance(part, _Passage) and part.is_whole == is_whole}
            if found:
                for place, row in zip(found, self._tokenise(list(found.values()), is_whole), strict=True):
                    rows[place] = row
        return rows

    def _tokenise(self, passages: Sequence[_Passage], is_whole: bool) -> list[Row]:
        needs_offsets = any(passage.learned is not None for passage in passages)
        if needs_offsets and not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} reports no offsets, expected a fast tokenizer to learn parts of texts"
            )
        encoded = self.tokenizer(
            [passage.text for passage in passages],
            add_special_tokens=self.add_special_tokens and not is_whole,
            return_offsets_mapping=needs_offsets,
            verbose=False,  # longer texts are cut afterwards
        )
        offsets = encoded["offset_mapping"] if needs_offsets else [[]] * len(passages)
        return [self._label(*parts) for parts in zip(passages, encoded["input_ids"], offsets, strict=True)]

    def _label(self, passage: _Passage, ids: list[int], offsets: Sequence[Span]) -> Row:
        spans, eos = passage.learned, self.tokenizer.eos_token_id
        if spans is None:
            labels = list(ids)
        else:
            is_learned = [any(start < end and begin < stop for start, stop in spans) for begin, end in offsets]
            labels = [token if learned else IGNORED for token, learned in zip(ids, is_learned, strict=True)]
        if eos is not None and not passage.is_whole:
            if ids[-1:] != [eos]:
                ids, labels = [*ids, eos], [*labels, IGNORED]
            # By position, never by value: a real EOS is learned also where pad and EOS are the same token.
            if spans is None or (spans and spans[-1][1] == len(passage.text)):
                labels[-1] = eos
        if self.answers is not None and not self.answers.reads_text:
            labels = _found(self.answers, ids)
        return {"input_ids": ids, "labels": labels}


def _found(answers: DataCollatorForCompletionOnlyLM, ids: list[int]) -> list[int]:
    """Return the answers' tokens, IGNORED elsewhere, whatever the collator has there when it is used by itself."""
    return [IGNORED if label == answers.ignore_index else label for label in answers.labels(ids)]


class _Formatter:
    """A user's function that makes a text of a row, or a list of texts of a dict of columns."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function
        self.takes_columns: bool | None = None  # not yet known

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the texts of some rows. Raises ValueError for anything else."""
        if self.takes_columns is None:
            self.takes_columns = self._refuses(batch[0])
        if self.takes_columns:
            texts: Any = self.function({name: [row[name] for row in batch] for name in batch[0]})
        else:
            texts = [self.function(row) for row in batch]
        wrong = texts if not isinstance(texts, list) else next((t for t in texts if not isinstance(t, str)), None)
        if wrong is not None:
            raise ValueError(
                f"formatting_func returned {wrong!r:.80} of type {type(wrong).__name__}, expected a str for one row, "
                "or a list of str for a dict of columns"
            )
        return list(texts)

    def _refuses(self, row: Mapping[str, Any]) -> bool:
        """Whether the function makes no text of a single row: TRL 0.7's was for many, and indexes the columns."""
        try:
            return not isinstance(self.function(row), str)
        except TypeError:
            return True

"""The prompts of a training run: encoded once, checked against the context, served in a resumable order."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.rewards import is_listed
from fastppo.trainers.setup import EpochSampler

_PROMPT_COLUMNS = ("prompt", "query", "text")
_REWARD_ARGUMENTS = ("prompts", "completions", "prompt_ids", "completion_ids")


@dataclass(frozen=True)
class Prompts:
    """N prompts: what the user gave, their tokens, and the other columns of the data."""

    given: list[Any]
    ids: list[Tensor]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.given)

    def take(self, rows: Iterable[int]) -> Prompts:
        """Return the prompts numbered `rows`, in that order."""
        rows = list(rows)
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Prompts([self.given[i] for i in rows], [self.ids[i] for i in rows], columns)


def read_prompts(data: Any, engine: Any, *, room: int | None, overlong: str, column: str | None = None) -> Prompts:
    """Encode prompts: texts, chats, lists of token ids, or rows (a dataset) with a prompt column.

    `room` is the number of tokens that a prompt may have. Raises ValueError for longer ones, unless `overlong` says
    to drop or to truncate them (from the left, keeping the end), and if nothing is left.
    """
    given, columns = _split_columns(data, column)
    if not given:
        raise ValueError("there are no prompts; pass at least one")
    ids = engine.encode(given)
    empty = [i for i, prompt in enumerate(ids) if not len(prompt)]
    if empty:
        raise ValueError(f"{len(empty)} of {len(ids)} prompts have no tokens, first: number {empty[0]}; remove them")
    prompts = Prompts(given, ids, columns)
    return prompts if room is None else _fit(prompts, room, overlong)


def _split_columns(data: Any, column: str | None) -> tuple[list[Any], dict[str, list[Any]]]:
    if isinstance(data, str) or not is_listed(data):
        raise ValueError(
            f"prompts must be a list or a dataset, got {type(data).__name__}; a single prompt goes into a list"
        )
    if hasattr(data, "column_names"):
        table = {name: list(data[name]) for name in data.column_names}
    elif len(data) and isinstance(data[0], Mapping) and not {"role", "content"} <= set(data[0]):
        different = [i for i, row in enumerate(data) if set(row) != set(data[0])]
        if different:
            raise ValueError(
                f"row {different[0]} of the data has the columns {sorted(data[different[0]])}, the first row has "
                f"{sorted(data[0])}; give all rows the same columns"
            )
        table = {name: [row[name] for row in data] for name in data[0]}
    else:
        return list(data), {}
    found = [column] if column is not None else [name for name in _PROMPT_COLUMNS if name in table]
    if not found or found[0] not in table:
        wanted = repr(column) if column is not None else f"one of {', '.join(_PROMPT_COLUMNS)}"
        raise ValueError(f"the data has the columns {sorted(table)}, but {wanted} is needed for the prompts")
    prompts = table.pop(found[0])
    taken = [name for name in _REWARD_ARGUMENTS if name in table]
    if taken:
        warnings.warn(
            f"the data's columns {taken} are not handed to the reward, which gets the run's own prompts and completions"
            " and their token ids under these names; rename them, or choose the prompts with query_column",
            stacklevel=4,
        )
    return prompts, {name: values for name, values in table.items() if name not in taken}


def _fit(prompts: Prompts, room: int, overlong: str) -> Prompts:
    long = [i for i, ids in enumerate(prompts.ids) if len(ids) > room]
    if not long:
        return prompts
    what = f"{len(long)} of {len(prompts)} prompts are longer than {room} tokens, which is the model's context less "
    what += f"max_new_tokens (first: number {long[0]} with {len(prompts.ids[long[0]])} tokens)"
    if overlong == "error" or room < 1:
        raise ValueError(f"{what}; shorten them, lower max_new_tokens, or set overlong_prompts to drop or truncate")
    if overlong == "truncate":
        warnings.warn(f"{what}; only their ends are kept", stacklevel=4)
        return Prompts(prompts.given, [ids[-room:] for ids in prompts.ids], prompts.columns)
    if len(long) == len(prompts):
        raise ValueError(f"{what}; none is left after dropping them")
    warnings.warn(f"{what}; they are dropped", stacklevel=4)
    dropped = set(long)
    return prompts.take(i for i in range(len(prompts)) if i not in dropped)


class PromptStream:
    """An endless, shuffled stream over prompts, whose place can be saved and restored."""

    def __init__(self, prompts: Prompts, seed: int):
        self.prompts = prompts
        self._sampler = EpochSampler(len(prompts), seed, 1)
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def place(self) -> list[int]:
        """Epoch, and prompts already served of it."""
        return [self._sampler.epoch, self._sampler.drawn]

    def seek(self, place: Sequence[int]) -> None:
        """Continue at a saved place."""
        self._sampler.epoch, self._sampler.drawn = place

    def take(self, count: int) -> Prompts:
        """Return the next `count` prompts."""
        return self.prompts.take([self._next() for _ in range(count)])

    def _next(self) -> int:
        sampler = self._sampler
        if self._order[0] != sampler.epoch:
            self._order = (sampler.epoch, sampler.order())
        index = self._order[1][sampler.drawn]
        sampler.drawn += 1
        if sampler.drawn == sampler.size:
            sampler.epoch, sampler.drawn = sampler.epoch + 1, 0
        return index


def decode(tokenizer: Any, responses: Sequence[Tensor]) -> list[Any]:
    """Return the texts of responses without special tokens, or lists of token ids without a tokenizer."""
    ids = [response.tolist() for response in responses]
    return ids if tokenizer is None else tokenizer.batch_decode(ids, skip_special_tokens=True)


def texts(tokenizer: Any, prompts: Prompts) -> list[str]:
    """Return the prompts as text, for a person to read."""
    if tokenizer is None or all(isinstance(prompt, str) for prompt in prompts.given):
        return [str(prompt if not isinstance(prompt, Tensor) else prompt.tolist()) for prompt in prompts.given]
    decoded: list[str] = decode(tokenizer, prompts.ids)
    return decoded


def as_given(prompts: Prompts, tokenizer: Any) -> list[Any]:
    """Return the prompts as a reward sees them: texts and chats as they came, token ids decoded."""
    is_ids = not isinstance(prompts.given[0], str) and not _is_chat(prompts.given[0])
    return decode(tokenizer, prompts.ids) if is_ids else prompts.given


def reward_columns(prompts: Prompts, responses: Sequence[Tensor]) -> dict[str, list[Any]]:
    """Return what a reward gets beside prompts and completions: their token ids, and the columns of the data."""
    ids = {"prompt_ids": [prompt.tolist() for prompt in prompts.ids]}
    return {**prompts.columns, **ids, "completion_ids": [response.tolist() for response in responses]}


def _is_chat(prompt: Any) -> bool:
    return not isinstance(prompt, torch.Tensor) and len(prompt) > 0 and isinstance(prompt[0], Mapping)

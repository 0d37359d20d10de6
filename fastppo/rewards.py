"""Rewards: any callable, several with weights, a text-classification model, or a reward adapter."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.reward_models import AdapterReward as AdapterReward
from fastppo.reward_models import ModelReward as ModelReward
from fastppo.reward_models import as_reward

RewardFunction = Callable[..., Any]

_OWN_ARGUMENTS = ("prompts", "completions")


def parse_scores(scores: Sequence[Any] | Tensor, count: int) -> Tensor:
    """Return the scores as (B,) fp32 on the host, NaN where a score is None or NaN.

    Takes numbers, 0-d or one-element tensors, or one 1-D tensor. Raises ValueError for a wrong count, a wrong type
    or shape, and for infinite scores, with the position of the first offender.
    """
    if isinstance(scores, (str, bytes, Mapping, Set)) or not is_listed(scores):
        raise ValueError(
            f"the scores are {_shown(scores)} of type {type(scores).__name__}; expected a list or a 1-D tensor, "
            "one number or None per response"
        )
    if len(scores) != count:
        raise ValueError(f"got {len(scores)} scores for {count} responses; return exactly one score per response")
    parsed = torch.tensor([_parse_score(score, i) for i, score in enumerate(scores)], dtype=torch.float32)
    infinite = parsed.isinf().nonzero().flatten().tolist()
    if infinite:
        raise ValueError(
            f"score {infinite[0]} is {parsed[infinite[0]].item()} ({len(infinite)} infinite in all); return None to "
            "leave a response out, or bound the reward"
        )
    return parsed


def is_listed(given: Any) -> bool:
    """Whether something has a length and numbered entries."""
    has_entries = hasattr(given, "__len__") and hasattr(given, "__getitem__")
    return has_entries and getattr(given, "ndim", 1) > 0


def _parse_score(score: Any, position: int) -> float:
    if score is None:
        return math.nan
    if isinstance(score, (Tensor, np.ndarray)):
        if score.ndim > 1 or math.prod(score.shape) != 1:
            raise ValueError(
                f"score {position} has shape {tuple(score.shape)}; a score is one number, 0-d or of one element"
            )
        score = score.item()
    if isinstance(score, (numbers.Real, np.bool_)):
        return float(score)
    raise ValueError(
        f"score {position} is {_shown(score)} of type {type(score).__name__}; expected a number, a tensor or None"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Reward:
    """One reward out of one or several: the weighted sum of what each gives.

    A function gets `prompts`, `completions` and the data's columns by keyword, those that it has parameters for; one
    that names its first two parameters otherwise gets prompts and completions by position. `columns` are the names of
    the data's columns, if they are known already. A response for which any function gives None or NaN has no score.
    In a training run `prompt_ids` and `completion_ids`, lists of token ids, are among the columns. A network in the
    place of a function is a classification model, or a policy with a reward adapter; `tokenizer` is the policy's.
    Raises ValueError for a wrong number of weights and for a function with a parameter that nothing can fill.
    """

    def __init__(
        self,
        rewards: Any,
        weights: Sequence[float] | None = None,
        *,
        columns: Collection[str] | None = None,
        tokenizer: Any = None,
    ):
        functions = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        self.functions = [_bind(function, tokenizer) for function in functions]
        self.weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise ValueError(f"got {len(self.weights)} reward weights for {len(self.functions)} rewards; give one each")
        for bound in self.functions:
            bound.check(columns)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Any]) -> Tensor:
        """Return the scores, (B,) fp32 on the host, NaN for a response without one.

        Raises ValueError, naming the function, for a wrong count, a wrong type, or an infinite score.
        """
        total = torch.zeros(len(completions))
        for bound, weight in zip(self.functions, self.weights, strict=True):
            bound.check(columns)
            returned = bound(prompts, completions, columns)
            try:
                total += weight * parse_scores(returned, len(completions))
            except (ValueError, TypeError) as error:
                raise ValueError(f"reward {bound.name}: {error}") from error
        return total


@dataclass(frozen=True)
class _Bound:
    """A reward function, and which of its parameters get what."""

    function: RewardFunction
    name: str
    by_position: bool  # prompts and completions are its first two arguments, whatever they are called
    takes_all: bool  # it has **kwargs
    taken: frozenset[str]  # parameters filled by name
    required: frozenset[str]  # parameters without a default that a name has to fill
    unfillable: tuple[str, ...]  # parameters that no name can fill

    def check(self, columns: Collection[str] | None) -> None:
        """Raise ValueError if a parameter stays empty with these columns, or with any for None."""
        given = {*(columns or ()), *(() if self.by_position else _OWN_ARGUMENTS)}
        missing = [*self.unfillable, *(sorted(self.required - given) if columns is not None else ())]
        if missing:
            raise ValueError(
                f"reward {self.name} has the parameters {missing}, but is given prompts, completions and the data's "
                f"columns {sorted(columns or ())}; name its parameters after these, or give the others a default"
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Any]) -> Any:
        named = dict(columns) if self.by_position else {**columns, "prompts": prompts, "completions": completions}
        named = {name: value for name, value in named.items() if self.takes_all or name in self.taken}
        return self.function(prompts, completions, **named) if self.by_position else self.function(**named)


def _bind(reward: Any, tokenizer: Any) -> _Bound:
    if isinstance(reward, torch.nn.Module):
        reward = as_reward(reward, tokenizer)
    if not callable(reward):
        raise ValueError(
            f"a reward must be a callable (prompts, completions, **columns) or a classification model, got {reward!r}"
        )
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except ValueError:  # compiled functions may not tell
        return _Bound(reward, name, True, False, frozenset(), frozenset(), ())
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    fixed = [p for p in positional if p.kind is p.POSITIONAL_ONLY]
    has_two = len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    knows_names = takes_all or any(p.name in _OWN_ARGUMENTS for p in parameters)
    by_position = has_two and (bool(fixed) or not knows_names)
    rest = parameters[2:] if by_position and len(positional) >= 2 else parameters
    named = [p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = frozenset(p.name for p in named if p.default is p.empty)
    unfillable = tuple(p.name for p in rest if p.kind is p.POSITIONAL_ONLY and p.default is p.empty)
    return _Bound(reward, name, by_position, takes_all, frozenset(p.name for p in named), required, unfillable)

"""Rewards: any callable, several with weights, or a text-classification model."""

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

RewardFunction = Callable[..., Any]

# Stands in the configuration of a model that RewardTrainer trained: it expects an EOS after every text.
ENDS_WITH_EOS = "fastppo_text_ends_with_eos"
_NO_LIMIT = 2**20  # tokenizers without a limit of their own name an enormous one
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


class ModelReward:
    """The score of a sequence-classification model for prompt and completion together; None for a text without tokens.

    The text is decoded and encoded again with the reward model's own tokenizer. With one label the score is its
    logit; with several it is the logit of `label`, by default the last. `add_eos` ends every text by EOS; by default
    that is done for models that RewardTrainer trained, of which an adapter loaded from disk does not tell.
    Raises ValueError for a model that is no sequence-classification model, or that names no tokenizer.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, label: int = -1, batch_size: int = 32, add_eos: bool | None = None
    ):
        config: Any = getattr(model, "config", None)
        if not isinstance(getattr(config, "num_labels", None), int):
            raise ValueError(
                f"{type(model).__name__} has no config.num_labels, expected a sequence-classification model; call any "
                "other network in a function (prompts, completions) -> scores and pass that as the reward"
            )
        if tokenizer is None and not config._name_or_path:
            raise ValueError(
                f"{type(model).__name__} made in memory names no tokenizer; pass ModelReward(model, tokenizer) instead"
            )
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(config._name_or_path)
        self.model, self.tokenizer, self.label, self.batch_size = model.eval(), tokenizer, label, batch_size
        self.add_eos = getattr(config, ENDS_WITH_EOS, False) if add_eos is None else add_eos

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Tensor:
        """Return one score per completion, (B,) fp32, NaN for a text without tokens."""
        texts = [_as_text(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
        rows = [self._encode(text) for text in texts]
        scores, filled = torch.full((len(rows),), math.nan), [i for i, row in enumerate(rows) if row["input_ids"]]
        for start in range(0, len(filled), self.batch_size):
            part = filled[start : start + self.batch_size]
            scores[part] = self._score([rows[i] for i in part])
        return scores

    def _encode(self, text: str) -> dict[str, list[int]]:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limit = min(positions or _NO_LIMIT, self.tokenizer.model_max_length)
        if self.add_eos:
            return {"input_ids": text_ids(text, self.tokenizer)[:limit]}
        # The tokenizer cuts, because it knows the tokens that have to stay at the end.
        cut = {"truncation": True, "max_length": limit} if limit < _NO_LIMIT else {}
        return dict(self.tokenizer(text, **cut))

    def _score(self, rows: list[dict[str, list[int]]]) -> Tensor:
        """Return the scores (B,) on the host, of texts padded on the right."""
        config = self.model.config.get_text_config()
        pad_id, longest = config.pad_token_id, max(len(row["input_ids"]) for row in rows)
        ends = {row["input_ids"][-1] for row in rows}
        # Such models find a row's last token as the last that is not their pad id: without one, any that ends no row.
        chosen = pad_id if pad_id is not None else next(i for i in range(len(rows) + 1) if i not in ends)
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        fill, taken = {"input_ids": chosen}, inspect.signature(self.model.forward).parameters
        inputs = {
            name: torch.tensor([row[name] + [fill.get(name, 0)] * (longest - len(row[name])) for row in rows])
            for name in rows[0]
            if name in taken
        }
        config.pad_token_id = chosen
        try:
            output = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
        finally:
            config.pad_token_id = pad_id
        logits = getattr(output, "logits", None)
        if logits is None or logits.dim() != 2:
            shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(
                f"{type(self.model).__name__} gives {shape}, expected (texts, labels); load it as an "
                "AutoModelForSequenceClassification"
            )
        scores: Tensor = logits[:, self.label].float().cpu()
        return scores


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Tokenise a finished text as RewardTrainer's models see it: ended by EOS where the tokenizer has one."""
    ids: list[int] = tokenizer(text)["input_ids"]
    eos_id = tokenizer.eos_token_id
    return ids if eos_id is None or ids[-1:] == [eos_id] else [*ids, eos_id]


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content", "")) for message in prompt)


class Reward:
    """One reward out of one or several: the weighted sum of what each gives.

    A function gets `prompts`, `completions` and the data's columns by keyword, those that it has parameters for; one
    that names its first two parameters otherwise gets prompts and completions by position. `columns` are the names of
    the data's columns, if they are known already. A response for which any function gives None or NaN has no score.
    Raises ValueError for a wrong number of weights and for a function with a parameter that nothing can fill.
    """

    def __init__(self, rewards: Any, weights: Sequence[float] | None = None, *, columns: Collection[str] | None = None):
        functions = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        self.functions = [_bind(function) for function in functions]
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


def _bind(reward: Any) -> _Bound:
    if isinstance(reward, torch.nn.Module):
        reward = ModelReward(reward)
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

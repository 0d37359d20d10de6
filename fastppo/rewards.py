"""Rewards: any callable, several with weights, or a text-classification model."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

RewardFunction = Callable[..., Any]


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
    """The score of a sequence-classification model for prompt and completion together.

    The text is decoded and encoded again with the reward model's own tokenizer. With one label the score is its
    logit; with several it is the logit of `label`, by default the last.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, label: int = -1, batch_size: int = 32):
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
        self.model, self.tokenizer, self.label, self.batch_size = model.eval(), tokenizer, label, batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Tensor:
        """Return one score per completion, (B,) fp32."""
        texts = [_as_text(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
        parts = [self._score(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)]
        return torch.cat(parts).float().cpu()

    def _score(self, texts: list[str]) -> Tensor:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        inputs = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=limit is not None, max_length=limit
        )
        taken = inspect.signature(self.model.forward).parameters
        inputs = {name: value.to(self.model.device) for name, value in inputs.items() if name in taken}
        scores: Tensor = self.model(**inputs).logits[:, self.label]
        return scores


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content", "")) for message in prompt)


class Reward:
    """One reward out of one or several: the weighted sum of what each gives.

    A response for which any of them gives None or NaN has no score.
    """

    def __init__(self, rewards: Any, weights: Sequence[float] | None = None):
        functions = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        self.functions = [_as_function(function) for function in functions]
        self.weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise ValueError(f"got {len(self.weights)} reward weights for {len(self.functions)} rewards; give one each")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Any]) -> Tensor:
        """Return the scores, (B,) fp32 on the host, NaN for a response without one.

        Raises ValueError, naming the function, for a wrong count, a wrong type, or an infinite score.
        """
        total = torch.zeros(len(completions))
        for function, weight in zip(self.functions, self.weights, strict=True):
            returned = function(prompts=prompts, completions=completions, **columns)
            try:
                total += weight * parse_scores(returned, len(completions))
            except (ValueError, TypeError) as error:
                raise ValueError(f"reward {_name_of(function)}: {error}") from error
        return total


def _as_function(reward: Any) -> RewardFunction:
    if isinstance(reward, torch.nn.Module):
        return ModelReward(reward)
    if not callable(reward):
        raise ValueError(
            f"a reward must be a callable (prompts, completions, **columns) or a classification model, got {reward!r}"
        )
    parameters = inspect.signature(reward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        function: RewardFunction = reward
        return function
    taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    def without_unknown_columns(**arguments: Any) -> Any:
        return reward(**{name: value for name, value in arguments.items() if name in taken})

    without_unknown_columns.__name__ = _name_of(reward)
    return without_unknown_columns


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)

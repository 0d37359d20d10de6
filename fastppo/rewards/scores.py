"""What a reward may return: one number per response, or None where it has none to give."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor


def parse_scores(
    scores: Sequence[Any] | Tensor, count: int, *, clip: float | None = None, rows: Sequence[int] | None = None
) -> Tensor:
    """Return the scores as (B,) fp32 on the host, NaN where a score is None or NaN.

    Takes numbers, 0-d or one-element tensors, or one 1-D tensor. With `clip` they are cut to [-clip, clip], infinite
    ones too. `rows` are the responses' positions in the batch, where they are not all of it. Raises ValueError for a
    wrong count, a wrong type or shape, and for infinite scores without `clip`, with the first offender's position.
    """
    if isinstance(scores, (str, bytes, Mapping, Set)) or not is_listed(scores):
        raise ValueError(
            f"the scores are {_shown(scores)} of type {type(scores).__name__}; expected a list or a 1-D tensor, "
            "one number or None per response"
        )
    if len(scores) != count:
        raise ValueError(f"got {len(scores)} scores for {count} responses; return exactly one score per response")
    positions = range(count) if rows is None else rows
    given = [_parse_score(score, i) for score, i in zip(scores, positions, strict=True)]
    parsed = torch.tensor(given, dtype=torch.float32)
    if clip is not None:
        return parsed.clamp(-clip, clip)
    infinite = parsed.isinf().nonzero().flatten().tolist()
    if infinite:
        raise ValueError(
            f"score {positions[infinite[0]]} is {parsed[infinite[0]].item()} ({len(infinite)} infinite in all); return "
            "None to leave a response out, or bound the reward"
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
        try:
            return float(score)
        except OverflowError:  # of a whole number beyond fp64
            return -math.inf if str(score).startswith("-") else math.inf
    raise ValueError(
        f"score {position} is {_shown(score)} of type {type(score).__name__}; expected a number, a tensor or None"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

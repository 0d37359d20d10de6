"""How far one form of a model is from another on given texts: quantised from not, merged from adapted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo import ops
from fastppo.models.network import evaluating, language_head, last_hidden


@dataclass(frozen=True)
class Accuracy:
    """Distances over all tokens but the first of each text, in nats."""

    tokens: int
    mean_gap: float  # of |log p(token) − log q(token)|
    max_gap: float
    mean_kl: float  # of KL(p || q) over the vocabulary
    max_kl: float
    perplexity: float  # of the texts under p
    other_perplexity: float


@torch.no_grad()
def compare(model: Any, other: Any, sequences: Sequence[Tensor]) -> Accuracy:
    """Compare two models, p and q, token by token on 1-D sequences. Raises ValueError for texts without any."""
    parts = [_one(model, other, ids) for ids in sequences if len(ids) > 1]
    if not parts:
        raise ValueError(f"none of the {len(sequences)} texts has two tokens or more; pass longer ones")
    logprobs, others, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    gaps = (logprobs - others).abs()
    return Accuracy(
        tokens=len(gaps),
        mean_gap=float(gaps.mean()),
        max_gap=float(gaps.max()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        perplexity=math.exp(-float(logprobs.mean())),
        other_perplexity=math.exp(-float(others.mean())),
    )


def _one(model: Any, other: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs of both (T - 1,), and the KL between them (T - 1,)."""
    heads, logprobs = [], []
    for network in (model, other):
        with evaluating(network):
            hidden = last_hidden(network, input_ids=ids[None], use_cache=False)[0, :-1].float()
        head = language_head(network)
        heads.append((hidden, head.weight.float(), head.arguments(1.0)))
        logprobs.append(ops.linear_logprobs(hidden, heads[-1][1], ids[1:], ignore_index=None, **heads[-1][2])[0])
    (hidden, weight, shape), (other_hidden, other_weight, other_shape) = heads
    kl = ops.linear_kl((hidden, weight), (other_hidden, other_weight), **shape, ref_shape=other_shape)
    return logprobs[0], logprobs[1], kl

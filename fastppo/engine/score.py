"""Scores of given responses, by whole forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo import ops
from fastppo.engine import prompts
from fastppo.models.attach import is_attached
from fastppo.models.network import evaluating, language_head
from fastppo.models.passes import passing, response_hidden, sample_groups
from fastppo.models.seq2seq import decoder_prefix
from fastppo.types import Samples, offsets_of


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model says of given responses, flat over all their tokens."""

    logprobs: Tensor  # (T,) fp32
    entropies: Tensor  # (T,) fp32, in nats
    values: Tensor | None  # (T,) fp32, before each token; None without a value head
    offsets: Tensor  # (B + 1,) int64, start of each response


@torch.no_grad()
def score(
    model: Any, queries: Sequence[Tensor], responses: Sequence[Tensor], temperature: float, max_tokens: int
) -> Scores:
    """Score responses to queries, 1-D int64 each, `max_tokens` or one sequence to a forward pass. Raises ValueError."""
    if len(queries) != len(responses):
        raise ValueError(f"got {len(responses)} responses to {len(queries)} queries; pass one to each")
    lengths = [len(response) for response in responses]
    if 0 in lengths:
        raise ValueError(f"response {lengths.index(0)} is empty; leave it out with its query: it has no token to score")
    prompts.check(queries, lengths, model)
    labels, offsets = torch.cat(list(responses)), offsets_of(lengths)
    samples = Samples(
        queries=tuple(queries),
        responses=tuple(responses),
        rows=tuple(range(len(lengths))),
        num_given=len(lengths),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        offsets=offsets,
        labels=labels,
        ended=torch.zeros(len(lengths), dtype=torch.bool),
        temperature=temperature,
        prefix=decoder_prefix(model),
    )
    head, value_head = language_head(model), getattr(model, "v_head", None)
    logprobs, entropies, values = torch.zeros(3, len(labels), device=labels.device).unbind()
    with evaluating(model), passing(model):
        for group in sample_groups(samples, range(len(samples)), len(samples), is_attached(model), max_tokens):
            tokens = samples.take(group).to(labels.device)
            hidden = response_hidden(model, samples, group)
            stats = ops.linear_logprobs(
                hidden, head.weight, labels[tokens], ignore_index=None, **head.arguments(temperature)
            )
            logprobs[tokens], entropies[tokens] = stats[0].float(), stats[1].float()
            if value_head is not None:
                values[tokens] = value_head(hidden).squeeze(-1)
    return Scores(logprobs, entropies, None if value_head is None else values, offsets)

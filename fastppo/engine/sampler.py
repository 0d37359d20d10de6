"""The head and the draw: from the hidden states of some requests to their next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo import ops
from fastppo.config import SamplingConfig
from fastppo.engine.requests import Draw, Requests
from fastppo.models.network import causal_lm, language_head
from fastppo.ops.matmul import is_row_invariant
from fastppo.ops.row_types import Scaling
from fastppo.ops.rows import statistics


class Sampler:
    """Draws for up to `rows` requests at a time."""

    def __init__(self, model: Any, requests: Requests, sampling: SamplingConfig, rows: int):
        self.requests, self.sampling = requests, sampling
        self.head = language_head(model)
        # The sampler sums a row in another order than the update's statistics do.
        self.is_exact = is_row_invariant()
        self.logits = ops.LogitBuffer(self.head.weight, self.head.bias, rows)
        self.value_head = getattr(model, "v_head", None)
        self.device = causal_lm(model).device
        possible = sorted(end for end in requests.stopping.ids if 0 <= end < len(self.head.weight))
        self.end_ids = torch.tensor(possible, dtype=torch.int64, device=self.device)

    def draw(self, hidden: Tensor, requests: Sequence[int]) -> Draw:
        """Draw the next token of these requests from their last hidden states (N, H)."""
        return self.draw_at(hidden, self.requests.next_places(requests), self.may_be_early(requests))

    @property
    def scaling(self) -> Scaling:
        """What is between raw logits and the softmax."""
        temperature = self.sampling.temperature if self.sampling.do_sample else 1.0
        return Scaling(temperature, self.head.softcap, self.head.logit_scale)

    @property
    def limits(self) -> tuple[int, float, bool]:
        """Top-k, top-p, and whether the likeliest token is taken."""
        return self.sampling.top_k, self.sampling.top_p, not self.sampling.do_sample

    def may_be_early(self, requests: Sequence[int]) -> bool:
        """Whether one of these requests is too short to end."""
        return self.is_early(min((len(self.requests.tokens[request]) for request in requests), default=0))

    def is_early(self, length: int) -> bool:
        """Whether a response of this length must not end."""
        return len(self.end_ids) > 0 and length < self.sampling.min_new_tokens

    def values(self, hidden: Tensor) -> Tensor | None:
        """Return the values (N,) of hidden states (N, H), if there is a value head."""
        return None if self.value_head is None else self.value_head(hidden).squeeze(-1)

    def draw_at(self, hidden: Tensor, places: Tensor, may_be_early: bool) -> Draw:
        """Draw from hidden states (N, H) the tokens of `places` (3, N), as `Requests.next_places` gives them.

        Nothing is read back from the device.
        """
        scaling, (top_k, top_p, greedy) = self.scaling, self.limits
        hidden = hidden.to(self.head.weight.dtype)
        logits = self.logits.fill(hidden)
        result = ops.sample_tokens(
            logits,
            self.requests.seed,
            *places[:2],
            temperature=scaling.temperature,
            softcap=scaling.softcap,
            logit_scale=scaling.logit_scale,
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            **(self._forbidden(places) if may_be_early else {}),
        )
        if self.is_exact:
            stats = statistics(logits, result[0], scaling)
            result = (result[0], stats.logprobs, stats.entropies, result[3])
        return Draw(*result, self.values(hidden))

    def _forbidden(self, places: Tensor) -> dict[str, Tensor]:
        """Name the rows that are too short to end, and the ids that would end them."""
        return {"forbidden_ids": self.end_ids, "is_forbidden": places[2] < self.sampling.min_new_tokens}

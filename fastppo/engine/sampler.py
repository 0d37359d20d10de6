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

    def may_be_early(self, requests: Sequence[int]) -> bool:
        """Whether one of these requests is too short to end."""
        least = self.sampling.min_new_tokens
        return len(self.end_ids) > 0 and any(len(self.requests.tokens[request]) < least for request in requests)

    def draw_at(self, hidden: Tensor, places: Tensor, may_be_early: bool) -> Draw:
        """Draw from hidden states (N, H) the tokens of `places` (3, N), as `Requests.next_places` gives them.

        Nothing is read back from the device.
        """
        sampling, head = self.sampling, self.head
        temperature = sampling.temperature if sampling.do_sample else 1.0
        hidden = hidden.to(head.weight.dtype)
        logits = self.logits.fill(hidden)
        result = ops.sample_tokens(
            logits,
            self.requests.seed,
            *places[:2],
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            greedy=not sampling.do_sample,
            **(self._forbidden(places) if may_be_early else {}),
        )
        if self.is_exact:
            scaling = Scaling(temperature, head.softcap, head.logit_scale)
            stats = statistics(logits, result[0], scaling)
            result = (result[0], stats.logprobs, stats.entropies, result[3])
        return Draw(*result, None if self.value_head is None else self.value_head(hidden).squeeze(-1))

    def _forbidden(self, places: Tensor) -> dict[str, Tensor]:
        """Name the rows that are too short to end, and the ids that would end them."""
        return {"forbidden_ids": self.end_ids, "is_forbidden": places[2] < self.sampling.min_new_tokens}

"""Decoding for models that no padding suits: states that are carried from token to token, or no cache at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from fastppo.engine.requests import Requests
from fastppo.engine.sampler import Sampler
from fastppo.engine.windowed import WindowDecoder
from fastppo.models.network import causal_lm, last_hidden


def equal_lengths(items: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """Return the items in groups of equal length."""
    groups: dict[int, list[Any]] = {}
    for item, length in zip(items, lengths, strict=True):
        groups.setdefault(length, []).append(item)
    return list(groups.values())


class StateDecoder(WindowDecoder):
    """Recurrent and hybrid models: prompts of equal length are prefilled together, without padding; then each row keeps
    its states, and keys and values if it has any, left-padded, among those of the others.
    """

    tier = "C"

    def _admit(self) -> None:
        requests, rows = self.rows.admit()
        prompts = [self.requests.prompts[request] for request in requests]
        for group in equal_lengths(list(zip(requests, rows, strict=True)), [len(prompt) for prompt in prompts]):
            seated, places = (list(part) for part in zip(*group, strict=True))
            ids = torch.stack([self.requests.prompts[request] for request in seated])
            cache, length = _whole_cache(causal_lm(self.model)), ids.shape[1]
            positions = torch.arange(length, device=self.device).expand_as(ids)
            hidden = self._forward(ids, torch.ones_like(ids), positions, cache)
            self.cache.admit(cache, [length] * len(places), places, len(self.rows.occupants))
            self._counts["prefill_tokens"] += ids.numel()
            self._draw(hidden, seated, places)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
        inputs |= {"past_key_values": cache, "cache_params": cache}
        if any(isinstance(layer, DynamicLayer) for layer in cache.layers):
            inputs["attention_mask"] = mask  # states by themselves know no padding
        return last_hidden(self.model, **inputs, use_cache=True)[:, -1]


def _whole_cache(model: Any) -> DynamicCache:
    """Return the model's own kind of cache; layers with a window keep everything, for the mask hides the rest."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            has_states = isinstance(layer, LinearAttentionLayer)
            whole = LinearAttentionAndFullAttentionLayer(layer.number_of_states) if has_states else DynamicLayer()
            cache.layers[index] = whole
    return cache


class WholeDecoder(WindowDecoder):
    """Any model: every step runs the whole sequences anew, those of equal length together. Slow, and always right."""

    tier = "D"

    def __init__(self, model: Any, requests: Requests, sampler: Sampler, max_rows: int):
        super().__init__(model, requests, sampler, max_rows)
        self.cache.lengths = [0] * len(self.rows.occupants)

    def _admit(self) -> None:
        self.rows.admit()

    def _decode(self) -> None:
        seats = [(request, row) for row, request in enumerate(self.rows.occupants) if request is not None]
        sequences = [self.requests.sequence(request) for request, _ in seats]
        lengths = [len(sequence) for sequence in sequences]
        for group in equal_lengths(list(zip(seats, sequences, strict=True)), lengths):
            ids = torch.stack([sequence for _, sequence in group])
            hidden = last_hidden(self.model, input_ids=ids, use_cache=False)[:, -1]
            self._counts["decode_tokens"] += ids.numel()
            requests, rows = (list(part) for part in zip(*(seat for seat, _ in group), strict=True))
            self._draw(hidden, requests, rows)

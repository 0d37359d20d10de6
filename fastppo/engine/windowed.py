"""Decoding over a left-padded cache: slower than the paged one, and right for every model that is all attention."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fastppo.engine.cache import WindowCache
from fastppo.engine.requests import Requests
from fastppo.engine.sampler import Sampler
from fastppo.models.attach import pinned_rope
from fastppo.models.network import causal_lm, last_hidden


class Rows:
    """Which request sits in which row of the batch, and who waits."""

    def __init__(self, num_requests: int, max_rows: int):
        self.waiting = deque(range(num_requests))
        self.occupants: list[int | None] = [None] * min(max_rows, num_requests)

    @property
    def active(self) -> list[int]:
        """Rows with a request in them, ascending."""
        return [row for row, request in enumerate(self.occupants) if request is not None]

    @property
    def requests(self) -> list[int]:
        """The requests in the active rows, in the rows' order."""
        return [request for request in self.occupants if request is not None]

    @property
    def has_room(self) -> bool:
        """Whether somebody waits and a row is free."""
        return bool(self.waiting) and None in self.occupants

    def admit(self) -> tuple[list[int], list[int]]:
        """Seat waiting requests in free rows; return the requests and their rows."""
        free = [row for row, request in enumerate(self.occupants) if request is None]
        seated: list[int] = []
        for row in free[: len(self.waiting)]:
            self.occupants[row] = self.waiting.popleft()
            seated.append(row)
        return [request for row in seated if (request := self.occupants[row]) is not None], seated

    def leave(self, row: int) -> None:
        """Free a row."""
        self.occupants[row] = None

    def compact(self) -> list[int] | None:
        """Squeeze out empty rows once a quarter of them is empty; return the rows that stay, or None."""
        active = self.active
        if self.waiting or not active or len(active) > 0.75 * len(self.occupants):
            return None
        self.occupants = [self.occupants[row] for row in active]
        return active


class WindowDecoder:
    """One generate call: admit, decode, draw, until nobody is left."""

    tier = "B"
    cache_type: type[WindowCache] = WindowCache

    def __init__(self, model: Any, requests: Requests, sampler: Sampler, max_rows: int):
        self.model, self.requests, self.sampler = model, requests, sampler
        self.rows, self.cache = Rows(len(requests.prompts), max_rows), self.cache_type()
        self.device = causal_lm(model).device
        self._counts = {"steps": 0, "prefill_tokens": 0, "decode_tokens": 0}

    def ready(self) -> AbstractContextManager[None]:
        """Return the context that steps need."""
        return pinned_rope(self.model)

    def step(self) -> bool:
        """Give every row a token, after new ones have been admitted; return whether anything is left to do."""
        for request in self.requests.cancel():
            if request in self.rows.waiting:
                self.rows.waiting.remove(request)
            else:
                self._leave(self.rows.occupants.index(request))
        while self._may_admit():
            self._admit()
        if self.rows.active:
            self._decode()
        stay = self.rows.compact()
        if stay is not None:
            self.cache.keep(stay)
        self._counts["steps"] += 1
        return bool(self.rows.waiting or self.rows.active)

    def close(self, is_complete: bool) -> None:
        """Let go of the cache, of which nothing can be kept."""
        del is_complete
        self.cache = self.cache_type()

    def metrics(self) -> dict[str, Any]:
        """Return what the call has cost so far."""
        rows = self._counts["decode_tokens"] / max(1, self._counts["steps"])
        return self._counts | {"tier": self.tier, "decoder": "modules", "mean_rows": rows}

    def _may_admit(self) -> bool:
        return self.rows.has_room

    def _admit(self) -> None:
        """Prefill waiting prompts, seat them in free rows, and draw their first tokens."""
        requests, rows = self.rows.admit()
        prompts = [self.requests.prompts[request] for request in requests]
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        cache = DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        hidden = self._forward(ids, mask, positions, cache)
        self.cache.admit(cache, lengths, rows, len(self.rows.occupants))
        self._counts["prefill_tokens"] += sum(lengths)
        self._draw(hidden, requests, rows)

    def _decode(self) -> None:
        """Run one step of all rows, free ones included, and draw a token for each active one."""
        self.cache.make_room()
        last = [0 if request is None else self.requests.tokens[request][-1] for request in self.rows.occupants]
        ids = torch.tensor(last, device=self.device)[:, None]
        positions = torch.tensor(self.cache.lengths, device=self.device)[:, None]
        mask = self.cache.mask(self.device)
        hidden = self._forward(ids, mask, positions, self.cache)
        self.cache.advance()
        active = self.rows.active
        if len(active) < len(last):
            hidden = hidden[torch.tensor(active, device=self.device)]
        self._counts["decode_tokens"] += len(active)
        self._draw(hidden, self.rows.requests, active)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return last_hidden(self.model, **inputs, use_cache=True)[:, -1]

    def _draw(self, hidden: Tensor, requests: list[int], rows: list[int]) -> None:
        for request in self.requests.record(requests, self.sampler.draw(hidden, requests)):
            self._leave(rows[requests.index(request)])

    def _leave(self, row: int) -> None:
        self.rows.leave(row)
        self.cache.release(row)

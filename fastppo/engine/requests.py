"""The state of a generate call: its requests, which of them sit in which row, and what was drawn so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.types import Rollout, edits_of, offsets_of


@dataclass(frozen=True)
class Draw:
    """What one decode step drew for the active rows, (N,) each."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor
    kept_mass: Tensor
    values: Tensor | None


class Requests:
    """N requests, their limits, and the records of the tokens drawn for them.

    `first_id` is the number of the first one: with `seed` and the token's position it decides every draw.
    """

    def __init__(self, prompts: Sequence[Tensor], limits: Sequence[int], seed: int, first_id: int):
        self.prompts, self.limits = tuple(prompts), list(limits)
        count, longest = len(prompts), max(limits, default=1)
        device = prompts[0].device if prompts else torch.device("cpu")
        self.seed, self.first_id = seed, first_id
        self.tokens = torch.zeros(count, longest, dtype=torch.int64, device=device)
        self.records = torch.zeros(4, count, longest, device=device)  # logprob, entropy, kept mass, value
        self.has_values = False
        self.drawn = [0] * count
        self.finished = [False] * count

    def places(self, requests: list[int]) -> Tensor:
        """Return number and next position (2, N) int64 of these requests: what their next draw depends on."""
        numbers = [self.first_id + request for request in requests]
        return torch.tensor([numbers, [self.drawn[request] for request in requests]], device=self.tokens.device)

    def record(self, requests: list[int], draw: Draw) -> None:
        """Keep what was drawn for these requests, in their order."""
        rows = torch.tensor(requests, device=self.tokens.device)
        columns = torch.tensor([self.drawn[request] for request in requests], device=self.tokens.device)
        self.tokens[rows, columns] = draw.tokens
        self.records[0, rows, columns] = draw.logprobs.float()
        self.records[1, rows, columns] = draw.entropies.float()
        self.records[2, rows, columns] = draw.kept_mass.float()
        if draw.values is not None:
            self.has_values = True
            self.records[3, rows, columns] = draw.values
        for request in requests:
            self.drawn[request] += 1

    def response(self, request: int) -> Tensor:
        """Return the tokens drawn so far for a request."""
        return self.tokens[request, : self.drawn[request]]

    def rollout(self, temperature: float, version: tuple[int, ...]) -> Rollout:
        """Put the records together. Raises FloatingPointError if the model produced numbers that are not finite."""
        taken = torch.arange(self.tokens.shape[1])[None] < torch.tensor(self.drawn)[:, None]
        flat = self.records[:, taken.to(self.tokens.device)]
        self._check_finite(flat[0], taken)
        tokens = self.tokens[taken.to(self.tokens.device)]
        return Rollout(
            queries=self.prompts,
            responses=tuple(tokens.split(self.drawn)),
            tokens=tokens,
            logprobs=flat[0],
            entropies=flat[1],
            kept_mass=flat[2],
            values=flat[3] if self.has_values else None,
            finished=torch.tensor(self.finished, dtype=torch.bool),
            temperature=temperature,
            weight_version=version,
            token_edits=edits_of(tokens),
        )

    def _check_finite(self, logprobs: Tensor, taken: Tensor) -> None:
        broken = ~torch.isfinite(logprobs)
        if bool(broken.any()):
            starts = offsets_of(self.drawn)
            first = int(broken.nonzero()[0])
            request = int((starts <= first).sum()) - 1
            raise FloatingPointError(
                f"the model produced logits that are not finite ({int(broken.sum())} of {len(logprobs)} tokens, first "
                f"in prompt {request}); check the weights, and load the model in float32 or bfloat16, not float16"
            )


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

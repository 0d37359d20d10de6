"""The state of a generate call: its requests, when they end, and what was drawn so far."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.engine.stopping import Stopping
from fastppo.types import Rollout, edits_of, offsets_of


class Draw(NamedTuple):
    """What one step drew for some requests, (N,) each."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor
    kept_mass: Tensor
    values: Tensor | None

    def rows(self, places: Sequence[int]) -> Draw:
        """Return the draws of these rows."""
        return self if len(places) == len(self.tokens) else self._each(lambda part: part[list(places)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Draw:
        return Draw._make(None if part is None else change(part) for part in self)


def on_host(draws: Sequence[Draw]) -> list[Draw]:
    """Return draws of the same number of rows in the host's memory."""
    return list(draws) if not draws or draws[0].tokens.device.type == "cpu" else in_one_copy(draws)


def in_one_copy(draws: Sequence[Draw]) -> list[Draw]:
    """Return draws of the same number of rows in the host's memory, for which the device is waited for once."""
    columns = [[part for part in draw if part is not None] for draw in draws]
    # fp64 holds a token, and a float of any smaller kind, exactly.
    packed = torch.stack([torch.stack([part.double() for part in column]) for column in columns]).cpu()
    return [Draw(tokens.long(), *(part.float() for part in rest), *[None][: 4 - len(rest)]) for tokens, *rest in packed]


class Places(NamedTuple):
    """What the draws of each request depend on besides the seed, and where it comes from."""

    numbers: tuple[int, ...]
    starts: tuple[int, ...]  # positions of the first tokens
    sources: tuple[int, ...]  # numbers under which keys and values of the prompts may have been kept


class Requests:
    """N requests with their limits and places, and the records of the tokens drawn for them."""

    def __init__(self, prompts: Sequence[Tensor], limits: Sequence[int], seed: int, places: Places, stopping: Stopping):
        self.prompts, self.limits = list(prompts), list(limits)
        self.seed, self.places, self.stopping = seed, places, stopping
        self.tokens = [array("q") for _ in prompts]
        self.reasons = [""] * len(prompts)  # why each one ended: stop, length or cancelled
        self.cancelling: deque[int] = deque()  # other threads may append
        self.draws: list[tuple[list[int], Draw]] = []

    def add(self, prompt: Tensor, limit: int, number: int, start: int) -> int:
        """Append a request that goes on with what was kept under its number; return its place in the list."""
        self.prompts.append(prompt)
        self.limits.append(limit)
        self.places = Places(*((*old, new) for old, new in zip(self.places, (number, start, number), strict=True)))
        self.tokens.append(array("q"))
        self.reasons.append("")
        return len(self.prompts) - 1

    def next_places(self, requests: Sequence[int]) -> Tensor:
        """Return (3, N) int64 of the next draw of these requests: number, position, tokens drawn before."""
        numbers, starts = self.places.numbers, self.places.starts
        drawn = [len(self.tokens[request]) for request in requests]
        positions = [starts[request] + count for request, count in zip(requests, drawn, strict=True)]
        rows = [[numbers[request] for request in requests], positions, drawn]
        return torch.tensor(rows, device=self.prompts[0].device)

    def record(self, requests: list[int], draw: Draw) -> list[int]:
        """Keep what was drawn for these requests, in their order; return those that have ended with it."""
        (draw,) = on_host([draw])
        self.draws.append((requests, draw))
        ended = []
        for request, token in zip(requests, draw.tokens.tolist(), strict=True):
            response = self.tokens[request]
            response.append(token)
            if self.stopping.has_ended(token, response):
                self.reasons[request] = "stop"
            elif len(response) >= self.limits[request]:
                self.reasons[request] = "length"
            else:
                continue
            ended.append(request)
        return ended

    def ask_to_cancel(self, requests: Iterable[int] | None) -> None:
        """Have requests cancelled before the next step, all if None. Raises ValueError for places that are none."""
        count = len(self.prompts)
        places = list(range(count) if requests is None else requests)
        unknown = [place for place in places if not 0 <= place < count]
        if unknown:  # here, for in the decoder it would end the whole call
            raise ValueError(
                f"cannot cancel {unknown}: expected places in the call's list of responses, 0 to {count - 1}"
            )
        self.cancelling.extend(places)

    def cancel(self) -> list[int]:
        """End the requests that were asked to be cancelled and are not over, and return them."""
        ended = []
        while self.cancelling:
            request = self.cancelling.popleft()
            if not self.reasons[request]:
                self.reasons[request] = "cancelled"
                ended.append(request)
        return ended

    def sequence(self, request: int) -> Tensor:
        """Return prompt and response, 1-D."""
        response = torch.tensor(self.tokens[request], dtype=torch.int64, device=self.prompts[request].device)
        return torch.cat([self.prompts[request], response])

    def rollout(self, temperature: float, version: tuple[int, ...]) -> Rollout:
        """Put the records together. Raises FloatingPointError if the model produced numbers that are not finite."""
        device, lengths = self.prompts[0].device, [len(response) for response in self.tokens]
        owners = torch.tensor([request for requests, _ in self.draws for request in requests], dtype=torch.int64)
        order, empty = owners.argsort(stable=True), torch.zeros(0)
        columns = [list(column) for column in zip(*(draw for _, draw in self.draws), strict=True)] or [[empty]] * 5
        has_values = columns[4][0] is not None
        tokens, *records = (torch.cat(part)[order].to(device) for part in columns[: 4 + has_values])
        logprobs, entropies, kept_mass, *values = (record.float() for record in records)
        self._check_finite(logprobs, lengths)
        tokens = tokens.long()
        return Rollout(
            queries=tuple(self.prompts),
            responses=tuple(tokens.split(lengths)),
            tokens=tokens,
            logprobs=logprobs,
            entropies=entropies,
            kept_mass=kept_mass,
            values=values[0] if values else None,
            finished=torch.tensor([reason == "stop" for reason in self.reasons], dtype=torch.bool),
            reasons=tuple(self.reasons),
            requests=self.places.numbers,
            starts=self.places.starts,
            temperature=temperature,
            weight_version=version,
            token_edits=edits_of(tokens),
        )

    def _check_finite(self, logprobs: Tensor, lengths: Sequence[int]) -> None:
        broken = ~torch.isfinite(logprobs)
        if bool(broken.any()):
            starts = offsets_of(lengths)
            first = int(broken.nonzero()[0])
            request = int((starts <= first).sum()) - 1
            raise FloatingPointError(
                f"the model produced logits that are not finite ({int(broken.sum())} of {len(logprobs)} tokens, first "
                f"in prompt {request}); check the weights, and load the model in float32 or bfloat16, not float16"
            )

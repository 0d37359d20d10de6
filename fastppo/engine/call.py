"""One generate call under way, run to its end or streamed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.engine.paged import PagedDecoder
from fastppo.engine.prompts import check
from fastppo.engine.requests import Places, Requests
from fastppo.engine.windowed import WindowDecoder
from fastppo.models.exact import exact_linears
from fastppo.models.network import evaluating, weight_version
from fastppo.types import Rollout

OnResponse = Callable[[int, list[int]], None]


class Call:
    """The requests of a call and the decoder that serves them; `on_close` is told once that it is over."""

    def __init__(
        self,
        model: Any,
        requests: Requests,
        decoder: PagedDecoder | WindowDecoder,
        temperature: float,
        on_close: Callable[[], None],
        is_exact: bool = False,
    ):
        self.is_exact = is_exact
        self.model, self.requests, self.decoder, self.temperature = model, requests, decoder, temperature
        self.is_open, self._on_close = True, on_close
        # Now, for who reads a stream may have updated the weights before asking for its rollout.
        self._version = weight_version(model)

    def run(self, steps: int | None = None, on_response: OnResponse | None = None) -> None:
        """Run so many steps, or all; the model is as it was afterwards, and nothing stays allocated if one fails.

        `on_response` is told of each response that has ended: its place and its tokens.
        """
        going_on = list(range(len(self.requests.prompts)))
        try:
            exactness = exact_linears(self.model) if self.is_exact else nullcontext()
            with torch.no_grad(), evaluating(self.model), exactness, self.decoder.ready():
                while self.is_open and steps != 0:
                    is_going_on = self.decoder.step()
                    steps = None if steps is None else steps - 1
                    if on_response is not None:
                        going_on = self._tell(on_response, going_on)
                    if not is_going_on:
                        self.close(is_complete=True)
        except BaseException:
            self.close(is_complete=False)
            raise

    @property
    def is_extensible(self) -> bool:
        """Whether more requests can join: while something goes on, and with the paged cache."""
        return self.is_open and isinstance(self.decoder, PagedDecoder)

    @property
    def tokens_per_step(self) -> int:
        """The most tokens that a step draws for a response."""
        return self.decoder.tokens_per_step if isinstance(self.decoder, PagedDecoder) else 1

    def extend(self, prompts: Sequence[Tensor], limits: Sequence[int], places: Places) -> None:
        """Take in more requests, which go on where earlier ones of these numbers, kept and over, have ended.

        They come last in the call's list. Raises ValueError, as `Engine.generate` does, for what does not fit.
        """
        check(prompts, limits, self.model)
        assert isinstance(self.decoder, PagedDecoder)
        given = zip(prompts, limits, places.numbers, places.starts, strict=True)
        self.decoder.extend([self.requests.add(*request) for request in given])

    def _tell(self, on_response: OnResponse, going_on: list[int]) -> list[int]:
        """Tell of the responses that have ended of late; return the rest."""
        for request in going_on:
            if self.requests.reasons[request]:
                on_response(request, self.requests.tokens[request].tolist())
        return [request for request in going_on if not self.requests.reasons[request]]

    def close(self, *, is_complete: bool) -> None:
        """End what is still going on as cancelled, and give memory back."""
        if self.is_open:
            self.is_open = False
            self.requests.reasons = [reason or "cancelled" for reason in self.requests.reasons]
            self.decoder.close(is_complete)
            self._on_close()

    def rollout(self) -> Rollout:
        """Return what was drawn."""
        return self.requests.rollout(self.temperature, self._version)


class Event(NamedTuple):
    """One token of a stream, or the news that a request was cancelled."""

    request: int  # place in the call's list of responses
    token: int | None  # None if the request was cancelled
    text: str | None  # what the response's text gained; None without a tokenizer
    logprob: float
    reason: str  # why the response ended with this event, "stop", "length" or "cancelled"; empty while it goes on


class Stream:
    """Iterator over the events of a call. Closing it, at any time, ends what is still going on."""

    def __init__(self, call: Call, tokenizer: Any):
        self._call, self._tokenizer = call, tokenizer
        if isinstance(call.decoder, PagedDecoder):
            call.decoder.loop = None  # who reads along wants each token when it is drawn
        count = len(call.requests.prompts)
        self._events: deque[Event] = deque()
        self._num_draws = 0  # turned into events so far
        self._sent, self._texts, self._reported = [0] * count, [_Text() for _ in range(count)], [False] * count
        self._weights = self._edits()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        while not self._events:
            if not self._call.is_open:
                raise StopIteration
            if self._edits() != self._weights:
                self.close()
                raise RuntimeError("the weights were changed while a stream was open; close it before an update")
            self._call.run(steps=1)
            self._collect()
        return self._events.popleft()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the stream and drop the events that were not read; what is not finished counts as cancelled."""
        self._call.close(is_complete=True)
        self._events.clear()

    def rollout(self) -> Rollout:
        """Return everything drawn, as `Engine.generate` does; ends the stream."""
        self.close()
        return self._call.rollout()

    def _edits(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self._call.model.parameters()]

    def _collect(self) -> None:
        requests = self._call.requests
        for drawn, draw in requests.draws[self._num_draws :]:
            for request, logprob in zip(drawn, draw.logprobs.tolist(), strict=True):
                token = requests.tokens[request][self._sent[request]]
                self._sent[request] += 1
                is_last = self._sent[request] == len(requests.tokens[request])
                reason = requests.reasons[request] if is_last else ""
                self._reported[request] = bool(reason)
                self._events.append(Event(request, token, self._text(request, token, bool(reason)), logprob, reason))
        self._num_draws = len(requests.draws)
        for request, reason in enumerate(requests.reasons):
            if reason and not self._reported[request]:
                self._reported[request] = True
                self._events.append(Event(request, None, self._text(request, None, True), float("nan"), reason))

    def _text(self, request: int, token: int | None, is_last: bool) -> str | None:
        return None if self._tokenizer is None else self._texts[request].gain(self._tokenizer, token, is_last)


class _Text:
    """Turns tokens into text piece by piece, whole characters at a time."""

    def __init__(self) -> None:
        self._tokens: list[int] = []  # from the last piece on: what a token adds depends on the one before it
        self._old = 0  # how many of them have been shown
        self._shown = 0  # characters that were

    def gain(self, tokenizer: Any, token: int | None, is_last: bool) -> str:
        """Return the text that a token adds; nothing while a character is incomplete."""
        self._tokens += [] if token is None else [token]
        text: str = tokenizer.decode(self._tokens, skip_special_tokens=True)
        gained = text[self._shown :]
        if not gained or (text.endswith("\N{REPLACEMENT CHARACTER}") and not is_last):
            return ""
        self._tokens = self._tokens[self._old :]
        self._old = len(self._tokens)
        self._shown = len(tokenizer.decode(self._tokens, skip_special_tokens=True))
        return gained

"""Decoding for encoder-decoders: the encoder runs once over each distinct prompt, and so do the projections of what it
made to the keys and values that cross-attention reads; the decoder's own cache is the left-padded one.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from fastppo.engine.cache import WindowCache
from fastppo.engine.requests import Requests
from fastppo.engine.sampler import Sampler
from fastppo.engine.windowed import WindowDecoder
from fastppo.models.network import body
from fastppo.models.passes import length_groups
from fastppo.models.seq2seq import Encoded, decode, decoder_prefix, encode


class CrossCache(WindowCache):
    """The decoder's own cache and, beside it, the keys and values of the prompts: a row each, padded on the right."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = DynamicCache()
        self.prompt_lengths: list[int] = []
        self._mask: Tensor | None = None

    def admit_prompts(self, prompts: DynamicCache, lengths: list[int], rows: list[int], capacity: int) -> None:
        """Take the keys and values of prompts, right-padded if their lengths differ, into rows of `capacity` in all."""
        if not self.prompt_lengths:
            self.prompt_lengths = [1] * capacity  # a free row looks at one column, for nothing at all gives NaN
        for row, length in zip(rows, lengths, strict=True):
            self.prompt_lengths[row] = length
        self._mask = None
        width = max(lengths)
        for number, new in enumerate(prompts.layers):
            parts = [part[:, :, :width] for part in (new.keys, new.values)]
            if number == len(self.cross.layers):
                self.cross.update(*(part.new_zeros(capacity, *part.shape[1:]) for part in parts), number)
            layer, index = self.cross.layers[number], torch.tensor(rows, device=new.keys.device)
            spare = width - layer.keys.shape[2]
            if spare > 0:
                layer.keys, layer.values = (
                    torch.nn.functional.pad(part, (0, 0, 0, spare)) for part in (layer.keys, layer.values)
                )
            layer.keys[index, :, :width], layer.values[index, :, :width] = parts

    def prompt_mask(self, device: torch.device) -> Tensor:
        """Return the (rows, columns) int64 mask of cross-attention: 1 on the tokens of a row's prompt."""
        if self._mask is None:
            columns = torch.arange(self.cross.layers[0].keys.shape[2], device=device)
            self._mask = (columns < torch.tensor(self.prompt_lengths, device=device)[:, None]).long()
        return self._mask

    def keep(self, rows: list[int]) -> None:
        """Squeeze out all rows but these, in this order, and the columns that none of them needs."""
        super().keep(rows)
        self.prompt_lengths = [self.prompt_lengths[row] for row in rows]
        self._mask = None
        for layer in self.cross.layers:
            index = torch.tensor(rows, device=layer.keys.device)
            layer.keys, layer.values = (
                part[index, :, : max(self.prompt_lengths)] for part in (layer.keys, layer.values)
            )


@dataclass(frozen=True, eq=False)
class _Started:
    """Some prompts after their first pass: encoder, and decoder over the tokens that it begins with."""

    own: DynamicCache
    cross: DynamicCache
    hidden: Tensor  # (P, H), from which the first tokens of responses are drawn
    lengths: list[int]


class CrossDecoder(WindowDecoder):
    """One generate call of an encoder-decoder. Decoders that count their positions by the cache get each row's own."""

    cache_type = CrossCache
    cache: CrossCache

    def __init__(self, model: Any, requests: Requests, sampler: Sampler, max_rows: int, prefill_tokens: int = 2048):
        super().__init__(model, requests, sampler, max_rows)
        prefix = decoder_prefix(model)
        assert prefix is not None
        self.prefix, self.prefill_tokens = prefix.to(self.device), prefill_tokens
        # Requests with the same prompt have the number of the first of them.
        numbers: dict[tuple[int, ...], int] = {}
        ids = torch.cat(requests.prompts).cpu().split([len(prompt) for prompt in requests.prompts])
        self._numbers = [numbers.setdefault(tuple(prompt.tolist()), i) for i, prompt in enumerate(ids)]
        self._waiting = Counter(self._numbers)
        self._started: dict[int, tuple[_Started, int]] = {}  # of prompts for which requests wait: pass, and row in it

    def close(self, is_complete: bool) -> None:
        """Let go of the caches."""
        super().close(is_complete)
        self._started.clear()

    def _admit(self) -> None:
        """Seat waiting requests in free rows, run the prompts that are new among theirs, and draw first tokens."""
        seats = list(zip(*self.rows.admit(), strict=True))
        self._start_new([self._numbers[request] for request, _ in seats])
        by_pass: dict[int, list[tuple[int, int]]] = {}
        for request, row in seats:
            by_pass.setdefault(id(self._started[self._numbers[request]][0]), []).append((request, row))
        for seated in by_pass.values():
            self._seat(*(list(part) for part in zip(*seated, strict=True)))
        self._waiting.subtract(self._numbers[request] for request, _ in seats)
        self._started = {number: found for number, found in self._started.items() if self._waiting[number] > 0}

    def _start_new(self, numbers: list[int]) -> None:
        """Run those of these prompts that were not yet, and while at it some of those that are next."""
        new = dict.fromkeys(number for number in numbers if number not in self._started)
        tokens = sum(len(self.requests.prompts[number]) for number in new)
        for request in self.rows.waiting if new else ():
            number = self._numbers[request]
            tokens += 0 if number in new or number in self._started else len(self.requests.prompts[number])
            if tokens > self.prefill_tokens:
                break
            if number not in self._started:
                new[number] = None
        found = list(new)
        lengths = [len(self.requests.prompts[number]) for number in found]
        for group in length_groups(lengths, max(1, len(found)), max_tokens=self.prefill_tokens):
            self._start([found[i] for i in group])

    def _start(self, numbers: list[int]) -> None:
        """Run the encoder over prompts, and the decoder over its first tokens."""
        prompts = [self.requests.prompts[number] for number in numbers]
        both = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = self.prefix.expand(len(prompts), -1)
        hidden = decode(self.model, ids, encode(self.model, prompts), past_key_values=both, use_cache=True)[:, -1]
        lengths = [len(prompt) for prompt in prompts]
        started = _Started(both.self_attention_cache, both.cross_attention_cache, hidden, lengths)
        self._started |= {number: (started, place) for place, number in enumerate(numbers)}
        self._counts["prefill_tokens"] += sum(lengths)

    def _seat(self, requests: list[int], rows: list[int]) -> None:
        """Give requests whose prompts were run in one pass their rows, and draw their first tokens."""
        found = [self._started[self._numbers[request]] for request in requests]
        started, places = found[0][0], [place for _, place in found]
        capacity, lengths = len(self.rows.occupants), [started.lengths[place] for place in places]
        self.cache.admit(_rows_of(started.own, places), [len(self.prefix)] * len(rows), rows, capacity)
        self.cache.admit_prompts(_rows_of(started.cross, places), lengths, rows, capacity)
        self._draw(started.hidden[places], requests, rows)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        both = EncoderDecoderCache(cache, cache.cross)
        prompt_mask = cache.prompt_mask(self.device)
        # Only the shape of the encoder's states is looked at where their keys and values are there.
        states = cache.cross.layers[0].keys.new_zeros(1).expand(*prompt_mask.shape, 1)
        with self._positions(positions):
            return decode(
                self.model,
                ids,
                Encoded(states, prompt_mask),
                attention_mask=mask,
                past_key_values=both,
                use_cache=True,
            )[:, -1]

    def _positions(self, positions: Tensor) -> AbstractContextManager[None]:
        return _placed(body(self.model), positions)


def _rows_of(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """Return a cache of some rows of another."""
    taken = DynamicCache()
    for number, layer in enumerate(cache.layers):
        taken.update(layer.keys[list(rows)], layer.values[list(rows)], number)
    return taken


@contextmanager
def _placed(decoder: Any, positions: Tensor) -> Iterator[None]:
    """Give a decoder with a table of positions each row's own (B, T) inside; it would count columns of the cache.

    Relative positions are right in any case: rows end together.
    """
    table = getattr(decoder, "embed_positions", None)
    signature = None if table is None else inspect.signature(table.forward)
    if table is None or signature is None or "position_ids" not in signature.parameters:
        yield
        return

    def choose(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = signature.bind(*args, **kwargs)
        given.arguments["position_ids"] = positions.flatten()
        return given.args, given.kwargs

    def shape(_: Any, __: Any, output: Tensor) -> Tensor:
        return output.reshape(*positions.shape, output.shape[-1])

    handles = table.register_forward_pre_hook(choose, with_kwargs=True), table.register_forward_hook(shape)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class WaveDecoder(CrossDecoder):
    """For decoders whose positions cannot be chosen: all rows start together, so that their own count is right."""

    tier = "C"

    def _may_admit(self) -> bool:
        return self.rows.has_room and not self.rows.active

    def _positions(self, positions: Tensor) -> AbstractContextManager[None]:
        return nullcontext()

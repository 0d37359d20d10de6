"""Which way of generating is right for a model, and the fastest of those: tiers A to D, found by a numeric probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.engine.own_cache import StateDecoder, WholeDecoder
from fastppo.engine.requests import Draw, Places, Requests
from fastppo.engine.seq2seq import CrossDecoder, WaveDecoder
from fastppo.engine.stopping import Stopping
from fastppo.engine.windowed import WindowDecoder
from fastppo.models import probe
from fastppo.models.network import causal_lm, is_encoder_decoder
from fastppo.models.probe import Verdict
from fastppo.models.probe_runs import sources_of
from fastppo.models.seq2seq import decoder_prefix

# From fast to slow; D is the model's own forward of whole sequences, which needs no proof.
_DECODERS: dict[str, type[WindowDecoder]] = {"B": WindowDecoder, "C": StateDecoder, "D": WholeDecoder}
_SEQ2SEQ_DECODERS: dict[str, type[WindowDecoder]] = {"B": CrossDecoder, "C": WaveDecoder}
_REPLAYED = 6  # tokens at a sequence's end that a decoder has to find its way through


@dataclass(frozen=True)
class Capabilities:
    """How a model generates: "A" on the paged cache, "B" on a left-padded one, "C" by states, "D" without a cache.

    Of an encoder-decoder it is the decoder's cache, and "C" are responses that start together.
    """

    tier: str
    verdict: Verdict  # on that tier
    refused: Mapping[str, str]  # why the faster tiers are not right


def capabilities(model: Any) -> Capabilities:
    """Return the fastest tier that gives the model's own log-probs, which is tried by decoding random sequences.

    Raises FloatingPointError if its own log-probs are not finite, and NotImplementedError if no tier gives them.
    """
    found = probe.paged(model)
    refused: dict[str, str] = {}
    for tier, decoder in _decoders(model).items():
        previous = chr(ord(tier) - 1)
        if found:
            return Capabilities(previous, found, refused)
        refused[previous] = found.reason
        found = probe.verdict(model, tier, _replay(decoder))
    return Capabilities(tier, found if tier == "D" else _required(model, found), refused)


def slower_decoder(model: Any, prefill_tokens: int) -> Callable[..., WindowDecoder]:
    """Return the fastest right decoder of those that do not page; an encoder reads `prefill_tokens` in a pass.

    Raises NotImplementedError for a model that none is right for.
    """
    for tier, kind in _decoders(model).items():
        found = probe.verdict(model, tier, _replay(kind))
        if found or tier == "D":
            break
    else:
        _required(model, found)
    return partial(kind, prefill_tokens=prefill_tokens) if issubclass(kind, CrossDecoder) else kind


def _required(model: Any, verdict: Verdict) -> Verdict:
    if not verdict:
        raise NotImplementedError(f"{type(causal_lm(model)).__name__} cannot generate with fastppo: {verdict.reason}")
    return verdict


def _decoders(model: Any) -> dict[str, type[WindowDecoder]]:
    return _SEQ2SEQ_DECODERS if is_encoder_decoder(model) else _DECODERS


class _Replay:
    """Stands for the sampler: hands out the tokens of given sequences from `starts` on, and keeps the hidden states
    before them.
    """

    def __init__(self, sequences: Sequence[Tensor], starts: Sequence[int]):
        self.sequences, self.starts = sequences, starts
        self.hidden: list[list[Tensor]] = [[] for _ in sequences]

    def draw(self, hidden: Tensor, requests: Sequence[int]) -> Draw:
        tokens = []
        for state, request in zip(hidden, requests, strict=True):
            place = self.starts[request] + len(self.hidden[request])
            tokens.append(self.sequences[request][min(place, len(self.sequences[request]) - 1)])
            self.hidden[request].append(state)
        zeros = torch.zeros(len(tokens), device=hidden.device)
        return Draw(torch.stack(tokens), zeros, zeros, zeros, None)


def _replay(decoder: type[WindowDecoder]) -> Callable[[Any, Sequence[Tensor]], list[Tensor]]:
    """Return a run of the probe on a decoder with fewer rows than sequences, so that one of them joins late."""

    def run(model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
        prefix, numbers = decoder_prefix(model), tuple(range(len(sequences)))
        if prefix is None:
            starts = [len(ids) - min(_REPLAYED + number, len(ids) - 1) for number, ids in enumerate(sequences)]
            prompts = [ids[:start] for ids, start in zip(sequences, starts, strict=True)]
        else:
            starts, prompts = [len(prefix)] * len(sequences), sources_of(sequences)
        limits = [len(ids) - start + 1 for ids, start in zip(sequences, starts, strict=True)]
        stopping = Stopping(SamplingConfig(stop_ids=()), frozenset(), None)
        requests = Requests(prompts, limits, 0, Places(numbers, (0,) * len(prompts), numbers), stopping)
        sampler: Any = _Replay(sequences, starts)
        running = decoder(model, requests, sampler, 2)
        with running.ready():
            while running.step():
                pass
        return [torch.stack(states) for states in sampler.hidden]

    return run

"""Which way of generating is right for a model, and the fastest of those: tiers A to D, found by a numeric probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.engine.own_cache import StateDecoder, WholeDecoder
from fastppo.engine.requests import Draw, Places, Requests
from fastppo.engine.stopping import Stopping
from fastppo.engine.windowed import WindowDecoder
from fastppo.models import probe
from fastppo.models.probe import Verdict

# From fast to slow; the last is the model's own forward of whole sequences, which needs no proof.
_DECODERS: dict[str, type[WindowDecoder]] = {"B": WindowDecoder, "C": StateDecoder, "D": WholeDecoder}
_REPLAYED = 6  # tokens at a sequence's end that a decoder has to find its way through


@dataclass(frozen=True)
class Capabilities:
    """How a model generates: "A" on the paged cache, "B" on a left-padded one, "C" by states, "D" without a cache."""

    tier: str
    verdict: Verdict  # on that tier
    refused: Mapping[str, str]  # why the faster tiers are not right


def capabilities(model: Any) -> Capabilities:
    """Return the fastest tier that gives the model's own log-probs. Raises FloatingPointError if those are not finite.

    Every tier is tried once for a model, by decoding random sequences on it.
    """
    found = probe.paged(model)
    refused: dict[str, str] = {}
    for tier, decoder in _DECODERS.items():
        previous = chr(ord(tier) - 1)
        if found:
            return Capabilities(previous, found, refused)
        refused[previous] = found.reason
        found = probe.verdict(model, tier, _replay(decoder))
    return Capabilities("D", found, refused)


def slower_decoder(model: Any) -> type[WindowDecoder]:
    """Return the fastest right decoder of those that do not page."""
    return next(kind for tier, kind in _DECODERS.items() if probe.verdict(model, tier, _replay(kind)) or tier == "D")


class _Replay:
    """Stands for the sampler: hands out the tokens of given sequences, and keeps the hidden states before them."""

    def __init__(self, requests: Requests, sequences: Sequence[Tensor]):
        self.requests, self.sequences = requests, sequences
        self.hidden: list[list[Tensor]] = [[] for _ in sequences]

    def draw(self, hidden: Tensor, requests: Sequence[int]) -> Draw:
        tokens = []
        for state, request in zip(hidden, requests, strict=True):
            place = len(self.requests.prompts[request]) + len(self.hidden[request])
            tokens.append(self.sequences[request][min(place, len(self.sequences[request]) - 1)])
            self.hidden[request].append(state)
        zeros = torch.zeros(len(tokens), device=hidden.device)
        return Draw(torch.stack(tokens), zeros, zeros, zeros, None)


def _replay(decoder: type[WindowDecoder]) -> Callable[[Any, Sequence[Tensor]], list[Tensor]]:
    """Return a run of the probe on a decoder with fewer rows than sequences, so that one of them joins late."""

    def run(model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
        ends = [min(_REPLAYED + number, len(ids) - 1) for number, ids in enumerate(sequences)]
        prompts = [ids[: len(ids) - end] for ids, end in zip(sequences, ends, strict=True)]
        numbers = tuple(range(len(prompts)))
        stopping = Stopping(SamplingConfig(stop_ids=()), frozenset(), None)
        requests = Requests(
            prompts, [end + 1 for end in ends], 0, Places(numbers, (0,) * len(prompts), numbers), stopping
        )
        sampler: Any = _Replay(requests, sequences)
        running = decoder(model, requests, sampler, 2)
        with running.ready():
            while running.step():
                pass
        return [torch.stack(states) for states in sampler.hidden]

    return run

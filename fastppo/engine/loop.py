"""Decode steps and their draws on the CPU, many as one C++ call: Python takes a tenth of the time of small models."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engine.requests import Draw
from fastppo.engine.sampler import Sampler
from fastppo.engine.steps import DecodeStep, ProgramStep
from fastppo.ops.matmul import head_arguments, readable
from fastppo.ops.sampling import row_arguments

_MOST = 16
# Weights that are read before anybody looks again, for a cancellation or an interrupt waits as long. Python takes a
# millisecond of a step, in which ten or twenty megabytes are read.
_BYTES_AT_ONCE = 2**31


class Loop:
    """Draws up to `most` tokens for each row before the scheduler is asked again, or until one ends its response."""

    def __init__(self, step: ProgramStep, sampler: Sampler, most: int):
        self._step, self._sampler, self.most = step, sampler, most

    def draws(self, ids: Tensor, positions: Tensor, sequences: Tensor, places: Tensor, steps: int) -> list[Draw]:
        """Run steps from the last tokens (N,) on; return what each of them drew.

        `positions` and `sequences` are (N,) int32, `places` (3, N) is as `Requests.next_places` gives it, and there
        must be blocks for so many steps.
        """
        sampler, head = self._sampler, self._sampler.head
        requests, starts, drawn = places
        logits, ends = sampler.logits.buffer[: len(ids)], sampler.end_ids
        weight, bias = readable(head.weight, head.bias)
        forbidden = ends if sampler.is_early(int(drawn.min())) else None
        numbers = (sampler.requests.seed, requests, starts)
        rows = row_arguments(logits, numbers, sampler.scaling, sampler.limits, (forbidden, None))
        bounds = (drawn.data_ptr(), sampler.sampling.min_new_tokens, ends.data_ptr(), len(ends))
        hidden = torch.empty(steps, len(ids), weight.shape[1])
        tokens, records = torch.empty(steps, len(ids), dtype=torch.int64), torch.empty(3, steps, len(ids))
        out = tuple(part.data_ptr() for part in (tokens, *records))
        place = head_arguments(weight, bias, logits)
        count = self._step.loop(ids, positions, sequences, hidden, place, rows, bounds, out)
        values = sampler.values(hidden[:count].flatten(0, 1).to(weight.dtype))
        each = [None] * count if values is None else values.view(count, -1)
        return [Draw(*parts) for parts in zip(tokens[:count], *records[:, :count], each, strict=True)]


def loop_of(step: DecodeStep | None, sampler: Sampler) -> Loop | None:
    """Return a loop where there is a program and nothing but C++ is needed from one token to the next."""
    if not isinstance(step, ProgramStep) or not sampler.logits.is_native or sampler.is_exact:
        return None
    vocabulary, width = sampler.head.weight.shape
    if sampler.requests.stopping.strings or vocabulary > step.vocabulary or width != step.hidden_size:
        return None
    most = min(_MOST, _BYTES_AT_ONCE // max(1, step.num_bytes))
    return Loop(step, sampler, most) if most > 1 else None

"""Decode steps on CUDA as graphs: one launch in place of hundreds, which take longer than what they compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.engine.kv import PagedCache
from fastppo.engine.slots import Slots
from fastppo.engine.steps import module_step
from fastppo.models.network import causal_lm

Replay = Callable[[], object]


class _Graph(NamedTuple):
    inputs: tuple[Tensor, Tensor, Tensor]  # ids, positions, sequences (R,), where the graph reads them
    hidden: Tensor  # (R, H), where it writes
    replay: Replay


class GraphStep:
    """`module_step` for rows that decode, one token each, with a graph for each of a few numbers of rows.

    A graph is captured when its number of rows comes up for the second time, so that everything is compiled by then
    and rare numbers cost nothing. It reads weights, blocks and tables where they lie: those may change, but where one
    of them moves graphs are captured anew. Which adapter is on is a matter of what lies in its slots. A model that
    cannot be captured runs as it is.
    """

    name = "graphs"

    def __init__(self, model: Any, cache: PagedCache):
        self._model, self._cache = model, cache
        self._slots = Slots(model, cache.like.dtype)
        self._graphs: dict[int, _Graph | None] = {}  # None: seen once
        self._weights: tuple[object, ...] = ()
        self._places: tuple[object, ...] = ()
        self._pool: Any = None
        self.is_capturable = True
        self.captures = 0

    def refresh(self) -> bool:
        """Look where the weights are now, and write the adapters that are on; the graphs can always be run."""
        inner = causal_lm(self._model)
        tensors = [*inner.parameters(), *inner.buffers()]
        weights = (*(tensor.data_ptr() for tensor in tensors), *self._slots.write())
        if weights != self._weights:
            self._weights = weights
            self._graphs.clear()
        return True

    def __call__(self, ids: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        """Return the last hidden states (T, H); they are overwritten by the next step."""
        places = self._cache.addresses()
        if places != self._places:
            self._places = places
            self._graphs.clear()
        rows = padded_rows(len(ids))
        if self.is_capturable and rows in self._graphs:
            graph = self._graphs[rows] or self._try_capture(rows, (ids, positions, sequences))
            if graph is not None:
                _fill(graph.inputs, (ids, positions, sequences))
                graph.replay()
                return graph.hidden[: len(ids)]
        self._graphs.setdefault(rows, None)
        return module_step(self._model, self._cache, ids, positions, sequences)

    def _try_capture(self, rows: int, like: tuple[Tensor, Tensor, Tensor]) -> _Graph | None:
        inputs = (like[0].new_zeros(rows), like[1].new_zeros(rows), like[2].new_zeros(rows))
        _fill(inputs, like)
        try:
            hidden, replay = self._capture(lambda: self._run_with_slots(*inputs))
        except RuntimeError as error:
            self.is_capturable = False
            warnings.warn(
                f"{type(causal_lm(self._model)).__name__} cannot be captured as a CUDA graph and is decoded launch by "
                f"launch, which is slower: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
            return None
        self.captures += 1
        graph = self._graphs[rows] = _Graph(inputs, hidden, replay)
        return graph

    def _run_with_slots(self, ids: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        with self._slots.serving():
            return module_step(self._model, self._cache, ids, positions, sequences)

    def _capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """Capture a run; return where its result will be, and what runs it."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # shared, since no two graphs run at a time
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do on the device, such as scoring rewards, does not break the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = run()
        return hidden, graph.replay


def _fill(inputs: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    """Copy the values (T,) into inputs (R,). The rows beyond repeat the last: they store what it stores, once more."""
    for target, value in zip(inputs, values, strict=True):
        target[: len(value)] = value
        target[len(value) :] = value[-1]


def padded_rows(rows: int) -> int:
    """Return the least number from `rows` up that has a graph: a power of two or the middle between two, from 8 on."""
    power = max(8, 1 << (rows - 1).bit_length())
    return power * 3 // 4 if power > 8 and rows <= power * 3 // 4 else power

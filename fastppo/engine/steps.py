"""One forward pass over tokens of paged sequences: through a model's modules, or through its C++ program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastppo.attention import Paged, attending
from fastppo.engine.kv import PagedCache
from fastppo.engine.program import build_program
from fastppo.engine.tracing import UnsupportedModelError
from fastppo.models import probe
from fastppo.models.attach import attached
from fastppo.models.network import causal_lm, last_hidden
from fastppo.models.passes import passing, sequence_hidden


def module_step(model: Any, cache: PagedCache, ids: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
    """Store keys and values of tokens (T,) of an attached model and return their last hidden states (T, H).

    `positions` and `sequences`, rows of the block tables, are (T,) int32; tokens of a sequence are neighbours.
    """
    with attending(Paged(sequences, positions, cache.layers())):
        return last_hidden(model, input_ids=ids[None], position_ids=positions[None].long(), use_cache=False)[0]


class DecodeStep(Protocol):
    """Another way to run `module_step` where every token is the last of its sequence."""

    name: str

    def refresh(self) -> bool:
        """Look where the weights are now and which adapters are on; return whether it can run them."""

    def __call__(self, ids: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        """Return the last hidden states (T, H), in the model's dtype."""


class ProgramStep:
    """The same through the program. Raises NotImplementedError for models that have none, with the reason."""

    name = "program"

    def __init__(self, model: Any, cache: PagedCache):
        program, reason = build_program(model)
        if program is None:
            raise NotImplementedError(reason)
        self._program, self._cache, self.may_be_exact = program, cache, program.may_be_exact
        self._groups = [cache.windows.index(window or None) for window in program.windows]

    def refresh(self) -> bool:
        """Look where the weights are now and which adapters are on; return whether the program can run them."""
        try:
            self._program.refresh()
        except UnsupportedModelError:
            return False
        return True

    def __call__(self, ids: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        """Return the last hidden states (T, H), in the model's dtype."""
        hidden: Tensor = self._program.step(ids, positions, sequences, *self._memory())
        return hidden.to(self._cache.like.dtype)

    def loop(self, ids: Tensor, positions: Tensor, sequences: Tensor, hidden: Tensor, *drawing: Any) -> int:
        """Do `Program.loop` on the cache."""
        return self._program.loop(ids, positions, sequences, *self._memory(), hidden, *drawing)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that a step reads but the cache."""
        return self._program.num_bytes

    @property
    def vocabulary(self) -> int:
        """Tokens that have an embedding."""
        return self._program.vocabulary

    @property
    def hidden_size(self) -> int:
        """Columns of the last hidden states."""
        return self._program.hidden_size

    def _memory(self) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Return the tables of each window, as they are now, and the pools of each layer."""
        self._cache.layers()
        return [self._cache.tables[group] for group in self._groups], list(self._cache.pools.values())


def program_step(model: Any, cache: PagedCache) -> ProgramStep | None:
    """Return the program's step if there is one, and if beside the modules it gives the model's own log-probs."""
    if cache.like.device.type != "cpu" or not probe.verdict(model, "program", _mixed):
        return None
    try:
        return ProgramStep(model, cache)
    except NotImplementedError:  # a part was replaced since the verdict
        return None


def exact_program_step(model: Any, cache: PagedCache) -> ProgramStep | None:
    """Return the program's step if its results are the update's to the last bit. For use inside of `exact_linears`."""
    step = program_step(model, cache)
    if step is None or not step.may_be_exact or not probe.is_same(model, "exact program", _mixed, _updated):
        return None
    return step


def _updated(model: Any, sequences: Sequence[Tensor]) -> Sequence[Tensor]:
    """Run the sequences as the update does."""
    with passing(model):
        hidden, _ = sequence_hidden(model, sequences)
    return list(torch.split(hidden, [len(ids) for ids in sequences]))


def _mixed(model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Run the first half of each sequence through the modules and the rest, side by side, through the program."""
    lengths = [len(ids) for ids in sequences]
    cache = PagedCache(probe.layer_shapes(model), causal_lm(model).get_input_embeddings().weight, None)
    ledger = cache.take(lengths, len(lengths), max(lengths))
    step, helds, hidden = ProgramStep(model, cache), [ledger.open() for _ in sequences], []
    for held, ids in zip(helds, sequences, strict=True):
        ledger.extend(held, len(ids) // 2)
        positions = torch.arange(len(ids) // 2, dtype=torch.int32)
        with attached(model):
            hidden.append([module_step(model, cache, ids[: len(positions)], positions, positions * 0 + held.slot)])
    for position in range(max(lengths)):
        rows = [row for row, length in enumerate(lengths) if length // 2 <= position < length]
        for row in rows:
            ledger.extend(helds[row], position + 1)
        ids = torch.tensor([int(sequences[row][position]) for row in rows], dtype=torch.int64)
        slots = torch.tensor([helds[row].slot for row in rows], dtype=torch.int32)
        for row, state in zip(rows, step(ids, torch.full_like(slots, position), slots), strict=True):
            hidden[row].append(state[None])
    return [torch.cat(parts) for parts in hidden]

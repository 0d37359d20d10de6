"""Adapters for steps that are captured: each LoRA layer has one slot, and to switch adapters is to write the slots.

A captured step reads what lies in the slots, whichever adapter that came from, so one graph serves policy, critic,
reward model and base. They hold the matrices in the dtype of the activations, so that no step converts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastppo.models import lora


class _Slot(NamedTuple):
    down: Tensor  # (R, K), R being the largest rank that was needed so far
    up: Tensor  # (N, R), its columns multiplied by the adapter's scale
    forward: partial[Tensor]  # the same object always: what is compiled remembers it


class Slots:
    """The slots of a model; layers whose adapters are more than B·A compute as PEFT lets them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self._model, self._dtype = model, dtype
        self._slots: dict[Any, _Slot] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """All slots."""
        return [part for slot in self._slots.values() for part in (slot.down, slot.up)]

    @torch.no_grad()
    def write(self) -> tuple[object, ...]:
        """Write the adapters that are on; return what a captured step depends on beside the numbers in the slots.

        No adapter at all is zeros.
        """
        known, self._slots = self._slots, {}
        depends: list[object] = []
        sources: list[tuple[Tensor, Tensor]] = []  # a part of a slot, and what it is to hold
        # transformers' own models have methods of this name.
        layers: list[Any] = [m for m in self._model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
        for layer in layers:
            names = None if lora.find_layer(layer) is None else lora.plain_adapters(layer)
            if names is None:
                depends.append((layer.disable_adapters, tuple(layer.active_adapters)))
                continue
            slot = self._slots[layer] = self._slot(layer, known.get(layer), sum(layer.r[name] for name in names))
            sources += _sources(layer, names, slot)
            depends += [slot.down.data_ptr(), slot.up.data_ptr()]
        if self._slots:
            torch._foreach_zero_(self.tensors)
        if sources:
            torch._foreach_copy_([target for target, _ in sources], [source for _, source in sources])
        return tuple(depends)

    def _slot(self, layer: Any, slot: _Slot | None, rank: int) -> _Slot:
        """Return the slot of a layer, a larger one if it has too little room."""
        rank = max(rank, *layer.r.values())
        if slot is not None and len(slot.down) >= rank:
            return slot
        like = next(iter(layer.lora_A.values())).weight
        down = like.new_empty(rank, layer.in_features, dtype=self._dtype)
        up = like.new_empty(layer.out_features, rank, dtype=self._dtype)
        return _Slot(down, up, partial(_run, layer.base_layer, down, up))

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Let every layer that has a slot compute with it inside."""
        replaced: list[tuple[dict[str, Any], Any]] = []
        try:
            for layer, slot in self._slots.items():
                replaced.append((vars(layer), vars(layer).get("forward")))
                vars(layer)["forward"] = slot.forward
            yield
        finally:
            for attributes, before in replaced:
                del attributes["forward"]
                if before is not None:
                    attributes["forward"] = before


def _run(base_layer: Any, down: Tensor, up: Tensor, x: Tensor, *, adapter_names: Any = None) -> Tensor:
    """Return (..., N) of x (..., K): the base layer's output plus what a slot adds."""
    if adapter_names is not None:
        raise ValueError(
            f"adapter_names={adapter_names!r} asks for an adapter of its own for each row; a captured step has one for "
            "all of them: run the rows of each adapter in a call of their own"
        )
    out = base_layer(x)
    low_rank = x.reshape(-1, x.shape[-1]) @ down.t()
    return torch.addmm(out.reshape(-1, out.shape[-1]), low_rank, up.t()).view(out.shape)


def _sources(layer: Any, names: list[str], slot: _Slot) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of a slot, adapter below adapter, and what they are to hold."""
    start = 0
    for name in names:
        stop = start + layer.r[name]
        yield slot.down[start:stop], layer.lora_A[name].weight
        yield slot.up[:, start:stop], layer.lora_B[name].weight * layer.scaling[name]
        start = stop

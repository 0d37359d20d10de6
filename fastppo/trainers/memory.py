"""What the storages of a trainer are for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastppo.models.reference import REFERENCE_ADAPTER
from fastppo.models.storages import Census, MemoryReport, named_tensors
from fastppo.ops.chunks import LogitBuffer

_BASE, _HEAD = "base", "value head"


def memory_report(trainer: Any) -> MemoryReport:
    """Return every storage that the trainer holds, and those of all other tensors of the process, each once.

    What autograd alone holds between a forward and a backward pass cannot be seen.
    """
    census = Census()
    _count_network(census, trainer)
    if trainer.ref_model is not None:
        census.add("reference copy", "reference", named_tensors(trainer.ref_model))
    parameters = dict(trainer.model.named_parameters())
    census.add("gradients", "update", ((name, p.grad) for name, p in parameters.items() if p.grad is not None))
    states = list(_optimiser_tensors(trainer.optimizer, parameters))
    census.add("fp32 masters", "update", (state for state in states if state[0].endswith(".master")))
    census.add("optimiser state", "update", states)
    census.add("KV cache", "rollout", ((f"kv.{i}", part) for i, part in enumerate(trainer.engine.kv_tensors)))
    buffers = [thing for thing in gc.get_objects() if type(thing) is LogitBuffer]
    census.add("logits", "rollout and update", (("logits", part) for buffer in buffers for part in buffer.parts))
    census.add_others()
    return census.report()


def _count_network(census: Census, trainer: Any) -> None:
    """Count the network by its parts; without a model of its own the reference is the base with another adapter."""
    adapters = list(getattr(trainer.model.pretrained_model, "peft_config", ()))
    policy = next((name for name in adapters if name != REFERENCE_ADAPTER), None)
    parts: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in named_tensors(trainer.model):
        parts.setdefault(_part_of(name, adapters), []).append((name, tensor))
    owners = {policy: "policy adapter", REFERENCE_ADAPTER: "reference adapter"}
    users = {policy: ("policy", "critic"), REFERENCE_ADAPTER: ("reference",), _HEAD: ("critic",)}
    users[_BASE] = ("policy", "critic") if trainer.ref_model is not None else ("policy", "reference", "critic")
    for part, tensors in parts.items():
        owner = owners.get(part, f"adapter {part}" if part in adapters else part)
        for user in users.get(part, (part,)):
            census.add(owner, user, tensors)


def _part_of(name: str, adapters: list[str]) -> str:
    """Return the adapter that a tensor belongs to, or value head or base."""
    if name.startswith("v_head."):
        return _HEAD
    return next((part for part in reversed(name.split(".")) if part in adapters), _BASE)


def _optimiser_tensors(optimizer: Any, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                yield f"{names.get(id(parameter), 'other')}.{key}", value

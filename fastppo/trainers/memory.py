"""What the storages of a trainer are for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastppo.engine.slots import Slots
from fastppo.models.critic import CRITIC, critic_kind
from fastppo.models.reference import REFERENCE_ADAPTER
from fastppo.models.storages import Census, MemoryReport, named_tensors
from fastppo.ops.chunks import LogitBuffer

_BASE, _HEAD, _CRITIC, _SCORE = "base", "value head", "critic network", "score head"


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
    slots = [part for thing in gc.get_objects() if type(thing) is Slots for part in thing.tensors]
    census.add("adapter slots", "rollout", (("slot", part) for part in slots))
    buffers = [thing for thing in gc.get_objects() if type(thing) is LogitBuffer]
    census.add("logits", "rollout and update", (("logits", part) for buffer in buffers for part in buffer.parts))
    census.add_others()
    return census.report()


def _count_network(census: Census, trainer: Any) -> None:
    """Count the network by its parts, with who uses each: the base is everybody's who has no network of his own."""
    model, kind = trainer.model, critic_kind(trainer.model)
    adapters = list(getattr(model.pretrained_model, "peft_config", ()))
    others = (REFERENCE_ADAPTER, CRITIC, model.reward_adapter_name)
    policy = next((name for name in adapters if name not in others), None)
    everybody = {
        "policy": True,
        "reference": trainer.ref_model is None,
        "critic": kind != "full",
        "reward": model.reward_adapter_name is not None,
    }
    owners = {
        policy: ("policy adapter", ("policy", "critic") if kind == "head" else ("policy",)),
        REFERENCE_ADAPTER: ("reference adapter", ("reference",)),
        CRITIC: ("critic adapter", ("critic",)),
        model.reward_adapter_name: ("reward adapter", ("reward",)),
        _HEAD: (_HEAD, ("critic",)),
        _CRITIC: (_CRITIC, ("critic",)),
        _SCORE: ("reward adapter", ("reward",)),
        _BASE: (_BASE, tuple(user for user, uses_it in everybody.items() if uses_it)),
    }
    parts: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in named_tensors(model):
        parts.setdefault(_part_of(name, adapters), []).append((name, tensor))
    for part, tensors in parts.items():
        owner, users = owners.get(part, (f"adapter {part}", (part,)))
        for user in users:
            census.add(owner, user, tensors)


def _part_of(name: str, adapters: list[str]) -> str:
    """Return the adapter that a tensor belongs to, or what else of the model it is part of."""
    heads = {"v_head.": _HEAD, "critic.": _CRITIC, "score.": _SCORE}
    head = next((part for prefix, part in heads.items() if name.startswith(prefix)), _BASE)
    return next((part for part in reversed(name.split(".")) if part in adapters), head)


def _optimiser_tensors(optimizer: Any, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                yield f"{names.get(id(parameter), 'other')}.{key}", value

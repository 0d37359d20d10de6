"""The memory that a run is expected to take, beside what it takes."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from fastppo.engine.kv import free_bytes
from fastppo.monitor.memory import Growth
from fastppo.planner import Work
from fastppo.planner.network import twin
from fastppo.trainers.rehearsal import Rehearsal


class Forecast:
    """The plan of a trainer's steps with the longest prompt and response, made before the first of them.

    Warns if it does not fit. Raises NotImplementedError for a model that cannot be rehearsed.
    """

    def __init__(self, trainer: Any, prompt: int, response: int):
        device, engine = trainer.current_device, trainer.engine
        network = twin(trainer.model, trainer.ref_model)
        state = [part for entries in trainer.optimizer.state.values() for part in entries.values()]
        known = [tensor for tensors in network.tensors().values() for tensor in tensors]
        self._held = _bytes([*known, *(part for part in state if isinstance(part, Tensor))])
        memory = free_bytes(device) + self._held
        limits = engine.kv_memory, engine.max_rows, engine.prefill_tokens
        work = Work(prompt, response, trainer.config, device.type, memory, *limits)
        self.plan = Rehearsal(network).plan(work)
        if self.plan.peak > memory:
            warnings.warn(
                f"a step is expected to take {self.plan.peak / 1e9:.2f} GB ({self.plan.worst_phase}), and there are "
                f"{memory / 1e9:.2f} GB; `fastppo plan` finds settings that fit",
                stacklevel=4,
            )
        self._growth = Growth(device)

    def summary(self) -> dict[str, int]:
        """Return the peak as planned and, where it is counted, as measured, in bytes.

        Measured is what the run's weights took at its start and the growth since: of the process, on a CPU.
        """
        grown = self._growth.bytes()
        measured = {} if grown is None else {"measured_peak_bytes": self._held + grown}
        return {"planned_peak_bytes": self.plan.peak} | measured


def _bytes(tensors: list[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

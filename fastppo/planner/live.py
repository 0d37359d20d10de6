"""Bytes of live tensors, counted as they come and go: of a rehearsal on meta tensors, or of a run."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TEMPORARY = "temporaries"


class LiveBytes(TorchDispatchMode):
    """Count the storages of tensors on one device that operations make inside, until each is freed.

    A storage counts once, however many tensors share it. What an operation takes and gives back before it returns is
    not seen. Raises MemoryError when the storages would be larger than `limit` bytes together.

    Args:
        device: type of the device whose tensors count, "cpu" or "meta".
        wide: size of the last axis by which the logits of a head are told from other tensors, if they are to be.
    """

    def __init__(self, device: str, limit: int | None = None, wide: int | None = None):
        super().__init__()
        self.device, self.limit, self.wide = device, limit, wide
        self.bytes, self.peak = 0, 0
        self.at_peak: Counter[str] = Counter()  # bytes under each label when they were most together
        self._labels: Counter[str] = Counter()
        self._known: dict[int, list[Any]] = {}  # a storage's address in the interpreter: bytes, label, weak reference
        self._label = TEMPORARY

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count what is made inside under a label."""
        previous, self._label = self._label, label
        try:
            yield
        finally:
            self._label = previous

    @contextmanager
    def keeping(self, label: str) -> Iterator[None]:
        """Count temporaries that autograd keeps for a backward pass inside under a label."""

        def pack(tensor: Tensor) -> Tensor:
            if tensor.device.type == self.device:
                self.relabel(tensor, label)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.bytes, Counter(self._labels)

    def adopt(self, tensors: Sequence[Tensor], label: str) -> None:
        """Count tensors that are there already; those that are known keep their label."""
        for tensor in tensors:
            self._see(tensor, label)
        self._note_peak()

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Move a temporary to a label."""
        entry = self._known.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry[1] == TEMPORARY:
            self._labels[TEMPORARY] -= entry[0]
            self._labels[label] += entry[0]
            entry[1] = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and part.device.type == self.device:
                is_wide = self.wide is not None and part.dim() == 2 and part.shape[1] == self.wide
                self._see(part, "head" if is_wide and self._label == TEMPORARY else self._label)
        self._note_peak()
        return result

    def _see(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        entry = self._known.get(key)
        if entry is None:
            self._known[key] = [size, label, weakref.ref(storage, partial(self._forget, key))]
        elif entry[0] != size:  # resized in place
            size, entry[0], label = size - entry[0], size, entry[1]
        else:
            return
        self.bytes += size
        self._labels[label] += size

    def _forget(self, key: int, _: Any) -> None:
        size, label, _ = self._known.pop(key)
        self.bytes -= size
        self._labels[label] -= size

    def _note_peak(self) -> None:
        if self.bytes > self.peak:
            self.restart()
        if self.limit is not None and self.bytes > self.limit:
            raise MemoryError(f"tensors take {self.bytes} bytes, more than the limit of {self.limit}")

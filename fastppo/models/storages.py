"""Counting memory by the storages of tensors: each once, however many tensors and parts of a trainer lie in it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Storage:
    """One piece of memory."""

    owner: str
    """What it holds: base, policy adapter, optimiser state, ..."""
    name: str
    """The first tensor that was found in it."""
    bytes: int
    dtype: str
    device: str
    used_by: tuple[str, ...]
    """The parts that need it: policy, reference, critic, update, ..."""


@dataclass(frozen=True)
class MemoryReport:
    """Storages, each listed once. `str()` makes a table of it, `to_dict()` JSON."""

    storages: tuple[Storage, ...]

    @property
    def total(self) -> int:
        """Bytes of all storages."""
        return sum(storage.bytes for storage in self.storages)

    def by_owner(self) -> dict[str, int]:
        """Return the bytes of each owner."""
        totals: dict[str, int] = {}
        for storage in self.storages:
            totals[storage.owner] = totals.get(storage.owner, 0) + storage.bytes
        return totals

    def to_dict(self) -> dict[str, Any]:
        """Return totals and storages as plain values."""
        return {"total": self.total, "owners": self.by_owner(), "storages": [asdict(part) for part in self.storages]}

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[int]] = {}
        for part in self.storages:
            key = part.owner, part.dtype, part.device, ", ".join(part.used_by)
            groups.setdefault(key, []).append(part.bytes)
        rows: list[tuple[str, ...]] = [("owner", "storages", "bytes", "dtype", "device", "used by")]
        for (owner, *where), sizes in groups.items():
            rows.append((owner, f"{len(sizes):,}", f"{sum(sizes):,}", *where))
        rows.append(("all", f"{len(self.storages):,}", f"{self.total:,}", "", "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if column in (1, 2) else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


@dataclass
class Census:
    """The storages found so far."""

    found: dict[tuple[str, int], Storage] = field(default_factory=dict)

    def add(self, owner: str, used_by: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Count named tensors; storages that have an owner already only get another user."""
        for name, tensor in tensors:
            place = _place(tensor)
            if place is None:
                continue
            known = self.found.get(place)
            if known is not None:
                users = tuple(dict.fromkeys((*known.used_by, used_by)))
                self.found[place] = replace(known, used_by=users)
                continue
            dtype, size = str(tensor.dtype).removeprefix("torch."), tensor.untyped_storage().nbytes()
            self.found[place] = Storage(owner, name, size, dtype, place[0], (used_by,))

    def add_others(self) -> None:
        """Count every other tensor that Python can reach; what autograd alone holds is not among them."""
        others = [("", thing) for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        self.add("other tensors", "others", ((name, part) for name, part in others if _place(part) not in self.found))

    def report(self) -> MemoryReport:
        """Return what was counted."""
        return MemoryReport(tuple(self.found.values()))


def _place(tensor: Tensor) -> tuple[str, int] | None:
    """Return device and address of a tensor's storage; None if it takes no memory of its own."""
    if tensor.layout != torch.strided or not tensor.untyped_storage().nbytes():
        return None
    if tensor.untyped_storage().device.type == "meta":  # also of those that torch.compile traces with
        return None
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers of a model, and what belongs to them: the scales of quantised weights."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            yield prefix + name, tensor
            yield from _attributes(tensor, f"{prefix}{name}.")
        yield from _attributes(module, prefix)


def _attributes(thing: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the attributes of a thing, and among those of what bitsandbytes keeps there."""
    for name, value in vars(thing).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif type(value).__module__.startswith("bitsandbytes") and not isinstance(value, nn.Module):
            yield from _attributes(value, f"{prefix}{name}.")

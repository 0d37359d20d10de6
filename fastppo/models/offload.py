"""What the backward pass needs, kept in host memory between the passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

# Below, the call costs more than the memory is worth.
_LEAST_BYTES = 2**16


class _Moved:
    """The bytes of one storage in host memory, brought back once for all the tensors that lie in it."""

    def __init__(self, tensor: Tensor, *, pinned: bool):
        storage = tensor.untyped_storage()
        # While the reference lives, no other storage has this one's number.
        self.source, self.device = StorageWeakRef(storage), tensor.device
        everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        self.host = torch.empty(len(everything), dtype=torch.uint8, pin_memory=pinned)
        self.host.copy_(everything, non_blocking=pinned)
        self.uses, self.back = 0, torch.empty(0)

    def take(self) -> Tensor:
        """Return the bytes on their device for one of the tensors; they stay there until the last has been taken."""
        if not len(self.back):
            # On the same stream as the way out, so that it waits for it.
            self.back = torch.empty_like(self.host, device=self.device).copy_(self.host, non_blocking=True)
        back, self.uses = self.back, self.uses - 1
        if self.uses <= 0:
            self.back = torch.empty(0)
        return back


_Saved = tuple[_Moved, torch.dtype, int, torch.Size, tuple[int, ...]]


@contextmanager
def offloading(model: nn.Module, least_bytes: int = _LEAST_BYTES) -> Iterator[None]:
    """Move what is saved for the backward pass from the model's device to the host, and back when it is needed.

    What the model itself holds stays, and so do storages below `least_bytes`. Tensors that lie in one storage are moved
    together, once. With gradient checkpointing it is what enters the layers that is moved.
    """
    parts = [*model.parameters(), *model.buffers()]
    own = {part.untyped_storage().data_ptr() for part in parts}
    device, moved = parts[0].device, WeakValueDictionary[int, _Moved]()

    def pack(tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage()
        if tensor.device != device or storage.nbytes() < least_bytes or storage.data_ptr() in own:
            return tensor if tensor.grad_fn is None else tensor.detach()  # a result would keep its graph for good
        found = moved.get(storage._cdata)
        if found is None:
            moved[storage._cdata] = found = _Moved(tensor, pinned=device.type == "cuda")
        found.uses += 1
        return found, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride()

    def unpack(saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        found, dtype, offset, shape, stride = saved
        result = torch.empty(0, dtype=dtype, device=found.device)
        return result.set_(found.take().untyped_storage(), offset, shape, stride)

    with saved_tensors_hooks(pack, unpack):
        yield

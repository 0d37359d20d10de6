"""Activations: kept for the backward pass, computed again, or moved to the host; the gradients are the same."""

import contextlib
import gc
import weakref
from typing import ClassVar

import pytest
import tiny_trainers as tiny
import torch
from torch import nn

from fastppo.models import passes
from fastppo.models.offload import offloading
from fastppo.trainers import update


class Kept:
    """What the hooks hand to autograd in a tensor's place; it is counted until autograd lets go of it."""

    live: ClassVar[dict] = {}
    peak = 0

    def __init__(self, tensor):
        self.tensor, storage = tensor, tensor.untyped_storage()
        self.place, size = storage.data_ptr(), storage.nbytes()
        count, _ = Kept.live.get(self.place, (0, 0))
        Kept.live[self.place] = count + 1, size
        Kept.peak = max(Kept.peak, sum(size for _, size in Kept.live.values()))

    def __del__(self):
        count, size = Kept.live.pop(self.place)
        if count > 1:
            Kept.live[self.place] = count - 1, size


def peak_of_a_step(trainer, monkeypatch):
    """Bytes that autograd holds at once during a step, weights left out; nothing is made again from a recipe."""
    monkeypatch.setattr(passes, "keeping_recipes", contextlib.nullcontext)
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def pack(tensor):
        return tensor if tensor.untyped_storage().data_ptr() in own else Kept(tensor)

    sequences = tiny.batch((9, 7, 12, 10), (20, 14, 17, 30))
    trainer.step(*sequences)  # the first one also probes the model
    gc.collect()
    Kept.live, Kept.peak = {}, 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: getattr(kept, "tensor", kept)):
        trainer.step(*sequences)
    assert not Kept.live
    return Kept.peak


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("make", [tiny.policy, tiny.lora], ids=["full", "adapter"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradient_checkpointing_keeps_what_enters_the_layers(monkeypatch, kind, make, packed):
    monkeypatch.setattr(passes, "has_kernels", lambda device: packed)
    peaks, weights = [], []
    for checkpointing in (False, True):
        trainer = tiny.trainer(make(kind), gradient_checkpointing=checkpointing, mini_batch_size=2, learning_rate=1e-5)
        peaks.append(peak_of_a_step(trainer, monkeypatch))
        weights.append(tiny.weights(trainer.model))
    # Of two layers, what is inside goes; what stays are their inputs, the head's rows and the embeddings.
    assert peaks[1] < 0.25 * peaks[0]
    assert tiny.distance(*weights) < 1e-5


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))

    def forward(self, x):
        q, k, v = torch.stack([self.q(x), self.k(x), self.v(x)]).unbind()  # three tensors in one storage
        return x + torch.softmax(q @ k.t(), -1) @ v


def blocks(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(32), Block(32), Block(32))


def gradients(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_gradients_are_the_same_to_the_last_bit():
    model, x = blocks(), torch.randn(40, 32)
    expected = gradients(model, x)
    with offloading(model, least_bytes=0):
        ours = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_each_storage_is_moved_once_and_weights_never(monkeypatch):
    from fastppo.models import offload

    model, x = blocks(), torch.randn(40, 32)
    made, inner = [], offload._Moved.__init__

    def init(self, tensor, *, pinned):
        made.append((tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes(), self))
        inner(self, tensor, pinned=pinned)

    monkeypatch.setattr(offload._Moved, "__init__", init)
    with offloading(model, least_bytes=1000):
        loss = model(x).square().sum()
        assert len({number for number, _, _ in made}) == len(made), "a storage was moved twice"
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert not weights & {m.source.cdata for _, _, m in made}
        # The stacked q, k and v: three tensors of one storage.
        stacked = [moved for _, size, moved in made if size == 3 * 40 * 32 * 4]
        assert len(stacked) == 3
        assert all(moved.uses >= 2 for moved in stacked)
        assert all(not len(moved.back) for _, _, moved in made)
        loss.backward()
    assert all(not len(moved.back) for _, _, moved in made), "what was brought back is let go after its last use"
    sizes = [size for _, size, _ in made]
    assert min(sizes) >= 1000


def test_small_storages_stay(monkeypatch):
    from fastppo.models import offload

    model, x = blocks(), torch.randn(4, 32)
    monkeypatch.setattr(offload._Moved, "__init__", lambda *_, **__: pytest.fail("moved"))
    with offloading(model):
        gradients(model, x)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [tiny.policy, tiny.lora], ids=["full", "adapter"])
def test_a_step_with_offloading_is_a_step(monkeypatch, make, checkpointing):
    weights = []
    for offload in (False, True):
        trainer = tiny.trainer(make("llama"), gradient_checkpointing=checkpointing, mini_batch_size=2)
        calls = []
        monkeypatch.setattr(
            update, "offloading", lambda model, calls=calls: calls.append(1) or offloading(model, least_bytes=0)
        )
        trainer.config.activation_offload = offload  # the constructor would refuse it on a CPU
        trainer.step(*tiny.batch())
        assert len(calls) == offload
        weights.append(tiny.weights(trainer.model))
    assert tiny.distance(*weights) == 0


def test_a_cpu_has_nowhere_to_move_them():
    with pytest.raises(ValueError, match=r"activation_offload=True .* this run is on cpu.*gradient_checkpointing=True"):
        tiny.trainer(kind="gpt2", activation_offload=True)


def test_a_graph_without_a_backward_pass_is_let_go():
    model = nn.Linear(3, 3)
    with offloading(model):
        y = torch.tanh(model(torch.ones(3)))  # too small to be moved, and kept by its own graph
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None

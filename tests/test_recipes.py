"""Results that are computed again in the backward pass: the same gradients, to the last bit, from less memory."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import tiny_trainers as tiny
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastppo.models import passes
from fastppo.ops import fused, recipes
from fastppo.trainers import update

pytest.importorskip("fastppo._native", reason="built without the C++ extension")

ROWS, SIZE = 7, 12


@pytest.fixture
def made(monkeypatch):
    """The results that were made again."""
    shapes = []
    take = recipes.Recipe.take

    def noted(recipe):
        is_new = recipe._result is None
        result = take(recipe)
        shapes.extend([tuple(result.shape)] * is_new)
        return result

    monkeypatch.setattr(recipes.Recipe, "take", noted)
    return shapes


def leaves(dtype):
    torch.manual_seed(3)
    shapes = [(1, ROWS, SIZE), (SIZE,), (SIZE, SIZE), (SIZE, SIZE), (SIZE, SIZE)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def block(x, norm, gate, up, down):
    normed = fused.rms_norm(x, norm, 1e-6)
    return fused.gated_activation(normed @ gate.t(), normed @ up.t(), "silu") @ down.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_last_bit(dtype, made):
    usual, ours = leaves(dtype), leaves(dtype)
    block(*usual).square().sum().backward()
    assert not made
    with recipes.keeping_recipes():
        block(*ours).square().sum().backward()
    assert made == [(1, ROWS, SIZE)] * 2  # the norm's two readers share one
    for mine, other in zip(ours, usual, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)


def test_what_is_kept_is_not_the_result():
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(recipes._pack(tensor)) or kept[-1], recipes._unpack):
        block(*leaves(torch.float32)).sum().backward()
    assert sum(isinstance(each[0], recipes.Recipe) for each in kept) == 3
    assert sum(isinstance(each[0], torch.Tensor) for each in kept) == len(kept) - 3


@pytest.mark.parametrize(
    "read",
    [
        lambda y: (y[:, :3] * y[:, 3:6]).sum(),  # in part
        lambda y: y.square().sum(),
        lambda y: (y[0].t() @ y[0]).square().sum(),
        lambda y: y.double().square().sum(),  # in another dtype
        lambda y: (y.add_(1.0)).square().sum(),  # changed: the recipe would make what was there before
    ],
    ids=["part", "whole", "turned", "widened", "changed"],
)
def test_readers_of_every_kind_get_what_they_read(read):
    def gradients():
        x, norm, *_ = leaves(torch.float32)
        read(fused.rms_norm(x, norm, 1e-6)).backward()
        return x.grad, norm.grad

    expected = gradients()
    with recipes.keeping_recipes():
        found = gradients()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_second_backward_pass_finds_everything_again():
    usual, ours = leaves(torch.float32), leaves(torch.float32)
    for parts, again in ((usual, False), (ours, True)):
        with recipes.keeping_recipes() if again else nullcontext():
            total = block(*parts).sum()
            total.backward(retain_graph=True)
            total.backward()
    for mine, other in zip(ours, usual, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)


def test_a_graph_without_a_backward_pass_is_let_go():
    x = torch.randn(5, requires_grad=True)
    with recipes.keeping_recipes():
        y = torch.tanh(2 * x)  # whose graph keeps the result
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None


def test_a_gradient_can_be_differentiated():
    x = torch.randn(5, requires_grad=True)
    with recipes.keeping_recipes():
        y = torch.tanh(2 * x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        slope.sum().backward()
    torch.testing.assert_close(x.grad, -8 * y.detach() * (1 - y.detach().square()))


def test_an_interrupted_step_keeps_nothing_of_its_pass(monkeypatch):
    kept = []

    def noted(tensor):
        kept.extend([weakref.ref(tensor)] * (tensor.grad_fn is not None))
        return pack(tensor)

    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    pack, trainer = recipes._pack, tiny.trainer(kind="gpt2")
    monkeypatch.setattr(recipes, "_pack", noted)
    monkeypatch.setattr(update.ops, "linear_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(*tiny.batch())
    gc.collect()
    assert len(kept) > 10
    assert all(each() is None for each in kept)


@pytest.mark.parametrize("spoiled", ["x", "y"])
def test_what_was_changed_since_the_forward_pass_is_refused_as_ever(spoiled):
    x, norm, *_ = leaves(torch.float32)
    with recipes.keeping_recipes():
        made = {"x": 2 * x}
        made["y"] = torch.tanh(fused.rms_norm(made["x"], norm, 1e-6))
        total = made["y"].square().sum()
        made[spoiled].detach().mul_(3)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation: it is at version 1"):
            total.backward()


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_a_step_uses_them_and_changes_nothing(made, monkeypatch, checkpointing):
    def weights():
        model = tiny.policy("llama")
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        trainer = tiny.trainer(model, mini_batch_size=2)
        trainer.step(*tiny.batch())
        return tiny.weights(trainer.model)

    with_recipes = weights()
    assert made or checkpointing == "reentrant"
    monkeypatch.setattr(passes, "keeping_recipes", nullcontext)
    without = weights()
    for name, weight in with_recipes.items():
        torch.testing.assert_close(weight, without[name], rtol=0, atol=0)

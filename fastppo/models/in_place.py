"""Gradients added to `.grad` where it lies, on the CPU: a vocabulary's in a pass, all of them from step to step.

Autograd makes a tensor of the whole weight for every use in every pass, fills it with zeros and adds it, although a
pass reads few rows of an embedding, and the head's gradient is a sum that can begin with what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastppo.models.network import language_head
from fastppo.ops.backends import kind_of


@contextmanager
def embeddings_in_place(model: nn.Module) -> Iterator[None]:
    """Let the backward pass of every plain trained embedding add to its `.grad` inside, rather than return a gradient.

    For `backward()` alone: `torch.autograd.grad` would find none. A nested use changes nothing.
    """
    found: list[Any] = [module for module in model.modules() if _is_plain(module)]
    try:
        for module in found:
            vars(module)["forward"] = partial(_look_up, module)
        yield
    finally:
        for module in found:
            del vars(module)["forward"]


def place_of_gradient(weight: Tensor) -> Tensor | None:
    """Return where the gradient of a weight may be added: its `.grad`, zeros if there was none yet.

    None for a weight without one of its own, one that hooks wait for, or one that is not on the CPU. None also for one
    that lies otherwise than row by row: a gradient has to lie as its weight does, or fused optimisers mix them up.
    """
    if not _can_take(weight) or not weight.is_contiguous():
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    return weight.grad if weight.grad.is_contiguous() else None


def weights_in_place(model: nn.Module) -> list[Tensor]:
    """Return the trained weights whose gradients an update adds where they lie: embeddings' and the head's."""
    found: list[Any] = [module for module in model.modules() if _is_plain(module)]
    head = language_head(model).weight
    weights = [module.weight for module in found]
    return weights if not _can_take(head) or any(head is weight for weight in weights) else [*weights, head]


class GradientMemory:
    """Gradients that lie in the same place from one optimiser step to the next, on the CPU.

    Made in a backward pass they come to lie between activations, whose memory is then of no use to larger tensors.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        wanted = [p for p in parameters if p.requires_grad and kind_of(p.device) == "cpu"]
        self._kept = [(parameter, torch.zeros_like(parameter)) for parameter in wanted]
        self._versions: list[int] = []

    def hand_out(self) -> None:
        """Give every parameter its gradient, all zeros."""
        for parameter, grad in self._kept:
            parameter.grad = grad.zero_()
        self._versions = [grad._version for _, grad in self._kept]

    def settle(self) -> None:
        """Take back what nothing was added to: a parameter that no pass reaches has no part in an optimiser's step."""
        for (parameter, grad), version in zip(self._kept, self._versions, strict=True):
            if parameter.grad is grad and grad._version == version:
                parameter.grad = None


def _can_take(weight: Tensor) -> bool:
    hooks = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.is_leaf and weight.requires_grad and not hooks and kind_of(weight.device) == "cpu"


def _is_plain(module: Any) -> bool:
    """Whether a module does nothing but look rows up: a subclass may, and another's `forward` stays."""
    if type(module) is not nn.Embedding or "forward" in vars(module):
        return False
    is_special = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    return not is_special and _can_take(module.weight)


def _look_up(module: nn.Embedding, ids: Tensor) -> Tensor:
    return _Rows.apply(module.weight, ids, module.padding_idx)  # type: ignore[no-any-return]


class _Rows(torch.autograd.Function):
    """Rows of a weight, whose gradients are added to those that its `.grad` holds."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.weight, ctx.padding_idx = weight, padding_idx
        ctx.save_for_backward(ids)
        return weight.detach()[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            upstream = upstream.masked_fill((ids == ctx.padding_idx)[..., None], 0.0)
        place = place_of_gradient(ctx.weight)
        if place is None:  # changed since the forward pass
            place = torch.zeros_like(ctx.weight)
        place.index_add_(0, ids.flatten(), upstream.flatten(0, -2).to(place.dtype))
        return None if place is ctx.weight.grad else place, None, None

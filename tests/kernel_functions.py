"""What the tests call in the interpreter's process beside the kernels: gradcheck of them, and them composed."""

from typing import Any

import torch
from fastppo.kernels.logit_gradient import logit_gradient
from fastppo.kernels.ppo import ppo_loss, ppo_rows
from fastppo.kernels.row_statistics import row_statistics
from torch import Tensor


class Statistics(torch.autograd.Function):
    """(logprobs, entropy, logsumexp) and, beside a reference, its KL, differentiable in the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ref_logits: Tensor | None, shape: dict, ref_shape: dict
    ) -> Any:
        found = row_statistics(logits, labels, ref_logits=ref_logits, ref_shape=ref_shape, **shape)
        ctx.save_for_backward(logits, labels, ref_logits, *found)
        ctx.shapes = shape, ref_shape
        return found[:4]

    @staticmethod
    def backward(ctx: Any, g: Tensor, e: Tensor, d_lse: Tensor, d_kl: Tensor | None = None) -> Any:
        logits, labels, ref_logits, logprobs, entropy, logsumexp, *ref = ctx.saved_tensors
        (shape, ref_shape), (kl, ref_logsumexp) = ctx.shapes, ref or (None, None)
        more = {
            "ref_logits": ref_logits,
            "kl": kl,
            "ref_logsumexp": ref_logsumexp,
            "d_kl": d_kl,
            "ref_shape": ref_shape,
        }
        upstream = (part.contiguous() for part in (g, e, d_lse))
        more["d_kl"] = None if d_kl is None else d_kl.contiguous()
        out = torch.empty_like(logits)
        logit_gradient(logits, labels, logsumexp, entropy, *upstream, out=out, logprobs=logprobs, **shape, **more)
        return out, None, None, None, None


class Losses(torch.autograd.Function):
    """The losses of `ppo_rows`, differentiable in the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: tuple[Tensor, ...], keywords: dict[str, Any]) -> Tensor:
        out = torch.empty_like(logits)
        losses = ppo_rows(logits, *rows, out=out, **keywords)[0]
        ctx.save_for_backward(out)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream[:, None] * ctx.saved_tensors[0], None, None


def check_statistics(
    logits: Tensor, labels: Tensor, shape: dict, ref_logits: Tensor | None = None, ref_shape: dict | None = None
) -> Tensor:
    """Return True if the kernels' derivatives of every statistic are those of finite differences; raises otherwise."""
    found = torch.autograd.gradcheck(
        lambda u: Statistics.apply(u, labels, ref_logits, shape, ref_shape), logits.requires_grad_()
    )
    return torch.tensor(found)


def check_losses(
    logits: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, **keywords
) -> Tensor:
    """Return True if `ppo_rows` writes the derivatives of its losses; raises otherwise."""
    rows = (labels, old, advantages, weights)
    return torch.tensor(torch.autograd.gradcheck(lambda u: Losses.apply(u, rows, keywords), logits.requires_grad_()))


def composed_rows(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy_coef: float,
    shape: dict[str, float],
    out: Tensor,
    **more: Any,
) -> tuple[Tensor, ...]:
    """Return what `ppo_rows` does, from the kernels that it is made of, in a launch each."""
    logprobs, entropy, logsumexp = row_statistics(logits, labels, **shape)
    losses, g = ppo_loss(logprobs, old_logprobs, advantages, weights, **more)
    e = -entropy_coef * weights
    logit_gradient(logits, labels, logsumexp, entropy, g, e, out=out, logprobs=logprobs, **shape)
    return losses + e * entropy, logprobs, entropy


def bytes_read(**given: Any) -> Tensor:
    """Return how many bytes `sample` loads from memory, counted by the interpreter."""
    from fastppo.kernels.sampling import sample
    from triton.runtime.interpreter import InterpreterBuilder

    load, count = InterpreterBuilder.create_masked_load, 0

    def counting(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        nonlocal count
        loaded = load(self, pointers, mask, *rest)
        count += int(mask.data.sum()) * loaded.data.itemsize
        return loaded

    InterpreterBuilder.create_masked_load = counting
    try:
        sample(**given)
    finally:
        InterpreterBuilder.create_masked_load = load
    return torch.tensor(count)

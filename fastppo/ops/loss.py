"""A loss straight from hidden states, with its gradients, in one pass over the chunks.

A loss on log-probs and entropies enters the logits' gradient only as two numbers a row. So every gradient is formed in
the pass that computes the loss: logits, statistics, loss on vectors, gradient in the logits' place, matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import rows as row_ops
from fastppo.ops.accumulate import Gradients
from fastppo.ops.check import (
    check_head,
    check_labels,
    check_loss,
    check_place,
    check_ref_head,
    kept_rows,
    without_graph,
)
from fastppo.ops.chunks import Chunk, RefHead, passes
from fastppo.ops.ppo_loss import PPOLoss
from fastppo.ops.row_types import Scaling, Statistics, Upstream


class _LossPass(NamedTuple):
    """What `linear_loss` hands through autograd besides the tensors that it differentiates."""

    labels: Tensor
    weights: Tensor | None
    loss: Callable[..., Tensor]
    scaling: Scaling
    ref: RefHead | None
    offsets: Tensor | None
    weight_grad: Tensor | None
    numbers: Tensor | None = None  # of the rows, as the caller counts them; None: 0, 1, 2 ...

    def numbers_of(self, rows: slice) -> Tensor:
        """Return the numbers of a chunk's rows."""
        if self.numbers is None:
            return torch.arange(rows.start, rows.stop, device=self.labels.device)
        return self.numbers[rows]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, given: _LossPass) -> Tensor:
        chunks = passes(hidden, weight, bias, given.ref, given.offsets)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        make = partial(Gradients, ctx.needs_input_grad[:3], hidden, weight, bias, into=given.weight_grad)
        grads: Gradients | None = None
        for chunk in chunks:
            if grads is None:
                grads = make(is_single=chunk.rows.stop == len(hidden))
            total += _loss_of_chunk(chunk, given, hidden, grads)
        ctx.grads = (make(is_single=True) if grads is None else grads).finish()
        ctx.is_added = given.weight_grad is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of linear_loss were handed out by a first backward pass and are gone; call linear_loss "
                "again, or add the losses up and go backward once"
            )
        grads, ctx.grads = ctx.grads, None
        # On the CPU a look at the factor is free, and a pass over the head's gradient is not.
        if upstream.device.type != "cpu" or upstream.numpy() != 1.0:
            if ctx.is_added and upstream.device.type == "cpu":
                raise RuntimeError(
                    f"linear_loss was told to add to weight_grad, and its result was multiplied by {float(upstream)} "
                    "afterwards; multiply the weights of its rows instead"
                )
            grads = tuple(grad if grad is None else grad.mul_(upstream.to(grad.dtype)) for grad in grads)
        return *grads, None


def _loss_of_chunk(chunk: Chunk, given: _LossPass, hidden: Tensor, grads: Gradients) -> Tensor:
    """Return the summed loss of a chunk, and add its gradients."""
    rows, buffer, logits, ref = chunk
    labels, numbers = given.labels[rows], given.numbers_of(rows)
    loss = given.loss
    # Not a subclass, which may compute something else. With a reference there is no PPOLoss: check_loss refuses it.
    is_ppo = type(loss) is PPOLoss and given.weights is None
    if is_ppo and isinstance(loss, PPOLoss) and loss.is_fp32 and row_ops.has_fused_ppo(logits):
        du = buffer.gradient(len(logits)) if grads.are_wanted else None
        losses, logprobs, entropies = row_ops.ppo(logits, labels, loss.take(numbers), given.scaling, du)
        loss.record(logprobs, entropies, numbers)
        if du is not None:
            grads.add(du, hidden[rows], rows, loss.has_gradient(logprobs, numbers))
        return losses.sum()
    stats = row_ops.statistics(logits, labels, given.scaling, ref)
    value, upstream = _loss_and_gradient(given, stats, rows)
    if grads.are_wanted:
        grads.add_chunk(chunk, hidden, given.labels, stats, upstream, given.scaling)
    return value


def _loss_and_gradient(given: _LossPass, stats: Statistics, rows: slice) -> tuple[Tensor, Upstream]:
    """Return the summed loss of a chunk, and its derivatives by log-prob, entropy and KL as far as they are read."""
    with torch.enable_grad():
        logprobs, entropies = stats.logprobs.detach().requires_grad_(), stats.entropies.detach().requires_grad_()
        kl = [] if stats.kl is None else [stats.kl.detach().requires_grad_()]
        losses = given.loss(logprobs, entropies, given.numbers_of(rows), *kl)
        value = (losses if given.weights is None else losses * given.weights[rows]).sum()
        if not value.requires_grad:  # a loss that reads nothing
            return value, Upstream(torch.zeros_like(logprobs))
        derivatives = torch.autograd.grad(value, [logprobs, entropies, *kl], allow_unused=True)
    return value.detach(), Upstream(derivatives[0], derivatives[1], None, *derivatives[2:])


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: Callable[..., Tensor],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    weights: Tensor | None = None,
    ignore_index: int | None = -100,
    offsets: Tensor | None = None,
    ref_head: tuple[Tensor, Tensor] | None = None,
    ref_shape: dict[str, Any] | None = None,
    weight_grad: Tensor | None = None,
) -> Tensor:
    """Return Σ loss(logprobs (C,), entropies (C,), rows (C,)), a scalar, over chunks of the T rows.

    `loss` gives per-row losses, differentiated by the statistics; `rows` are the numbers of the chunk's rows.
    The gradients of hidden (T, H), weight (V, H) and bias are formed in the forward pass: 2 matmuls a row with a frozen
    head, 3 with a trained one, for one backward pass. A `PPOLoss` runs in one fused kernel. Raises ValueError. Args:
        weights: (T,), multiplied into the losses.
        ignore_index: rows with this label (None: there are none) and rows of weight 0, on the CPU those of a `PPOLoss`
            as well, are not computed.
        offsets: (B + 1,) starts of the sequences, for losses over sequences: chunks keep them whole.
        ref_head: (hidden (T, H'), weight (V, H')) of a reference: `loss` gets the exact KL(π || π_ref) (C,) as a fourth
            argument, for one more matmul a row; ref_shape: its bias and scalars where they differ.
        weight_grad: (V, H), such as `weight.grad`: the weight's gradient is added here at once. For a result that is
            differentiated by itself or in a sum; another factor than 1 raises RuntimeError, on CUDA it goes unnoticed.
    """
    scaling = Scaling(temperature, softcap, logit_scale)
    check_head(hidden, weight, labels, bias, scaling, weights)
    ref = None if ref_head is None else check_ref_head(ref_head, ref_shape, bias, scaling, hidden, weight)
    check_loss(loss, labels, offsets, ref is not None)
    check_place(weight_grad, weight)
    hidden, weight, bias = without_graph(hidden, weight, bias)
    given = _LossPass(labels.contiguous(), weights, loss, scaling, ref, offsets, weight_grad)
    hidden, given = _read_rows(hidden, given, ignore_index, len(weight))
    return _LinearLoss.apply(hidden, weight, bias, given)  # type: ignore[no-any-return]


def _read_rows(hidden: Tensor, given: _LossPass, ignore_index: int | None, vocabulary: int) -> tuple[Tensor, _LossPass]:
    """Leave out the rows that no loss reads. Raises ValueError for labels outside the vocabulary."""
    weights = [] if given.weights is None else [given.weights]
    if isinstance(given.loss, PPOLoss) and hidden.device.type == "cpu":
        weights.append(given.loss.weights)
    kept = kept_rows(given.labels, ignore_index, *weights)
    labels = given.labels if kept is None else given.labels[kept]
    check_labels(labels, vocabulary)
    if kept is None:
        return hidden, given
    return hidden[kept], given._replace(
        labels=labels,
        numbers=kept,
        weights=None if given.weights is None else given.weights[kept],
        ref=None if given.ref is None else given.ref._replace(hidden=given.ref.hidden[kept]),
        offsets=None if given.offsets is None else torch.searchsorted(kept, given.offsets.to(kept)),
    )

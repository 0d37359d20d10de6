"""Log-probs, entropies and exact KL straight from hidden states; [rows x vocabulary] exists for a chunk at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import rows as row_ops
from fastppo.ops.accumulate import Gradients
from fastppo.ops.backends import backend, on_device
from fastppo.ops.check import check_head, check_labels, check_ref_head, kept_rows, without_graph
from fastppo.ops.chunks import RefHead, is_small_card, passes
from fastppo.ops.row_types import Scaling, Upstream


class _LinearStatistics(torch.autograd.Function):
    """Log-prob, entropy, log-sum-exp and, with a reference, KL of each row; backward computes the logits again.

    Where only hidden needs a gradient, d(logprob)/d(hidden) is formed beside the log-probs. Their gradient is then a
    product by row, and nothing is computed again unless another statistic is differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scaling: Scaling,
        ref: RefHead | None,
    ) -> Any:
        needs = ctx.needs_input_grad[:3]
        slopes = torch.empty_like(hidden) if needs == (True, False, False) and ref is None else None
        parts = []
        for rows, buffer, logits, other in passes(hidden, weight, bias, ref):
            stats = row_ops.statistics(logits, labels[rows], scaling, other)
            parts.append(stats)
            if slopes is not None:
                one, out = Upstream(torch.ones_like(stats.logprobs)), buffer.gradient(len(logits))
                row_ops.gradient(logits, labels[rows], stats, one, scaling, out=out)
                torch.mm(out, weight, out=slopes[rows])
        # The reference's too, so that autograd notices if somebody changes them before the backward pass.
        ctx.save_for_backward(hidden, weight, bias, labels, *(() if ref is None else ref[:3]))
        ctx.needs, ctx.scaling, ctx.slopes, ctx.parts = needs, scaling, slopes, parts
        ctx.ref_scaling = None if ref is None else ref.scaling
        ctx.set_materialize_grads(False)
        if not parts:
            return tuple(hidden.new_empty(4, 0, dtype=torch.promote_types(hidden.dtype, torch.float32)).unbind())
        columns = list(zip(*parts, strict=True))[: 3 if ref is None else 4]
        return tuple(torch.cat(column).to(parts[0].logprobs.dtype) for column in columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        hidden, weight, bias, labels, *parts = ctx.saved_tensors
        if ctx.slopes is not None and upstream[0] is not None and all(part is None for part in upstream[1:]):
            return (ctx.slopes * upstream[0][:, None]).to(hidden.dtype), None, None, None, None, None
        grads = Gradients(ctx.needs, hidden, weight, bias, is_single=len(ctx.parts) == 1)
        ref = RefHead(parts[0], parts[1], parts[2], ctx.ref_scaling) if parts else None
        for stats, chunk in zip(ctx.parts, passes(hidden, weight, bias, ref), strict=True):
            part = Upstream(*(None if grad is None else grad[chunk.rows] for grad in upstream))
            grads.add_chunk(chunk, hidden, labels, stats, part, ctx.scaling)
        return *grads.finish(), None, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), (T,) fp32 each, of labels (T,) under hidden (T, H) and weight (V, H).

    Differentiable in hidden, weight and bias. Matmuls a row: 1 without gradients; with a frozen head 2 where only the
    log-probs are differentiated, else 4; with a trained head 4 (`linear_loss` takes 2 and 3). Rows labelled
    `ignore_index` are not computed and come back as 0; None says that there are none, which saves CUDA a look at the
    labels. See `reference.linear_logprobs` for the formulas. Raises ValueError for shapes, labels or scalars that do
    not fit.
    """
    scaling = Scaling(temperature, softcap, logit_scale)
    check_head(hidden, weight, labels, bias, scaling)
    hidden, weight, bias = without_graph(hidden, weight, bias)
    num_rows, kept = len(labels), kept_rows(labels, ignore_index)
    if kept is not None:
        hidden, labels = hidden[kept], labels[kept]
    labels = labels.contiguous()  # the kernels take its address
    check_labels(labels, len(weight))
    if _wants_tiles(hidden, weight, bias):
        from fastppo.kernels.tile_statistics import tile_statistics

        with on_device(hidden):
            parts = tile_statistics(hidden, weight, labels, bias=bias, **scaling._asdict())
    else:
        parts = _LinearStatistics.apply(hidden, weight, bias, labels, scaling, None)
    if kept is not None:
        parts = [part.new_zeros(num_rows).index_copy(0, kept, part) for part in parts]
    return parts[0], parts[1], parts[2]


def _wants_tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel without any buffer of logits serves: on small cards, where no gradient is wanted."""
    if backend(hidden.device) != "triton" or hidden.device.type != "cuda" or not is_small_card(hidden.device):
        return False
    parts = (hidden, weight) if bias is None else (hidden, weight, bias)
    return not (torch.is_grad_enabled() and any(part.requires_grad for part in parts))


def linear_kl(
    head: tuple[Tensor, Tensor],
    ref_head: tuple[Tensor, Tensor],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_shape: dict[str, Any] | None = None,
) -> Tensor:
    """Return KL(π || π_ref), (T,) fp32, from two (hidden (T, H), weight (V, H)) pairs, chunk by chunk.

    Differentiable in the policy's hidden, weight and bias, not in the reference's; as a part of a loss beside others
    `linear_loss` with `ref_head` takes fewer matmuls. `ref_shape` holds the reference's bias, temperature, softcap and
    logit_scale where they differ.
    """
    (hidden, weight), scaling = head, Scaling(temperature, softcap, logit_scale)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    check_head(hidden, weight, labels, bias, scaling)
    ref = check_ref_head(ref_head, ref_shape, bias, scaling, hidden, weight)
    hidden, weight, bias = without_graph(hidden, weight, bias)
    result: Tensor = _LinearStatistics.apply(hidden, weight, bias, labels, scaling, ref)[3]
    return result

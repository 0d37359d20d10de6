"""What the head's operations refuse, and which rows they leave out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastppo.ops.chunks import RefHead
from fastppo.ops.ppo_loss import PPOLoss
from fastppo.ops.row_types import Scaling


def check_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scaling: Scaling,
    weights: Tensor | None = None,
) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and scalars belong together."""
    check_linear(hidden, weight, bias, scaling)
    for name, part in (("labels", labels), ("weights", weights)):
        if part is not None and (part.shape != hidden.shape[:1] or part.device != hidden.device):
            raise ValueError(
                f"{name} has shape {tuple(part.shape)} on {part.device}, expected {tuple(hidden.shape[:1])} on "
                f"{hidden.device}: one a row of hidden"
            )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}, expected torch.int64: use .long()")


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> None:
    """Raise ValueError unless hidden (T, H), weight (V, H) and bias (V,) make logits, and the scaling a softmax."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}, expected (T, H) and (V, H); "
            "flatten batch and position into one axis"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, expected a floating dtype")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (part.dtype != hidden.dtype or part.device != hidden.device):
            raise ValueError(
                f"{name} is {part.dtype} on {part.device}, expected {hidden.dtype} on {hidden.device}: use .to(hidden)"
            )
    if not (scaling.temperature > 0 and math.isfinite(scaling.temperature)):
        raise ValueError(f"temperature is {scaling.temperature}, expected a finite number above 0")
    if scaling.softcap is not None and not (scaling.softcap >= 0 and math.isfinite(scaling.softcap)):
        raise ValueError(f"softcap is {scaling.softcap}, expected None or a finite number of at least 0")
    if not (scaling.logit_scale > 0 and math.isfinite(scaling.logit_scale)):
        raise ValueError(f"logit_scale is {scaling.logit_scale}, expected a finite number above 0")


def without_graph(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Detach all where gradients are off: autograd tells a Function what requires one, not that none is wanted."""
    if torch.is_grad_enabled():
        return hidden, weight, bias
    return hidden.detach(), weight.detach(), None if bias is None else bias.detach()


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raise ValueError for a label outside the vocabulary; on CUDA, where a look costs a wait, its row is NaN."""
    if labels.device.type == "cpu" and len(labels):
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"labels reach from {low} to {high}, expected 0 to {vocabulary - 1}; rows to leave out are labelled "
                "with ignore_index"
            )


def check_loss(loss: object, labels: Tensor, offsets: Tensor | None, has_ref: bool) -> None:
    """Raise ValueError for a `PPOLoss` that does not fit the rows, and for offsets that do not cut them all."""
    if isinstance(loss, PPOLoss):
        loss.check(labels)
        if has_ref:
            raise ValueError("PPOLoss does not read the KL of ref_head: write a loss that calls it and adds the KL")
    if offsets is not None:
        bounds = offsets.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != len(labels) or sorted(bounds) != bounds:
            raise ValueError(f"offsets are {bounds}, expected to rise from 0 to the number of rows, {len(labels)}")


def check_place(weight_grad: Tensor | None, weight: Tensor) -> None:
    """Raise ValueError unless a weight's gradient can be added to the tensor given for it."""
    if weight_grad is not None:
        expected, given = ((x.dtype, tuple(x.shape), x.device) for x in (weight, weight_grad))
        if given != expected or not weight_grad.is_contiguous() or weight_grad.requires_grad:
            raise ValueError(
                f"weight_grad is {given} with strides {weight_grad.stride()}, expected the weight's {expected}, "
                "contiguous and without a gradient of its own: pass torch.zeros_like(weight), or weight.grad"
            )


def kept_rows(labels: Tensor, ignore_index: int | None, *weights: Tensor) -> Tensor | None:
    """Return the numbers of the rows that some loss reads, or None if that is all of them."""
    if ignore_index is None and not weights:
        return None
    is_kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    for weight in weights:
        is_kept &= weight != 0
    kept = is_kept.nonzero()[:, 0]
    return None if len(kept) == len(labels) else kept


def check_ref_head(
    head: tuple[Tensor, Tensor],
    shape: dict[str, Any] | None,
    bias: Tensor | None,
    scaling: Scaling,
    hidden: Tensor,
    weight: Tensor,
) -> RefHead:
    """Return the reference's head as `passes` takes it, detached. Raises ValueError if it does not fit the policy's."""
    ref_hidden, ref_weight = head[0].detach(), head[1].detach()
    if len(ref_hidden) != len(hidden) or len(ref_weight) != len(weight):
        raise ValueError(
            f"the reference's hidden {tuple(ref_hidden.shape)} and weight {tuple(ref_weight.shape)} must have the rows "
            f"and the vocabulary of the policy's {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    given = {"bias": bias, **scaling._asdict(), **(shape or {})}
    ref_bias = given.pop("bias")
    ref = RefHead(ref_hidden, ref_weight, None if ref_bias is None else ref_bias.detach(), Scaling(**given))
    try:
        check_linear(*ref)
    except ValueError as error:
        raise ValueError(f"of the reference: {error}") from error
    return ref

"""What the head's operations refuse, and which rows they leave out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastppo.ops.chunks import RefHead
from fastppo.ops.rows import Scaling


def check_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scaling: Scaling,
    weights: Tensor | None = None,
) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and scalars belong together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}, expected (T, H) and (V, H); "
            "flatten batch and position into one axis"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}, expected one floating dtype: use .to()")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, expected torch.int64 {tuple(hidden.shape[:1])}"
        )
    for name, part, shape in (("bias", bias, weight.shape[:1]), ("weights", weights, hidden.shape[:1])):
        if part is not None and part.shape != shape:
            raise ValueError(f"{name} has shape {tuple(part.shape)}, expected {tuple(shape)}")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype}, expected {weight.dtype}, as the weight is: use .to()")
    if not (scaling.temperature > 0 and math.isfinite(scaling.temperature)):
        raise ValueError(f"temperature is {scaling.temperature}, expected a finite number above 0")
    if scaling.softcap is not None and not (scaling.softcap >= 0 and math.isfinite(scaling.softcap)):
        raise ValueError(f"softcap is {scaling.softcap}, expected None or a finite number of at least 0")


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


def kept_rows(labels: Tensor, ignore_index: int | None, weights: Tensor | None) -> Tensor | None:
    """Return the numbers of the rows that some loss reads, or None if that is all of them."""
    if ignore_index is None and weights is None:
        return None
    is_kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    if weights is not None:
        is_kept &= weights != 0
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
    given = {"bias": bias, **scaling._asdict()} if shape is None else dict(shape)
    ref_bias = given.pop("bias", None)
    return RefHead(ref_hidden, ref_weight, None if ref_bias is None else ref_bias.detach(), Scaling(**given))

"""Row operations in plain PyTorch, for any dtype and device; the kernels implement these formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo import reference
from fastppo.ops.row_types import Reference, Scaling, Statistics, Upstream


def statistics(u: Tensor, labels: Tensor, scaling: Scaling, ref: Reference | None) -> Statistics:
    """See `rows.statistics`."""
    z = reference.shaped_logits(u, *scaling)
    basic = reference.row_statistics(z, labels)
    if ref is None:
        return Statistics(*basic)
    z_ref = reference.shaped_logits(ref.logits, *ref.scaling)
    return Statistics(*basic, reference.exact_kl(z, z_ref), z_ref.logsumexp(-1))


def gradient(
    u: Tensor,
    labels: Tensor,
    stats: Statistics,
    upstream: Upstream,
    scaling: Scaling,
    out: Tensor,
    ref: Reference | None,
) -> None:
    """See `rows.gradient`; dL/dz = g (1[v = y] - p) - e p (log p + H) + l p + k p (log p - log q - KL)."""
    z = reference.shaped_logits(u, *scaling)
    # Another backend may have made the statistics, and autograd the rest.
    g, e, d_lse, k = (None if part is None else part.to(z.dtype) for part in upstream)
    known: list[Any] = [None if part is None else part.to(z.dtype)[:, None] for part in stats]
    _, entropies, logsumexp, kl, ref_logsumexp = known
    log_p = z - logsumexp
    p = log_p.exp()
    factor = torch.zeros_like(z[:, :1])
    if g is not None:
        factor = factor - g[:, None]
    if d_lse is not None:
        factor = factor + d_lse[:, None]
    dz = p * factor
    if e is not None:
        dz -= e[:, None] * torch.where(p > 0, p * (log_p + entropies), torch.zeros_like(p))
    if k is not None and ref is not None:
        log_q = reference.shaped_logits(ref.logits, *ref.scaling) - ref_logsumexp
        dz += k[:, None] * torch.where(p > 0, p * (log_p - log_q - kl), torch.zeros_like(p))
    if g is not None:
        dz.scatter_add_(1, labels[:, None], g[:, None])
    if scaling.softcap:
        dz *= 1 - (z * (scaling.temperature / scaling.softcap)).square()
    out.copy_(dz * (scaling.logit_scale / scaling.temperature))

"""Row operations by the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.ops.row_types import Reference, Scaling, Statistics, Upstream


def statistics(u: Tensor, labels: Tensor, scaling: Scaling, ref: Reference | None) -> Statistics:
    """See `rows.statistics`."""
    from fastppo.kernels.row_statistics import row_statistics

    return Statistics(*row_statistics(u, labels, **scaling._asdict(), **_ref_arguments(ref)))


def gradient(
    u: Tensor,
    labels: Tensor,
    stats: Statistics,
    upstream: Upstream,
    scaling: Scaling,
    out: Tensor,
    ref: Reference | None,
) -> None:
    """See `rows.gradient`."""
    from fastppo.kernels.logit_gradient import logit_gradient

    more = _ref_arguments(ref) | scaling._asdict()
    if ref is not None:
        more |= {"kl": stats.kl, "ref_logsumexp": stats.ref_logsumexp, "d_kl": upstream.kl}
    g = torch.zeros_like(stats.logprobs) if upstream.logprobs is None else upstream.logprobs
    known = (stats.logsumexp, stats.entropies, g, *upstream[1:3])
    logit_gradient(u, labels, *known, logprobs=stats.logprobs, out=out, **more)


def ppo(u: Tensor, labels: Tensor, terms: Any, scaling: Scaling, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `rows.ppo`."""
    from fastppo.kernels.ppo import ppo_rows

    names = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "ref_logprobs")
    given = {name: getattr(terms, name) for name in names} | scaling._asdict()
    result: tuple[Tensor, Tensor, Tensor] = ppo_rows(
        u, labels, terms.old_logprobs, terms.advantages, terms.weights, **given, out=out
    )
    return result


def _ref_arguments(ref: Reference | None) -> dict[str, Any]:
    return {} if ref is None else {"ref_logits": ref.logits, "ref_shape": ref.scaling._asdict()}

"""Row operations by the C++ kernels, which take addresses: what lies behind them is checked, and held, here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.ops.backends import native
from fastppo.ops.row_types import Reference, Scaling, Statistics, Upstream


def statistics(u: Tensor, labels: Tensor, scaling: Scaling, ref: Reference | None) -> Statistics:
    """See `rows.statistics`."""
    out = _empty_statistics(u, ref)
    native().row_statistics(_native_rows(u, labels, scaling, ref), _addresses(out))
    return out


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
    rows = _native_rows(u, labels, scaling, ref)
    # Named here, so that what is copied lives until the call ends.
    given = [None if part is None else part.to(torch.float32).contiguous() for part in upstream]
    known = _native_statistics(stats)
    native().logit_gradient(rows, _addresses(known), tuple(map(_address, given)), _matrix(out))


def ppo(u: Tensor, labels: Tensor, terms: Any, scaling: Scaling, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `rows.ppo`."""
    stats, losses = _empty_statistics(u, None), u.new_empty(len(u), dtype=torch.float32)
    parts = (terms.old_logprobs, terms.ref_logprobs, terms.advantages, terms.weights, losses)
    coefs = (terms.clip_low, terms.clip_high, terms.kl_coef, terms.entropy_coef)
    matrix = (0, 0, False) if out is None else _matrix(out)
    rows = _native_rows(u, labels, scaling, None)
    native().ppo_rows(rows, _addresses(stats), tuple(map(_address, parts)), coefs, matrix)
    return losses, stats.logprobs, stats.entropies


def _address(part: Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()


def _addresses(stats: Statistics) -> tuple[int, ...]:
    return tuple(map(_address, stats))


def _matrix(part: Tensor) -> tuple[int, int, bool]:
    """Describe (C, V) logits to the C++ kernels: address, elements from row to row, whether bf16."""
    if part.stride(1) != 1:
        raise ValueError(f"logits have strides {part.stride()}, expected 1 along the vocabulary: use .contiguous()")
    return part.data_ptr(), part.stride(0), part.dtype == torch.bfloat16


def _native_rows(u: Tensor, labels: Tensor, scaling: Scaling, ref: Reference | None) -> Any:
    if ref is not None and (ref.logits.shape != u.shape or ref.logits.dtype != u.dtype):
        raise ValueError(
            f"the reference's logits are {ref.logits.dtype} {tuple(ref.logits.shape)}, expected those of the policy: "
            f"{u.dtype} {tuple(u.shape)}"
        )
    return native().HeadRows(
        tuple(u.shape),
        _matrix(u),
        _native_scaling(scaling),
        labels.data_ptr(),
        (0, 0, False) if ref is None else _matrix(ref.logits),
        _native_scaling(Scaling() if ref is None else ref.scaling),
        torch.get_num_threads(),
    )


def _native_scaling(scaling: Scaling) -> tuple[float, float, float]:
    return scaling.logit_scale, scaling.softcap or 0.0, scaling.temperature


def _native_statistics(stats: Statistics) -> Statistics:
    """Return the statistics, which another backend may have made, in the dtypes that the C++ kernels read."""
    dtypes = (torch.float32, torch.float32, torch.float64, torch.float32, torch.float64)
    parts = zip(stats, dtypes, strict=True)
    return Statistics(*(None if part is None else part.to(dtype) for part, dtype in parts))  # type: ignore[arg-type]


def _empty_statistics(u: Tensor, ref: Reference | None) -> Statistics:
    logprobs, entropies, kl = u.new_empty(3, len(u), dtype=torch.float32).unbind()
    logsumexp, ref_logsumexp = u.new_empty(2, len(u), dtype=torch.float64).unbind()
    return Statistics(logprobs, entropies, logsumexp, *(() if ref is None else (kl, ref_logsumexp)))

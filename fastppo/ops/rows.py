"""Row operations on a chunk of raw logits (C, V), each on the backend that serves the tensor.

`statistics` reads the logits, `gradient` turns them into dLoss/d(logits) in place, `ppo` does both for PPO's loss while
a row is in the cache. The formulas of the reference backend below are those that the kernels implement.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo import reference
from fastppo.ops.backends import backend, native


class Scaling(NamedTuple):
    """From raw logits u to z = softcap·tanh(logit_scale·u / softcap) / temperature; without softcap, no tanh."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Statistics(NamedTuple):
    """One number a row, (C,) fp32 (fp64 for fp64 logits); the last two where there are reference logits.

    A log-sum-exp may have more digits than that, since the gradient takes it from logits of its own size.
    """

    logprobs: Tensor
    entropies: Tensor
    logsumexp: Tensor
    kl: Tensor | None = None
    ref_logsumexp: Tensor | None = None


class Upstream(NamedTuple):
    """dLoss by each statistic, (C,); None is zero."""

    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    logsumexp: Tensor | None = None
    kl: Tensor | None = None


class Reference(NamedTuple):
    """The raw logits (C, V) of the model that the exact KL is measured from, and their scaling."""

    logits: Tensor
    scaling: Scaling


def statistics(u: Tensor, labels: Tensor, scaling: Scaling, ref: Reference | None = None) -> Statistics:
    """Return log-prob of the label, entropy, log-sum-exp and, with a reference, the exact KL of each row."""
    kind = _backend(u)
    if kind == "native":
        out = _empty_statistics(u, ref)
        native().row_statistics(_native_rows(u, labels, scaling, ref), _addresses(out))
        return out
    if kind == "triton":
        from fastppo.kernels.row_statistics import row_statistics

        return Statistics(*row_statistics(u, labels, **scaling._asdict(), **_ref_arguments(ref)))
    z = _scale(u, scaling)
    basic = reference.row_statistics(z, labels)
    if ref is None:
        return Statistics(*basic)
    z_ref = _scale(ref.logits, ref.scaling)
    return Statistics(*basic, reference.exact_kl(z, z_ref), z_ref.logsumexp(-1))


def gradient(
    u: Tensor,
    labels: Tensor,
    stats: Statistics,
    upstream: Upstream,
    scaling: Scaling,
    *,
    out: Tensor,
    ref: Reference | None = None,
) -> Tensor:
    """Write dLoss/du into `out` (C, V), which may be `u` itself, and return it."""
    kind = _backend(u)
    if kind == "native":
        rows = _native_rows(u, labels, scaling, ref)
        given = [None if part is None else part.to(torch.float32).contiguous() for part in upstream]
        native().logit_gradient(rows, _addresses(stats), tuple(map(_address, given)), _matrix(out))
        return out
    if kind == "triton":
        from fastppo.kernels.logit_gradient import logit_gradient

        more: dict[str, Any] = _ref_arguments(ref)
        if ref is not None:
            more |= {"kl": stats.kl, "ref_logsumexp": stats.ref_logsumexp, "d_kl": upstream.kl}
        up = (torch.zeros_like(stats.logprobs) if upstream.logprobs is None else upstream.logprobs, *upstream[1:3])
        more["logprobs"] = stats.logprobs
        logit_gradient(u, labels, stats.logsumexp, stats.entropies, *up, **scaling._asdict(), out=out, **more)
        return out
    return out.copy_(_reference_gradient(_scale(u, scaling), labels, stats, upstream, scaling, ref))


def ppo(u: Tensor, labels: Tensor, terms: Any, scaling: Scaling, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses, logprobs, entropies), (C,), of PPO's loss with dLoss/du in `out`, in one pass over each row.

    `terms` holds this chunk's old_logprobs or None, ref_logprobs or None, advantages, weights (C,) fp32 and clip_low,
    clip_high, kl_coef, entropy_coef. Only for the backends that `has_fused_ppo` names.
    """
    if _backend(u) == "native":
        stats, losses = _empty_statistics(u, None), u.new_empty(len(u), dtype=torch.float32)
        parts = (terms.old_logprobs, terms.ref_logprobs, terms.advantages, terms.weights, losses)
        coefs = (terms.clip_low, terms.clip_high, terms.kl_coef, terms.entropy_coef)
        matrix = (0, 0, False) if out is None else _matrix(out)
        rows = _native_rows(u, labels, scaling, None)
        native().ppo_rows(rows, _addresses(stats), tuple(map(_address, parts)), coefs, matrix)
        return losses, stats.logprobs, stats.entropies
    from fastppo.kernels.ppo import ppo_rows

    names = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "ref_logprobs")
    given = {name: getattr(terms, name) for name in names} | scaling._asdict()
    result: tuple[Tensor, Tensor, Tensor] = ppo_rows(
        u, labels, terms.old_logprobs, terms.advantages, terms.weights, **given, out=out
    )
    return result


def has_fused_ppo(u: Tensor) -> bool:
    """Whether `ppo` serves these logits; without it, the loss goes between `statistics` and `gradient`."""
    return _backend(u) != "reference"


def _backend(u: Tensor) -> str:
    """Return the backend for these logits: the C++ kernels know fp32 and bf16, the interpreter no bf16."""
    kind = backend(u.device)
    return "reference" if kind == "native" and u.dtype not in (torch.float32, torch.bfloat16) else kind


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


def _empty_statistics(u: Tensor, ref: Reference | None) -> Statistics:
    logprobs, entropies, kl = u.new_empty(3, len(u), dtype=torch.float32).unbind()
    logsumexp, ref_logsumexp = u.new_empty(2, len(u), dtype=torch.float64).unbind()
    return Statistics(logprobs, entropies, logsumexp, *(() if ref is None else (kl, ref_logsumexp)))


def _ref_arguments(ref: Reference | None) -> dict[str, Any]:
    return {} if ref is None else {"ref_logits": ref.logits, "ref_shape": ref.scaling._asdict()}


def _scale(u: Tensor, scaling: Scaling) -> Tensor:
    """Return z in fp32 or wider."""
    return reference.shaped_logits(u, *scaling)


def _reference_gradient(
    z: Tensor, labels: Tensor, stats: Statistics, upstream: Upstream, scaling: Scaling, ref: Reference | None
) -> Tensor:
    """Return dL/du; dL/dz = g (1[v = y] - p) - e p (log p + H) + l p + k p (log p - log q - KL)."""
    g, e, d_lse, k = upstream
    log_p = z - stats.logsumexp[:, None]
    p = log_p.exp()
    slope = torch.zeros_like(stats.logprobs) if g is None else -g
    dz = p * (slope if d_lse is None else slope + d_lse)[:, None]
    if e is not None:
        dz -= e[:, None] * torch.where(p > 0, p * (log_p + stats.entropies[:, None]), torch.zeros_like(p))
    if k is not None and ref is not None and stats.kl is not None and stats.ref_logsumexp is not None:
        log_q = _scale(ref.logits, ref.scaling) - stats.ref_logsumexp[:, None]
        dz += k[:, None] * torch.where(p > 0, p * (log_p - log_q - stats.kl[:, None]), torch.zeros_like(p))
    if g is not None:
        dz.scatter_add_(1, labels[:, None], g[:, None])
    if scaling.softcap:
        dz *= 1 - (z * (scaling.temperature / scaling.softcap)).square()
    return dz * (scaling.logit_scale / scaling.temperature)

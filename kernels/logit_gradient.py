"""The gradient of raw logits from the derivatives of a loss by a row's statistics, in one pass over the row.

With g, e, d_lse, d_kl = dL/d(logprob, entropy, logsumexp, KL to a reference), p = softmax z, label y, entropy H:
dL/dz_j = g (1[j = y] - p_j) - e p_j (log p_j + H) + d_lse p_j + d_kl p_j (log p_j - log q_j - KL), dL/du = dL/dz dz/du.

The label's 1 - p is -expm1(log p) and is stored once, in the place of the rest: added to a gradient that was already
rounded, it would lose a confident token's digits. Each element belongs to one program: no atomics, and the result
does not depend on how many rows there are. `out` may be the logits themselves.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastppo.kernels.row_statistics import LAUNCH, MAX_BLOCK, label_logprob
from fastppo.kernels.scaling import (
    accumulator,
    check_beside,
    check_logits,
    check_rows,
    load_scaled,
    scales,
    slope,
)
from torch import Tensor


@triton.jit
def expm1(x):
    """Return exp(x) - 1 for x <= 0 without cancellation near 0; the interpreter has no libdevice."""
    # Taylor's series by Horner's rule, to the last digit of fp64 on [-1/2, 0].
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(16):
        series = 1.0 + series * x / (17 - i)
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def write_gradient(
    row,
    ref_row,
    out_ptr,
    label,
    statistics,
    upstream,
    HAS_SOFTCAP: tl.constexpr,
    HAS_E: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_KL: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dL/du of one row; zeros where nothing is asked of it or it is empty.

    statistics is (m, log s, logprob, entropy, kl, m' + log s') and upstream (g, e, d_lse, d_kl).
    """
    vocabulary, inner, outer = row[1], row[2], row[3]
    m, log_s, logprob, entropy, kl, ref_logsumexp = statistics
    g, e, d_lse, d_kl = upstream
    is_live = g != 0
    if HAS_E:
        is_live = is_live | (e != 0)
    if HAS_LSE:
        is_live = is_live | (d_lse != 0)
    if HAS_KL:
        is_live = is_live | (d_kl != 0)
    is_live = is_live & (m + log_s != float("-inf"))
    # A label that does not exist is NaN here and makes the whole row NaN, unless nothing is asked of its log-prob.
    g = tl.where((logprob == logprob) | (g == 0), g, float("nan"))
    label_gradient = g * -expm1(tl.minimum(logprob, 0.0))
    label_gradient = tl.where(g == 0, 0.0, label_gradient)
    # In place, no thread may store before every thread has read the label's logit.
    tl.debug_barrier()
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        du = tl.zeros((BLOCK,), ACC)
        if is_live:
            u, z = load_scaled(row, columns, HAS_SOFTCAP, ACC)
            log_p = z - m - log_s
            p = tl.exp(log_p)
            factor = tl.zeros((BLOCK,), ACC)
            if HAS_LSE:
                factor += d_lse
            if HAS_E:
                factor -= e * (log_p + entropy)
            if HAS_KL:
                _, ref_z = load_scaled(ref_row, columns, REF_SOFTCAP, ACC)
                # An infinite KL of a row that does not ask for it stays out.
                factor += tl.where(d_kl == 0, 0.0, d_kl * (log_p - (ref_z - ref_logsumexp) - kl))
            # Where p is 0, log p is -inf.
            rest = tl.where(p > 0, p * factor, 0.0)
            dz = rest + tl.where(columns == label, label_gradient, -g * p)
            du = dz * slope(u, inner, outer, HAS_SOFTCAP)
        tl.store(out_ptr + columns, du.to(out_ptr.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def _logit_gradient_kernel(
    logits_ptr,
    labels_ptr,
    ref_ptr,
    out_ptr,
    logprobs_ptr,
    logsumexp_ptr,
    entropy_ptr,
    kl_ptr,
    ref_logsumexp_ptr,
    g_ptr,
    e_ptr,
    d_lse_ptr,
    d_kl_ptr,
    # fp64, because Triton passes a Python float as fp32 otherwise: too coarse for fp64 logits.
    inner: tl.float64,
    outer: tl.float64,
    ref_inner: tl.float64,
    ref_outer: tl.float64,
    vocabulary,
    stride_row,
    ref_stride_row,
    out_stride_row,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_E: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_KL: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = (logits_ptr + at * stride_row, vocabulary, tl.full((), inner, ACC), tl.full((), outer, ACC))
    zero = tl.zeros((), ACC)
    e, d_lse, d_kl, kl, ref_logsumexp, ref_row = zero, zero, zero, zero, zero, row
    if HAS_E:
        e = tl.load(e_ptr + at).to(ACC)
    if HAS_LSE:
        d_lse = tl.load(d_lse_ptr + at).to(ACC)
    if HAS_KL:
        ref_ptr += at * ref_stride_row
        ref_row = (ref_ptr, vocabulary, tl.full((), ref_inner, ACC), tl.full((), ref_outer, ACC))
        d_kl, kl = tl.load(d_kl_ptr + at).to(ACC), tl.load(kl_ptr + at).to(ACC)
        ref_logsumexp = tl.load(ref_logsumexp_ptr + at).to(ACC)
    label, logsumexp = tl.load(labels_ptr + at), tl.load(logsumexp_ptr + at).to(ACC)
    logprob = label_logprob(row, label, logsumexp, zero, HAS_SOFTCAP, ACC)
    if HAS_LOGPROB:
        logprob = tl.load(logprobs_ptr + at).to(ACC)
    g, entropy = tl.load(g_ptr + at).to(ACC), tl.load(entropy_ptr + at).to(ACC)
    write_gradient(
        row,
        ref_row,
        out_ptr + at * out_stride_row,
        label,
        (logsumexp, zero, logprob, entropy, kl, ref_logsumexp),
        (g, e, d_lse, d_kl),
        HAS_SOFTCAP,
        HAS_E,
        HAS_LSE,
        HAS_KL,
        REF_SOFTCAP,
        ACC,
        BLOCK,
    )


def logit_gradient(
    logits: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    g: Tensor,
    e: Tensor | None = None,
    d_lse: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    out: Tensor,
    logprobs: Tensor | None = None,
    ref_logits: Tensor | None = None,
    kl: Tensor | None = None,
    ref_logsumexp: Tensor | None = None,
    d_kl: Tensor | None = None,
    ref_shape: dict[str, Any] | None = None,
) -> Tensor:
    """Write dL/d(raw logits) of (N, V) into `out` (N, V), which may be the logits themselves, and return it.

    `logsumexp`, `entropy`, `kl`, `ref_logsumexp` (N,) come from `row_statistics` on the same logits and shape; g, e,
    d_lse, d_kl (N,) are the derivatives of the loss, None being 0. With `logprobs`, too, a confident label keeps
    digits that a log-sum-exp of large logits has lost. A row without any derivative gets zeros, whatever is in it; one
    with a label outside [0, V) and a g gets NaN. Raises ValueError for tensors or numbers that cannot be served.
    """
    shape = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    (inner, outer), (ref_inner, ref_outer) = scales(**shape), scales(**(shape if ref_shape is None else ref_shape))
    check_logits(logits)
    check_out(out, logits)
    # What autograd hands over may be one number, expanded.
    g, e, d_lse, d_kl = (None if part is None else part.contiguous() for part in (g, e, d_lse, d_kl))
    check_rows(logits, torch.int64, labels=labels)
    check_rows(logits, None, logsumexp=logsumexp, entropy=entropy, g=g, e=e, d_lse=d_lse, logprobs=logprobs)
    check_rows(logits, None, kl=kl, ref_logsumexp=ref_logsumexp, d_kl=d_kl)
    if d_kl is not None:
        if ref_logits is None or kl is None or ref_logsumexp is None:
            raise ValueError("d_kl is given without ref_logits, kl or ref_logsumexp: pass what row_statistics gave")
        check_beside(ref_logits, logits, "ref_logits")
    num_rows, vocabulary = logits.shape
    if num_rows:
        _logit_gradient_kernel[(num_rows,)](
            logits,
            labels,
            ref_logits,
            out,
            logprobs,
            logsumexp,
            entropy,
            kl,
            ref_logsumexp,
            g,
            e,
            d_lse,
            d_kl,
            inner,
            outer,
            ref_inner,
            ref_outer,
            vocabulary,
            logits.stride(0),
            0 if ref_logits is None else ref_logits.stride(0),
            out.stride(0),
            HAS_SOFTCAP=inner != 0,
            HAS_LOGPROB=logprobs is not None,
            HAS_E=e is not None,
            HAS_LSE=d_lse is not None,
            HAS_KL=d_kl is not None,
            REF_SOFTCAP=ref_inner != 0,
            ACC=accumulator(logits)[1],
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(vocabulary)),
            **LAUNCH,
        )
    return out


def check_out(out: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless `out` can take the gradient: the logits' shape, and either all of them or apart."""
    check_beside(out, logits, "out")
    same = (out.dtype, out.stride()) == (logits.dtype, logits.stride())
    if out.data_ptr() == logits.data_ptr() and out.numel() and not same:
        raise ValueError(
            f"out shares the logits' memory as {out.dtype} {out.stride()}, expected {logits.dtype} {logits.stride()}: "
            "pass the logits themselves or a buffer of its own"
        )

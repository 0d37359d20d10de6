"""Log-prob of a label, entropy, log-sum-exp and KL to a reference of each row of logits, in one pass over the row.

z scaled logits (see scaling.py), m = max z, s = Σ exp(z - m), a = Σ exp(z - m) (z - m):
logsumexp = m + log s, logprob = z_y - m - log s, entropy = log s - a / s.
With a reference's z', m', s' and c = Σ exp(z - m) ((z - m) - (z' - m')): KL(π || π') = c / s - log s + log s'.

Sums are taken relative to the running maximum, so that logits of any size cost no digits, and equal rows have a KL of
exactly 0. Memory traffic: every logit is read once, nothing of size V is written.
Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastppo.kernels.scaling import accumulator, check_beside, check_logits, check_rows, load_scaled, scale, scales
from torch import Tensor

# One program reads a row in blocks of this many logits; 4096 keeps the accumulators and a block of fp32 within
# 8 warps' registers without spills (the ahead-of-time test holds that).
MAX_BLOCK = 4096
# Contraction to fused multiply-adds is asked for by name because its default changes with Triton 3.10.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def accumulate_row(
    row,
    ref_row,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return (m, log s, entropy, kl, m' + log s') of one row; the last two are 0 without a reference."""
    # A finite floor: exp(-inf - -inf) of a row that begins with a block of -inf would be NaN.
    m = tl.full((), -1e30, ACC)
    ref_m = tl.full((), -1e30, ACC)
    s, a, ref_s, c = tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC)
    for start in range(0, row[1], BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _, z = load_scaled(row, columns, HAS_SOFTCAP, ACC)
        new_m = tl.maximum(m, tl.max(z, axis=0))
        shifted = z - new_m
        p = tl.exp(shifted)
        rescale = tl.exp(m - new_m)
        if HAS_REF:
            _, ref_z = load_scaled(ref_row, columns, REF_SOFTCAP, ACC)
            new_ref_m = tl.maximum(ref_m, tl.max(ref_z, axis=0))
            ref_shifted = ref_z - new_ref_m
            moved = c + s * ((m - new_m) - (ref_m - new_ref_m))
            # An infinite c (a token that only the reference excludes) must not meet a rescale of 0.
            c = tl.where(rescale > 0, rescale * moved, 0.0)
            c += tl.sum(tl.where(p > 0, p * (shifted - ref_shifted), 0.0), axis=0)
            ref_s = tl.exp(ref_m - new_ref_m) * ref_s + tl.sum(tl.exp(ref_shifted), axis=0)
            ref_m = new_ref_m
        a = rescale * (a + s * (m - new_m)) + tl.sum(tl.where(p > 0, p * shifted, 0.0), axis=0)
        s = rescale * s + tl.sum(p, axis=0)
        m = new_m
    # A row of nothing but -inf has s = 0: its log-sum-exp is -inf by definition, its entropy and KL 0.
    is_empty = s == 0
    log_s = tl.log(s)
    entropy = tl.where(is_empty, 0.0, log_s - a / s)
    kl, ref_logsumexp = tl.zeros((), ACC), tl.zeros((), ACC)
    if HAS_REF:
        ref_log_s = tl.log(ref_s)
        # Beside an empty reference c is infinite already.
        kl = tl.where(is_empty, 0.0, c / s - log_s + tl.where(ref_s == 0, 0.0, ref_log_s))
        ref_logsumexp = ref_m + ref_log_s
    return m, log_s, entropy, kl, ref_logsumexp


@triton.jit
def label_logprob(row, label, m, log_s, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """Return log p of the label: -inf in a row of nothing but -inf, NaN for a label outside the vocabulary."""
    row_ptr, vocabulary, inner, outer = row
    is_valid = (label >= 0) & (label < vocabulary)
    u = tl.load(row_ptr + tl.where(is_valid, label, 0)).to(ACC)
    logprob = scale(u, inner, outer, HAS_SOFTCAP) - m - log_s
    logprob = tl.where(log_s == float("-inf"), float("-inf"), logprob)
    return tl.where(is_valid, logprob, float("nan"))


@triton.jit
def _row_statistics_kernel(
    logits_ptr,
    labels_ptr,
    ref_ptr,
    logprobs_ptr,
    entropy_ptr,
    logsumexp_ptr,
    kl_ptr,
    ref_logsumexp_ptr,
    # fp64, because Triton passes a Python float as fp32 otherwise: too coarse for fp64 logits.
    inner: tl.float64,
    outer: tl.float64,
    ref_inner: tl.float64,
    ref_outer: tl.float64,
    vocabulary,
    stride_row,
    ref_stride_row,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = (logits_ptr + at * stride_row, vocabulary, tl.full((), inner, ACC), tl.full((), outer, ACC))
    ref_row = row
    if HAS_REF:
        ref_ptr += at * ref_stride_row
        ref_row = (ref_ptr, vocabulary, tl.full((), ref_inner, ACC), tl.full((), ref_outer, ACC))
    m, log_s, entropy, kl, ref_logsumexp = accumulate_row(row, ref_row, HAS_SOFTCAP, HAS_REF, REF_SOFTCAP, ACC, BLOCK)
    logprob = label_logprob(row, tl.load(labels_ptr + at), m, log_s, HAS_SOFTCAP, ACC)
    tl.store(logprobs_ptr + at, logprob)
    tl.store(entropy_ptr + at, entropy)
    tl.store(logsumexp_ptr + at, m + log_s)
    if HAS_REF:
        tl.store(kl_ptr + at, kl)
        tl.store(ref_logsumexp_ptr + at, ref_logsumexp)


def row_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logits: Tensor | None = None,
    ref_shape: dict[str, Any] | None = None,
) -> tuple[Tensor, ...]:
    """Return (logprobs, entropy, logsumexp), (N,) fp32 each (fp64 for fp64 logits), in nats, of raw logits (N, V).

    `labels` is (N,) int64; the log-prob of a label outside [0, V) is NaN. Beside `ref_logits` (N, V), whose
    temperature, softcap and logit_scale are `ref_shape` (None: the same), two more: KL(π || π_ref), exact over the
    vocabulary, and the reference's log-sum-exp. Raises ValueError for tensors or numbers that cannot be served.
    """
    shape = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    (inner, outer), (ref_inner, ref_outer) = scales(**shape), scales(**(shape if ref_shape is None else ref_shape))
    check_logits(logits)
    check_rows(logits, torch.int64, labels=labels)
    if ref_logits is not None:
        check_beside(ref_logits, logits, "ref_logits")
    (num_rows, vocabulary), (dtype, acc) = logits.shape, accumulator(logits)
    number = 3 if ref_logits is None else 5
    results = tuple(torch.empty(num_rows, dtype=dtype, device=logits.device) for _ in range(number))
    if num_rows:
        _row_statistics_kernel[(num_rows,)](
            logits,
            labels,
            ref_logits,
            *results,
            *(None,) * (5 - number),
            inner,
            outer,
            ref_inner,
            ref_outer,
            vocabulary,
            logits.stride(0),
            0 if ref_logits is None else ref_logits.stride(0),
            HAS_SOFTCAP=inner != 0,
            HAS_REF=ref_logits is not None,
            REF_SOFTCAP=ref_inner != 0,
            ACC=acc,
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(vocabulary)),
            **LAUNCH,
        )
    return results

"""Log-prob of a label, entropy and log-sum-exp of each row of logits, in one pass over the row.

z = cap tanh(u / cap) / tau (u / tau without a cap), m = max z, s = Σ exp(z - m), a = Σ exp(z - m) (z - m):
logsumexp = m + log s, logprob = z_y - m - log s, entropy = log s - a / s.

Sums are taken relative to the running maximum, so that logits of any size cost no digits. Memory traffic: every logit
is read once, nothing of size V is written. Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program reads a row in blocks of this many logits; 4096 keeps the three accumulators and a block of fp32 within
# 8 warps' registers without spills (the ahead-of-time test holds that).
_MAX_BLOCK = 4096
# Contraction to fused multiply-adds is asked for by name because its default changes with Triton 3.10.
_LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _scale(u, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    if HAS_SOFTCAP:
        # tanh by exp of a negative number: no overflow, and the interpreter has no libdevice.
        decay = tl.exp(-2.0 * tl.abs(u) / softcap)
        capped = softcap * (1.0 - decay) / (1.0 + decay)
        u = tl.where(u < 0, -capped, capped)
    return u * inverse_temperature


@triton.jit
def _row_statistics_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    logsumexp_ptr,
    # fp64, because Triton passes a Python float as fp32 otherwise: too coarse for fp64 logits.
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    vocabulary,
    stride_row,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    inverse_temperature = tl.full((), inverse_temperature, ACC)
    softcap = tl.full((), softcap, ACC)
    # A finite floor: exp(-inf - -inf) of a row that begins with a block of -inf would be NaN.
    m = tl.full((), -1e30, ACC)
    s = tl.zeros((), ACC)
    a = tl.zeros((), ACC)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        u = tl.load(row_ptr + columns, mask=inside, other=0.0).to(ACC)
        # The tail is masked after scaling, where a cap can no longer turn -inf into a finite number.
        z = tl.where(inside, _scale(u, inverse_temperature, softcap, HAS_SOFTCAP), float("-inf"))
        new_m = tl.maximum(m, tl.max(z, axis=0))
        shifted = z - new_m
        p = tl.exp(shifted)
        rescale = tl.exp(m - new_m)
        a = rescale * (a + s * (m - new_m)) + tl.sum(tl.where(p > 0, p * shifted, 0.0), axis=0)
        s = rescale * s + tl.sum(p, axis=0)
        m = new_m
    label = tl.load(labels_ptr + row)
    is_valid = (label >= 0) & (label < vocabulary)
    u_label = tl.load(row_ptr + tl.where(is_valid, label, 0)).to(ACC)
    z_label = _scale(u_label, inverse_temperature, softcap, HAS_SOFTCAP)
    log_s = tl.log(s)
    # A row of nothing but -inf has s = 0: log-prob and log-sum-exp are -inf by definition, the entropy 0.
    is_empty = s == 0
    logprob = tl.where(is_empty, float("-inf"), z_label - m - log_s)
    tl.store(logprobs_ptr + row, tl.where(is_valid, logprob, float("nan")))
    tl.store(entropy_ptr + row, tl.where(is_empty, 0.0, log_s - a / s))
    tl.store(logsumexp_ptr + row, m + log_s)


def row_statistics(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), (N,) fp32 each (fp64 for fp64 logits), in nats, of logits (N, V).

    `labels` is (N,) int64; the log-prob of a label outside [0, V) is NaN. A softcap of None or 0 is none.
    Raises ValueError for shapes, types, devices or scalars that cannot be served.
    """
    _check(logits, labels, temperature, softcap)
    num_rows, vocabulary = logits.shape
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs, entropy, logsumexp = (torch.empty(num_rows, dtype=acc, device=logits.device) for _ in range(3))
    if num_rows:
        _row_statistics_kernel[(num_rows,)](
            logits,
            labels,
            logprobs,
            entropy,
            logsumexp,
            1.0 / temperature,
            softcap or 0.0,
            vocabulary,
            logits.stride(0),
            HAS_SOFTCAP=bool(softcap),
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK=min(_MAX_BLOCK, triton.next_power_of_2(vocabulary)),
            **_LAUNCH,
        )
    return logprobs, entropy, logsumexp


def _check(logits: Tensor, labels: Tensor, temperature: float, softcap: float | None) -> None:
    shape = tuple(logits.shape)
    if logits.ndim != 2 or shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {shape}, expected floating point (N, V) with V >= 1")
    if logits.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}, expected 1 along the vocabulary: use .contiguous()")
    if labels.dtype != torch.int64 or labels.shape != shape[:1]:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, expected torch.int64 {shape[:1]}")
    if not labels.is_contiguous() or labels.device != logits.device:
        raise ValueError(f"labels on {labels.device} must lie contiguous beside the logits on {logits.device}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0 (argmax is greedy choice)")
    if softcap is not None and not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap}, expected None or a finite number of at least 0")

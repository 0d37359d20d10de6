"""PPO's clipped loss with the k1 penalty: coefficients, an elementwise kernel, and the loss head in one launch.

loss = w (max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef (log π - log π_ref)), r = π / π_old, per token;
`ppo_rows` goes from raw logits to losses and dL/d(logits): statistics, these coefficients, gradient, and the logits are
read twice. Sources: Schulman et al. (arXiv:1707.06347) eq. 7; closed forms of the derivatives by hand.
"""

import torch
import triton
import triton.language as tl
from fastppo.kernels.logit_gradient import check_out, write_gradient
from fastppo.kernels.row_statistics import LAUNCH, MAX_BLOCK, accumulate_row, label_logprob
from fastppo.kernels.scaling import accumulator, check_logits, check_rows, scales
from torch import Tensor

# Tokens of one program of the elementwise kernel.
BLOCK = 1024


@triton.jit
def ppo_coefficients(
    logprob, old, ref, advantage, weight, clip_low, clip_high, kl_coef, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr
):
    """Return (loss, g), g = dloss/dlogprob; without old, the old log-prob is the new one, detached.

    Inside the clip range, its ends included, g = -w A r as autograd has it. Where w is 0 both are 0, whatever else.
    """
    ratio = tl.zeros_like(logprob) + 1.0
    if HAS_OLD:
        ratio = tl.exp(logprob - old)
    low, high = (1.0 - clip_low).to(logprob.dtype), (1.0 + clip_high).to(logprob.dtype)
    # An advantage of 0 must not meet a ratio that has overflowed.
    unclipped = tl.where(advantage == 0, 0.0, -advantage * ratio)
    clipped = -advantage * tl.minimum(tl.maximum(ratio, low), high)
    is_clipped = unclipped < clipped
    loss = tl.where(is_clipped, clipped, unclipped)
    g = tl.where(is_clipped, 0.0, unclipped)
    if HAS_REF:
        kl_coef = kl_coef.to(logprob.dtype)
        loss += kl_coef * (logprob - ref)
        g += kl_coef
    return tl.where(weight == 0, 0.0, weight * loss), tl.where(weight == 0, 0.0, weight * g)


@triton.jit
def _ppo_loss_kernel(
    logprobs_ptr,
    old_ptr,
    ref_ptr,
    advantages_ptr,
    weights_ptr,
    losses_ptr,
    g_ptr,
    clip_low: tl.float64,
    clip_high: tl.float64,
    kl_coef: tl.float64,
    num_tokens,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    logprob = tl.load(logprobs_ptr + token, mask=inside, other=0.0)
    advantage = tl.load(advantages_ptr + token, mask=inside, other=0.0).to(logprob.dtype)
    weight = tl.load(weights_ptr + token, mask=inside, other=0.0).to(logprob.dtype)
    old, ref = logprob, logprob
    if HAS_OLD:
        old = tl.load(old_ptr + token, mask=inside, other=0.0).to(logprob.dtype)
    if HAS_REF:
        ref = tl.load(ref_ptr + token, mask=inside, other=0.0).to(logprob.dtype)
    clip_low, clip_high = tl.full((), clip_low, tl.float64), tl.full((), clip_high, tl.float64)
    kl_coef = tl.full((), kl_coef, tl.float64)
    loss, g = ppo_coefficients(logprob, old, ref, advantage, weight, clip_low, clip_high, kl_coef, HAS_OLD, HAS_REF)
    tl.store(losses_ptr + token, loss, mask=inside)
    tl.store(g_ptr + token, g, mask=inside)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss of each token and its derivative by the log-prob, (T,) each, from (T,) tensors.

    `logprobs` are fp32 or fp64 and give the result its type. `old_logprobs` of None are the new ones, detached.
    Raises ValueError for tensors or numbers that cannot be served.
    """
    if logprobs.ndim != 1 or logprobs.dtype not in (torch.float32, torch.float64) or not logprobs.is_contiguous():
        shape = tuple(logprobs.shape)
        raise ValueError(f"logprobs are {logprobs.dtype} {shape}, expected torch.float32 or float64 (T,), contiguous")
    _check_coefficients(clip_low, clip_high, kl_coef, ref_logprobs)
    check_rows(
        logprobs, None, old_logprobs=old_logprobs, advantages=advantages, weights=weights, ref_logprobs=ref_logprobs
    )
    losses, g = torch.empty_like(logprobs), torch.empty_like(logprobs)
    if len(logprobs):
        _ppo_loss_kernel[(triton.cdiv(len(logprobs), BLOCK),)](
            logprobs,
            old_logprobs,
            ref_logprobs,
            advantages,
            weights,
            losses,
            g,
            clip_low,
            clip_high,
            kl_coef,
            len(logprobs),
            HAS_OLD=old_logprobs is not None,
            HAS_REF=kl_coef != 0,
            BLOCK=BLOCK,
            **LAUNCH,
        )
    return losses, g


@triton.jit
def _ppo_rows_kernel(
    logits_ptr,
    labels_ptr,
    old_ptr,
    ref_ptr,
    advantages_ptr,
    weights_ptr,
    out_ptr,
    losses_ptr,
    logprobs_ptr,
    entropy_ptr,
    clip_low: tl.float64,
    clip_high: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    inner: tl.float64,
    outer: tl.float64,
    vocabulary,
    stride_row,
    out_stride_row,
    HAS_SOFTCAP: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_E: tl.constexpr,
    HAS_OUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = (logits_ptr + at * stride_row, vocabulary, tl.full((), inner, ACC), tl.full((), outer, ACC))
    m, log_s, entropy, _, _ = accumulate_row(row, row, HAS_SOFTCAP, False, False, ACC, BLOCK)
    label = tl.load(labels_ptr + at)
    logprob = label_logprob(row, label, m, log_s, HAS_SOFTCAP, ACC)
    advantage, weight = tl.load(advantages_ptr + at).to(ACC), tl.load(weights_ptr + at).to(ACC)
    old, ref, e, zero = logprob, logprob, tl.zeros((), ACC), tl.zeros((), ACC)
    if HAS_OLD:
        old = tl.load(old_ptr + at).to(ACC)
    if HAS_REF:
        ref = tl.load(ref_ptr + at).to(ACC)
    clip_low, clip_high = tl.full((), clip_low, tl.float64), tl.full((), clip_high, tl.float64)
    kl_coef = tl.full((), kl_coef, tl.float64)
    loss, g = ppo_coefficients(logprob, old, ref, advantage, weight, clip_low, clip_high, kl_coef, HAS_OLD, HAS_REF)
    if HAS_E:
        e = -tl.full((), entropy_coef, ACC) * weight
        loss += tl.where(e == 0, 0.0, e * entropy)
    tl.store(losses_ptr + at, loss)
    tl.store(logprobs_ptr + at, logprob)
    tl.store(entropy_ptr + at, entropy)
    if HAS_OUT:
        statistics, upstream = (m, log_s, logprob, entropy, zero, zero), (g, e, zero, zero)
        write_gradient(
            row,
            row,
            out_ptr + at * out_stride_row,
            label,
            statistics,
            upstream,
            HAS_SOFTCAP,
            HAS_E,
            False,
            False,
            False,
            ACC,
            BLOCK,
        )


def ppo_rows(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses, logprobs, entropies), (N,) fp32 (fp64 for fp64 logits), of raw logits (N, V), in one launch.

    losses = `ppo_loss` of the labels' log-probs - entropy_coef · weight · entropy. dL/d(raw logits) of their sum goes
    into `out` (N, V), which may be the logits themselves; None makes no gradient. A row of weight 0 has a loss and a
    gradient of 0, whatever is in it. Raises ValueError for tensors or numbers that cannot be served.
    """
    inner, outer = scales(temperature, softcap, logit_scale)
    check_logits(logits)
    check_rows(logits, torch.int64, labels=labels)
    check_rows(
        logits, None, old_logprobs=old_logprobs, advantages=advantages, weights=weights, ref_logprobs=ref_logprobs
    )
    _check_coefficients(clip_low, clip_high, kl_coef, ref_logprobs)
    if out is not None:
        check_out(out, logits)
    (num_rows, vocabulary), (dtype, acc) = logits.shape, accumulator(logits)
    results = tuple(torch.empty(num_rows, dtype=dtype, device=logits.device) for _ in range(3))
    if num_rows:
        _ppo_rows_kernel[(num_rows,)](
            logits,
            labels,
            old_logprobs,
            ref_logprobs,
            advantages,
            weights,
            out,
            *results,
            clip_low,
            clip_high,
            kl_coef,
            entropy_coef,
            inner,
            outer,
            vocabulary,
            logits.stride(0),
            0 if out is None else out.stride(0),
            HAS_SOFTCAP=inner != 0,
            HAS_OLD=old_logprobs is not None,
            HAS_REF=kl_coef != 0,
            HAS_E=entropy_coef != 0,
            HAS_OUT=out is not None,
            ACC=acc,
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(vocabulary)),
            **LAUNCH,
        )
    return results[0], results[1], results[2]


def _check_coefficients(clip_low: float, clip_high: float, kl_coef: float, ref_logprobs: Tensor | None) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}, expected at least 0: the distance of the clip from a ratio of 1")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef} without ref_logprobs: pass them, or a kl_coef of 0")

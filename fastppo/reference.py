"""Every operation in plain PyTorch: the specification that the fast paths are tested against.

Works in any float dtype, fp64 included, on any device, and differentiates by autograd. Shapes: T rows (tokens),
H hidden size, V vocabulary, B samples; `offsets` (B + 1,) int64 are the starts of the samples in a flat (T,) tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def scaled_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return z = softcap·tanh(scale·(h Wᵀ + b) / softcap) / temperature, (T, V), in fp32 or wider.

    Source: Gemma 2 (arXiv:2408.00118) section 2 for the soft cap, Cohere's models for the scale.
    """
    return shaped_logits(torch.nn.functional.linear(hidden, weight, bias), temperature, softcap, logit_scale)


def shaped_logits(logits: Tensor, temperature: float, softcap: float | None, logit_scale: float) -> Tensor:
    """Return z = softcap·tanh(scale·u / softcap) / temperature of raw logits u, in fp32 or wider."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * logit_scale if logit_scale != 1.0 else logits
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return logits / temperature if temperature != 1.0 else logits


def row_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-prob of each label, entropy and log-sum-exp of each row, (T,) each, in the logits' dtype.

    log p_y = z_y - L,  L = log Σ exp z,  entropy = L - Σ p z  (tokens of probability 0 count 0).

    >>> row_statistics(torch.zeros(1, 4), torch.tensor([2]))[1]
    tensor([1.3863])
    """
    # From the row's maximum, so that the rounding error does not grow with the size of the logits.
    largest = logits.detach().amax(-1)
    shifted = logits - largest[:, None]
    rest = shifted.logsumexp(-1)
    probs = torch.softmax(shifted, -1)
    entropy = rest - (probs * torch.where(probs > 0, shifted, torch.zeros_like(shifted))).sum(-1)
    return shifted.gather(-1, labels[:, None]).squeeze(-1) - rest, entropy, rest + largest


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), (T,) each, of labels (T,) under hidden (T, H) and weight (V, H)."""
    return row_statistics(scaled_logits(hidden, weight, bias, temperature, softcap, logit_scale), labels)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: RowLoss,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return Σ loss(logprobs, entropies, rows), a scalar, with rows (T,) the numbers of the rows handed over."""
    rows = torch.arange(len(labels), device=labels.device)
    logits = scaled_logits(hidden, weight, bias, temperature, softcap, logit_scale)
    logprobs, entropy, _ = row_statistics(logits, labels)
    return loss(logprobs, entropy, rows).sum()


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Return KL(π || π_ref) = Σ_v π(v) (log π(v) - log π_ref(v)) of each row of (T, V) logits, (T,)."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    probs = logp.exp()
    return torch.where(probs > 0, probs * (logp - ref_logp), torch.zeros_like(probs)).sum(-1)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Return the per-token KL estimate, (T,), from the log-probs of the sampled tokens, s = log π - log π_ref.

    kl, k1: s.  abs: |s|.  mse, k2: s²/2.  k3: exp(-s) - 1 + s.
    Source: TRL 0.7.4 `_kl_penalty`; Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).

    >>> kl_penalty(torch.tensor([-1.0]), torch.tensor([-3.0]), "mse")
    tensor([2.])
    """
    log_ratio = logprobs - ref_logprobs
    if kind in ("kl", "k1"):
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind in ("mse", "k2"):
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL penalty {kind!r}; expected kl, abs, mse, k1, k2 or k3 ('full' needs both logits)")


def gae(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> Tensor:
    """Return the generalised advantages, (T,), of B ragged samples; V after a sample's last token is 0.

    δ_t = r_t + γ V_{t+1} - V_t,  A_t = δ_t + γ λ A_{t+1}.  Source: Schulman et al. (arXiv:1506.02438) eq. 16.

    >>> gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([0, 2]), 1.0, 1.0)
    tensor([0.5000, 0.5000])
    """
    advantages = torch.empty_like(rewards)
    bounds = offsets.tolist()
    for start, end in pairwise(bounds):
        running = next_value = rewards.new_zeros(())
        for t in range(end - 1, start - 1, -1):
            delta = rewards[t] + gamma * next_value - values[t]
            running = delta + gamma * lam * running
            next_value = values[t]
            advantages[t] = running
    return advantages


def pack(lengths: Sequence[int] | Tensor, num_bins: int, max_per_bin: int) -> Tensor:
    """Return the bin (N,) int64 of each of N items, taken in the given order, so that token sums come out even.

    Each item goes to the bin with the smallest sum so far that has room (fewer than `max_per_bin` items), ties to
    the lowest. Descending order gives the most even bins (Graham 1969, LPT), a shuffled one random even bins.
    Raises ValueError if the items do not fit.

    >>> pack([5, 3, 2, 4], num_bins=2, max_per_bin=2).tolist()
    [0, 1, 1, 0]
    """
    sizes = [int(length) for length in lengths]
    if num_bins < 1 or num_bins * max_per_bin < len(sizes):
        raise ValueError(
            f"{len(sizes)} sequences do not fit into num_bins={num_bins} of max_per_bin={max_per_bin}; raise either"
        )
    sums, counts, bins = [0] * num_bins, [0] * num_bins, []
    for size in sizes:
        best = min((i for i in range(num_bins) if counts[i] < max_per_bin), key=lambda i: (sums[i], i))
        sums[best] += size
        counts[best] += 1
        bins.append(best)
    return torch.tensor(bins, dtype=torch.int64)


def whiten(x: Tensor, shift_mean: bool = True) -> Tensor:
    """Return (x - mean) / sqrt(var + 1e-8) of a (T,) tensor, unbiased variance; keep the mean if not `shift_mean`.

    Fewer than two entries have no variance and come back unscaled. Source: TRL 0.7.4 `masked_whiten`.

    >>> whiten(torch.tensor([1.0, 3.0]))
    tensor([-0.7071,  0.7071])
    """
    if x.numel() < 2:
        return x.clone()
    mean = x.mean()
    whitened = (x - mean) * torch.rsqrt(x.var() + 1e-8)
    return whitened if shift_mean else whitened + mean


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Return -min(ρA, clip(ρ, 1 - clip_low, 1 + clip_high) A) per token, (T,), ρ = exp(log π - log π_old).

    Source: Schulman et al. (arXiv:1707.06347) eq. 7.

    >>> clipped_policy_loss(torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([1.0]), 0.2, 0.2)
    tensor([-1.2000])
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Return max((V - R)², (V_clipped - R)²) / 2 per token, (T,), V_clipped within `cliprange` of V_old.

    Source: TRL 0.7.4 `PPOTrainer.loss`; OpenAI baselines, ppo2.
    """
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())

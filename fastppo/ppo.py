"""PPO's mathematics on flat, ragged tensors: rewards, advantages, losses, statistics.

Pure functions, tensors in and tensors out; only this file puts the settings and the operations together.
Shapes as in `types.py`: (T,) per trainable token, (B,) per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import ops
from fastppo.config import PPOConfig
from fastppo.types import Evaluation, segment_ids


def shape_rewards(
    scores: Tensor, evaluation: Evaluation, offsets: Tensor, kl_coef: float, kind: str
) -> tuple[Tensor, Tensor]:
    """Return (rewards, penalties), (T,): -β·KL on every token and, on each sample's last one, its score (B,).

    Source: Ziegler et al. (arXiv:1909.08593) section 2; TRL 0.7.4 `compute_rewards`.
    """
    if kind == "full" and evaluation.exact_kl is not None:
        kl = evaluation.exact_kl
    else:
        kl = ops.kl_penalty(evaluation.logprobs, evaluation.ref_logprobs, kind)
    penalties = -kl_coef * kl
    rewards = penalties.clone()
    rewards[offsets[1:].to(rewards.device) - 1] += scores
    return rewards, penalties


def estimate_advantages(rewards: Tensor, values: Tensor, offsets: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), (T,): GAE over the trainable tokens alone, advantages whitened over the batch.

    The critic's returns use `lam_critic` where it is set (VC-PPO, arXiv:2503.01491, section 4).
    """
    if config.whiten_rewards:
        rewards = ops.whiten(rewards, shift_mean=False)
    advantages = ops.gae(rewards, values, offsets, config.gamma, config.lam)
    for_critic = advantages
    if config.lam_critic is not None and config.lam_critic != config.lam:
        for_critic = ops.gae(rewards, values, offsets, config.gamma, config.lam_critic)
    return ops.whiten(advantages), for_critic + values


def monte_carlo_returns(rewards: Tensor, offsets: Tensor, config: PPOConfig) -> Tensor:
    """Return the discounted sum of each token's and all later rewards of its sample, (T,), without a critic's part."""
    if config.whiten_rewards:
        rewards = ops.whiten(rewards, shift_mean=False)
    return ops.gae(rewards, torch.zeros_like(rewards), offsets, config.gamma, 1.0)


def estimate_advantages_trl07(
    rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), (B, L - 1), as TRL 0.7.4 does: over all positions of the padded batch.

    Masked positions count as time steps of value 0, so that a gap in a response decays what comes after it, and
    whitened rewards leave the mean in them. mask (B, L - 1) bool. Only for compat="trl-0.7".
    """
    values, rewards = values * mask, rewards * mask
    if config.whiten_rewards:
        trained = rewards[mask]
        rewards = (rewards - trained.mean()) * torch.rsqrt(trained.var() + 1e-8) + trained.mean()
    rows, columns = rewards.shape
    offsets = torch.arange(rows + 1) * columns
    advantages = ops.gae(rewards.flatten(), values.flatten(), offsets, config.gamma, config.lam).view(rows, columns)
    trained = advantages[mask]
    whitened = (advantages - trained.mean()) * torch.rsqrt(trained.var() + 1e-8) if len(trained) > 1 else advantages
    return whitened, advantages + values


def token_weights(offsets: Tensor, rows: list[int], aggregation: str) -> Tensor:
    """Return the weight (T',) of each trainable token of the samples `rows` in their mean loss; they sum to 1.

    token-mean: 1 / T'.  sequence-mean: 1 / (number of samples · tokens of the sample).
    """
    lengths = offsets.diff()[rows]
    if aggregation == "token-mean":
        return torch.full((int(lengths.sum()),), 1.0 / max(1, int(lengths.sum())))
    return torch.repeat_interleave(1.0 / (len(rows) * lengths), lengths)


def dual_clip_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> Tensor:
    """Return PPO's clipped loss, (T,), at most -dual_clip·A where A < 0, for dual_clip > 1.

    Source: Ye et al. (arXiv:1912.09729) section 3.2.
    """
    loss = ops.clipped_policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high)
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def cispo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_high: float) -> Tensor:
    """Return -min(ρ, 1 + clip_high) A log π, (T,), the ratio a constant: no token loses its gradient to the clip.

    Source: MiniMax-M1 (arXiv:2506.13585) eq. 4.
    """
    ratio = torch.exp(logprobs.detach() - old_logprobs).clamp_max(1 + clip_high)
    return -ratio * advantages * logprobs


def reinforce_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return -A log π, (T,). Source: Williams, "Simple statistical gradient-following algorithms" (1992)."""
    return -advantages * logprobs


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Return an estimate of KL(π || π_ref) to be added to a loss, (T,); see `ops.kl_penalty` for the kinds.

    On-policy, k2's gradient is that of the KL and k1's is 0 on average. The exact KL comes from `ops.linear_loss`.
    """
    return ops.kl_penalty(logprobs, ref_logprobs, kind)


def entropy_loss(entropies: Tensor, coef: float) -> Tensor:
    """Return -coef·H, (T,): the bonus that keeps a policy from collapsing."""
    return -coef * entropies


def policy_statistics(
    new: Tensor, old: Tensor, entropies: Tensor, advantages: Tensor, weights: Tensor, config: PPOConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Return TRL's policy statistics of one minibatch, device scalars, and the ratios (T',)."""
    ratio = torch.exp(new - old)
    high = config.cliprange if config.cliprange_high is None else config.cliprange_high
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - config.cliprange, 1 + high)
    stats = {
        "loss/policy": (torch.maximum(unclipped, clipped) * weights).sum(),
        "policy/entropy": entropies.mean(),
        "policy/approxkl": 0.5 * (new - old).square().mean(),
        "policy/policykl": (old - new).mean(),
        "policy/clipfrac": (clipped > unclipped).float().mean(),
        "policy/advantages_mean": advantages.mean(),
    }
    return stats, ratio


def value_statistics(
    new: Tensor, old: Tensor, returns: Tensor, weights: Tensor, config: PPOConfig
) -> dict[str, Tensor]:
    """Return TRL's value statistics of one minibatch: device scalars. Variances are unbiased, 0 for one token."""
    clipped = torch.clamp(new, old - config.cliprange_value, old + config.cliprange_value)
    errors, clipped_errors = (new - returns).square(), (clipped - returns).square()
    return {
        "loss/value": (0.5 * torch.maximum(errors, clipped_errors) * weights).sum(),
        "val/vpred": new.mean(),
        "val/error": errors.mean(),
        "val/clipfrac": (clipped_errors > errors).float().mean(),
        "val/mean": old.mean(),
        "val/var": _variance(old),
        "returns/mean": returns.mean(),
        "returns/var": _variance(returns),
    }


def _variance(x: Tensor) -> Tensor:
    return x.var() if x.numel() > 1 else torch.zeros_like(x).sum()


def sample_sums(x: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of the (T,) entries of each sample, (B,)."""
    sums = x.new_zeros(len(offsets) - 1)
    return sums.index_add_(0, segment_ids(offsets).to(x.device), x)

"""TRL's padded layout at the edge: (B, L - 1) tensors, where column i scores token i + 1 of query and response.
Of an encoder-decoder it is token i + 1 of the decoder's sequence.

Used for array statistics, for subclasses that override TRL's methods, and for compat="trl-0.7".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo import ops, ppo
from fastppo.config import PPOConfig
from fastppo.types import Samples, offsets_of


def columns_of(samples: Samples) -> Tensor:
    """Return the column (T,) of each trainable token."""
    starts = torch.tensor([samples.start(row) - 1 for row in range(len(samples))])
    return samples.positions + torch.repeat_interleave(starts, samples.offsets.diff())


def to_padded(samples: Samples, flat: Tensor, fill: float) -> Tensor:
    """Spread a flat (T,) tensor over (B, L - 1), `fill` elsewhere, on the device of `flat`."""
    longest = max(samples.start(row) + len(response) for row, response in enumerate(samples.responses))
    padded = flat.new_full((len(samples), longest - 1), fill)
    rows = torch.repeat_interleave(torch.arange(len(samples)), samples.offsets.diff())
    padded[rows, columns_of(samples)] = flat
    return padded


def mask_of(samples: Samples) -> Tensor:
    """Return the (B, L - 1) bool mask of the trainable tokens."""
    return to_padded(samples, torch.ones(len(samples.labels), dtype=torch.bool), False)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Return the per-token penalty; for "full" the arguments are log-distributions over the vocabulary."""
    if kind != "full":
        return ops.kl_penalty(logprobs, ref_logprobs, kind)
    return torch.nn.functional.kl_div(ref_logprobs, logprobs, log_target=True, reduction="none").sum(-1)


def compute_rewards(
    scores: Any, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor, kl_coef: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return TRL's (rewards, non_score_rewards, kls), (B, L - 1) each, from padded log-probs and masks.

    For kind "full" the log-probs are distributions, (B, L - 1, V). Raises ValueError for those of sampled tokens alone,
    and for a row without a token to put the score on.
    """
    if kind == "full" and logprobs.dim() == 2:
        raise ValueError(
            f"log-probs of shape {tuple(logprobs.shape)} are those of the sampled tokens, but kl_penalty='full' needs "
            "(B, L - 1, V); choose kl_penalty='kl' when compute_rewards is overridden"
        )
    kls = kl_penalty(logprobs, ref_logprobs, kind)
    non_score = -kl_coef * kls
    rewards = non_score.clone()
    for row, (score, mask) in enumerate(zip(scores, masks, strict=True)):
        trained = mask.nonzero()
        if not len(trained):
            raise ValueError(
                f"row {row} of the mask is all zero: there is no token to put the score on; drop the sample"
            )
        rewards[row, int(trained[-1])] += score
    return rewards, non_score, kls


def compute_advantages(
    values: Tensor, rewards: Tensor, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return TRL's (values, advantages, returns), (B, L - 1) each, from padded values and rewards."""
    mask = mask.bool()
    if config.is_compat:
        advantages, returns = ppo.estimate_advantages_trl07(rewards, values, mask, config)
        return values * mask, advantages, returns
    flat = ppo.estimate_advantages(rewards[mask], values[mask], offsets_of(mask.sum(1).tolist()), config)
    advantages, returns = (torch.zeros_like(values).masked_scatter(mask, x) for x in flat)
    return values * mask, advantages, returns


def loss(
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    mask: Tensor,
    config: PPOConfig,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return TRL's (policy loss, weighted value loss, nested statistics) of padded tensors, differentiable.

    old = (logprobs, values), new = (logprobs, values, logits), targets = (advantages, returns), each (B, L - 1),
    logits (B, L - 1, V).
    """
    mask = mask.bool()
    (old_logprobs, old_values), (logprobs, values, logits) = old, new
    advantages, returns = targets
    weights = torch.full_like(logprobs[mask], 1.0 / max(1, int(mask.sum())))
    high = config.cliprange if config.cliprange_high is None else config.cliprange_high
    policy = ops.clipped_policy_loss(logprobs[mask], old_logprobs[mask], advantages[mask], config.cliprange, high)
    value = ops.clipped_value_loss(values[mask], old_values[mask], returns[mask], config.cliprange_value)
    pg_loss, vf_loss = (policy * weights).sum(), (value * weights).sum()
    with torch.no_grad():
        distribution = torch.distributions.Categorical(logits=logits[mask].float(), validate_args=False)
        flat, ratio = ppo.policy_statistics(
            logprobs[mask], old_logprobs[mask], distribution.entropy(), advantages[mask], weights, config
        )
        flat |= ppo.value_statistics(values[mask], old_values[mask], returns[mask], weights, config)
    if float(ratio.mean()) > config.ratio_threshold:
        pg_loss, vf_loss = pg_loss * 0.0, vf_loss * 0.0
    flat["loss/total"] = (pg_loss + config.vf_coef * vf_loss).detach()
    nested: dict[str, Any] = {}
    for name, item in flat.items():
        nested.setdefault(name.split("/")[0], {})[name.split("/")[1]] = item
    nested["policy"] |= {"advantages": advantages, "ratio": torch.exp(logprobs - old_logprobs).detach()}
    return pg_loss, config.vf_coef * vf_loss, nested

"""Whether the log-probs that were recorded while sampling may stand for those that the update would compute.

They differ by rounding: the same weights, but matmuls of other shapes. A few sequences are scored again the trainer's
way; where the gap is too large for PPO's clip to ignore it, the old log-probs are computed anew and each token is
weighted with the ratio of the two, so that the gradient stays that of the policy which drew the tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Shares of the clip range that the gaps may take up, and nats of KL that they may feign over a response.
_CLIP_SHARE = 0.25
_PHANTOM_KL = 0.02
# At least so many responses are scored again, or this share of them.
_MIN_RESCORED = 2
_RESCORED_SHARE = 0.01


class Agreement(NamedTuple):
    """Statistics of log π_trainer - log π_recorded over N tokens, and what they estimate."""

    gap_median: float  # of |gap|, in nats, as the next three
    gap_q99: float
    gap_q999: float
    gap_max: float
    k3: float  # KL(recorded || trainer) a token: the mean of exp(gap) - 1 - gap
    chi2: float  # χ²: the mean of (exp(gap) - 1)²
    ess: float  # effective sample size of the importance weights exp(gap), as a share of N

    def is_close(self, cliprange: float, mean_length: float) -> bool:
        """Whether the records may serve as the old log-probs of responses of this mean length."""
        return self.gap_q999 < _CLIP_SHARE * cliprange and self.k3 * mean_length < _PHANTOM_KL


def agreement(recorded: Tensor, recomputed: Tensor) -> Agreement:
    """Compare the log-probs (N,) of the same tokens from the sampler and from the trainer's forward pass."""
    gaps = (recomputed - recorded).double()
    if not len(gaps) or not bool(torch.isfinite(gaps).all()):
        return Agreement._make([math.inf] * 6 + [0.0])
    sizes, ratios = gaps.abs(), gaps.exp()
    ranks = sizes.new_tensor([0.5, 0.99, 0.999, 1.0])
    quantiles = torch.quantile(sizes, ranks, interpolation="higher").tolist()
    ess = ratios.sum().square() / (len(gaps) * ratios.square().sum())
    divergences = (ratios - 1 - gaps).mean(), (ratios - 1).square().mean(), ess
    return Agreement._make([*quantiles, *map(float, divergences)])


def rows_to_rescore(count: int, seed: int) -> list[int]:
    """Return which of `count` responses are scored again, drawn from the seed, ascending."""
    number = min(count, max(_MIN_RESCORED, math.ceil(_RESCORED_SHARE * count)))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:number].tolist())


def importance_weights(old: Tensor, recorded: Tensor, cap: float) -> Tensor:
    """Return min(π_old / π_recorded, cap), (T,): truncated importance sampling (Yao et al. 2025; Espeholt et al. 2018,
    arXiv:1802.01561, whose ρ̄ the cap is)."""
    return torch.exp(old - recorded).clamp_max(cap)

"""What a run remembers from step to step beside its weights: the KL coefficient and the scale of the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.config import PPOConfig


class AdaptiveKLController:
    """Proportional controller of the KL coefficient: β ← β (1 + clip(KL / target - 1, ±0.2) n / horizon).

    Source: Ziegler et al. (arXiv:1909.08593) section 2.2.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current: float, n_steps: int) -> None:
        """Move the coefficient after `n_steps` samples whose mean sequence KL was `current` nats."""
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """A KL coefficient that stays as it is."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Do nothing."""


def make_kl_controller(config: PPOConfig) -> AdaptiveKLController | FixedKLController:
    """Return the controller that the settings ask for."""
    if config.adap_kl_ctrl:
        return AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
    return FixedKLController(config.init_kl_coef)


class RunningMoments:
    """Mean and unbiased standard deviation of all the numbers seen so far.

    Source: Chan et al., "Algorithms for computing the sample variance" (1983), the parallel update.
    """

    def __init__(self, accelerator: object = None):
        del accelerator  # TRL's signature; with one process there is nothing to gather
        self.mean, self.std, self.var, self.count = 0.0, 1.0, 1.0, 1e-24

    @torch.no_grad()
    def update(self, xs: Tensor) -> tuple[float, float]:
        """Take in a batch (N,); return its own mean and unbiased standard deviation (0 for one number)."""
        count = xs.numel()
        xs = xs.double()
        mean, variance = float(xs.mean()), float(xs.var(unbiased=False))
        delta, total = mean - self.mean, self.count + count
        sum_of_squares = self.var * self.count + variance * count + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.var, self.count = sum_of_squares / total, total
        self.std = (self.var * total / (total - 1)) ** 0.5 if total > 1 else 0.0
        return mean, (variance * count / (count - 1)) ** 0.5 if count > 1 else 0.0


def process_scores(scores: Tensor, running: RunningMoments, config: PPOConfig) -> Tensor:
    """Return the scores (B,) after the scaling, normalising and clipping that the settings ask for."""
    if config.use_score_scaling:
        running.update(scores)
        mean = running.mean if config.use_score_norm else 0.0
        # One number has no spread yet: leave its scale alone.
        scores = (scores - mean) / ((running.std or 1.0) + torch.finfo(scores.dtype).eps)
    return scores.clamp(-config.score_clip, config.score_clip) if config.score_clip is not None else scores

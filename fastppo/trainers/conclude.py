"""The end of a step: what changes between steps moves here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from fastppo.types import LossTerms


def conclude(trainer: Any, stats: Mapping[str, Any], losses: list[LossTerms]) -> None:
    """Move controller, schedule and counters on. Raises FloatingPointError if training has broken down."""
    config = trainer.config
    _control_kl(trainer, stats)
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.step()
    trainer.current_step += 1
    _count_nonfinite(trainer, losses)
    _push_if_best(trainer, stats["ppo/mean_scores"])
    if config.optimize_device_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _control_kl(trainer: Any, stats: Mapping[str, Any]) -> None:
    """Let the controller see the KL; what cannot be one is a symptom, and must not lower the coefficient.

    Nor must that of a policy which is not trained yet, while its critic is warmed up.
    """
    if trainer.current_step < trainer.config.critic_warmup_steps:
        return
    kl = stats["objective/kl"]
    if kl < -1.0:
        warnings.warn(
            f"the KL from the reference is {kl:.2f}; it cannot be negative in the mean: check that responses are "
            "sampled with top_k=0, top_p=1 and scored at the same temperature",
            stacklevel=5,
        )
    if not trainer.config.is_compat:
        if not kl >= -1.0:  # nor NaN
            return
        kl = max(0.0, stats.get("objective/kl_full", kl))  # the exact KL is never below 0, and less noisy
    trainer.kl_ctl.update(kl, trainer.config.batch_size)


def _count_nonfinite(trainer: Any, losses: list[LossTerms]) -> None:
    for terms in losses:
        trainer.nonfinite_in_a_row = trainer.nonfinite_in_a_row + 1 if bool(terms.nonfinite) else 0
    if trainer.nonfinite_in_a_row >= trainer.config.max_skipped_steps:
        bad = [name for name, p in trainer.model.named_parameters() if not bool(torch.isfinite(p).all())]
        where = f"non-finite weights: {bad[:3]}" if bad else "the weights are finite, so the loss overflowed"
        raise FloatingPointError(
            f"{trainer.nonfinite_in_a_row} optimiser steps in a row had no finite gradient ({where}); lower the "
            "learning rate, bound the reward, or train in float32"
        )


def _push_if_best(trainer: Any, score: float) -> None:
    kwargs = trainer.config.push_to_hub_if_best_kwargs
    if kwargs and trainer.current_step % trainer.config.compare_steps == 0 and score > trainer.best_score:
        trainer.best_score = score
        trainer.push_to_hub(**kwargs)

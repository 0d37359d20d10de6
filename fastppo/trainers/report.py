"""The last stage of a step: TRL's statistics, read back from the device in one place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo import ppo
from fastppo.config import PPOConfig
from fastppo.trainers.padded import to_padded
from fastppo.types import Experience, LossTerms, Samples


def build_stats(
    experience: Experience, losses: list[LossTerms], kl_coef: float, learning_rate: float, config: PPOConfig
) -> dict[str, Any]:
    """Return TRL's statistics: floats, and numpy arrays (NaN where there is no trainable token) for the arrays."""
    stats = _objective(experience, kl_coef, config) | _lengths(experience.samples) | _losses(experience, losses)
    stats["ppo/learning_rate"] = learning_rate
    stats["ppo/optimizer_steps"] = float(len(losses))
    stats["ppo/skipped_steps"] = float(sum(bool(terms.skipped) for terms in losses))
    stats["ppo/nonfinite_steps"] = float(sum(bool(terms.nonfinite) for terms in losses))
    stats["ppo/dropped_samples"] = float(experience.samples.num_given - len(experience.samples))
    return {name: _to_host(value) for name, value in stats.items()}


def sequence_kl(experience: Experience) -> Tensor:
    """Return each sample's KL from the reference, (B,), the k1 estimate: Σ_t log π - log π_ref."""
    evaluation = experience.evaluation
    return ppo.sample_sums(evaluation.logprobs - evaluation.ref_logprobs, experience.samples.offsets)


def _objective(experience: Experience, kl_coef: float, config: PPOConfig) -> dict[str, Any]:
    samples, evaluation = experience.samples, experience.evaluation
    kl = sequence_kl(experience)
    stats = {
        "objective/kl": kl.mean(),
        "objective/kl_dist": _per_given_sample(samples, kl),
        "objective/logprobs": _array(samples, evaluation.logprobs),
        "objective/ref_logprobs": _array(samples, evaluation.ref_logprobs),
        "objective/kl_coef": kl_coef,
        "objective/entropy": ppo.sample_sums(-evaluation.logprobs, samples.offsets).mean(),
        "ppo/mean_non_score_reward": experience.penalties.mean(),
        "ppo/mean_scores": experience.scores.mean(),
        "ppo/std_scores": experience.scores.std() if len(experience.scores) > 1 else torch.nan,
    }
    if kl_coef:
        estimate = ppo.sample_sums(experience.penalties / -kl_coef, samples.offsets)
        stats[f"objective/kl_{config.kl_penalty}"] = estimate.mean()
    return stats


def _lengths(samples: Samples) -> dict[str, Any]:
    stats: dict[str, Any] = {}
    for name, sequences in (("queries", samples.queries), ("responses", samples.responses)):
        lengths = torch.tensor([float(len(sequence)) for sequence in sequences])
        stats[f"tokens/{name}_len_mean"] = lengths.mean()
        stats[f"tokens/{name}_len_std"] = lengths.std() if len(lengths) > 1 else torch.nan
        stats[f"tokens/{name}_dist"] = lengths
    return stats


def _losses(experience: Experience, losses: list[LossTerms]) -> dict[str, Any]:
    """Average the minibatches' statistics over all epochs, as TRL does."""
    names = [name for name in losses[0].stats if name != "policy/logprob_gap_max"]
    stats: dict[str, Any] = {
        f"ppo/{name}": torch.stack([terms.stats[name] for terms in losses]).mean() for name in names
    }
    stats["ppo/policy/logprob_gap_max"] = losses[0].stats["policy/logprob_gap_max"]
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
    samples, arrays = experience.samples, {"ratio": [], "advantages": []}  # type: ignore[var-annotated]
    for terms in losses:
        trained = ~terms.ratio.isnan()
        rows = ppo.sample_sums(trained.float(), samples.offsets).bool().cpu()
        arrays["ratio"].append(to_padded(samples, terms.ratio, torch.nan)[rows])
        advantages = torch.where(trained, experience.advantages, torch.nan)
        arrays["advantages"].append(to_padded(samples, advantages, torch.nan)[rows])
    return stats | {f"ppo/policy/{name}": torch.cat(parts).flatten() for name, parts in arrays.items()}


def _array(samples: Samples, flat: Tensor) -> Tensor:
    """Return a flat tensor in TRL's shape, one row per sample that the user handed in."""
    return _per_given_sample(samples, to_padded(samples, flat, torch.nan))


def _per_given_sample(samples: Samples, kept: Tensor) -> Tensor:
    full = kept.new_full((samples.num_given, *kept.shape[1:]), torch.nan)
    full[torch.tensor(samples.rows)] = kept
    return full


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().float().cpu().numpy() if value.dim() else float(value)
    return value


def scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are single numbers."""
    return {name: float(value) for name, value in stats.items() if isinstance(value, (int, float))}


def for_tracker(stats: Mapping[str, Any], batch: Mapping[str, Any], rewards: Any) -> dict[str, Any]:
    """Return what a tracker is given: TRL's reward statistics added, no NaN in arrays, which histograms refuse."""
    values = np.array([float(reward) for reward in rewards if reward is not None], dtype=np.float64)
    values = values[~np.isnan(values)]
    logs = {name: value[~np.isnan(value)] if isinstance(value, np.ndarray) else value for name, value in stats.items()}
    logs["env/reward_mean"] = float(values.mean()) if len(values) else float("nan")
    logs["env/reward_std"] = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    logs["env/reward_dist"] = values
    return logs


def log(
    accelerator: Any,
    config: PPOConfig,
    stats: Mapping[str, Any],
    batch: Mapping[str, Any],
    rewards: Any,
    columns: Sequence[str],
    step: int | None = None,
) -> None:
    """Send a step's statistics to the tracker under the number `step`, by default that of the calls so far.

    wandb counts by itself, also over a resumed run, and drops what comes under a number below its own.
    Raises ValueError if the batch lacks one of the columns.
    """
    if not accelerator.is_main_process or not accelerator.trackers:
        return
    logs = for_tracker(stats, batch, rewards)
    if config.log_with != "wandb":
        accelerator.log(scalars(logs), step=_next_step(accelerator) if step is None else step)
        return
    missing = [name for name in columns if name not in batch]
    if missing:
        raise ValueError(
            f"columns_to_log names {missing}, but the batch has {sorted(batch)}; add them or leave them out"
        )
    import wandb

    shown = [None if reward is None else float(reward) for reward in rewards]
    rows = zip(*(batch[name] for name in columns), shown, strict=True)
    logs["game_log"] = wandb.Table(columns=[*columns, "reward"], rows=[list(row) for row in rows])
    accelerator.log(logs)


def _next_step(accelerator: Any) -> int:
    step: int = getattr(accelerator, "fastppo_logged_steps", 0)
    accelerator.fastppo_logged_steps = step + 1
    return step


class Clock:
    """Seconds of the stages of a step, under TRL's names."""

    def __init__(self) -> None:
        self._start, self._stages = time.perf_counter(), dict[str, float]()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as a stage of this name."""
        start = time.perf_counter()
        yield
        self._stages[f"time/ppo/{stage}"] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return the stages' seconds and the total so far."""
        return self._stages | {"time/ppo/total": time.perf_counter() - self._start}

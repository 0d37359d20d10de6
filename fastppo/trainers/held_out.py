"""Measuring a policy on prompts that it is not trained on: same prompts and same random numbers every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from fastppo import ppo
from fastppo.config import SamplingConfig
from fastppo.models.seq2seq import decoder_prefix
from fastppo.rewards import Reward
from fastppo.trainers.evaluate import evaluate
from fastppo.trainers.prompts import Prompts, texts
from fastppo.trainers.rollout import generate_and_score
from fastppo.trainers.samples import check_samples

# Its own stream of random numbers, away from the ones that training draws.
_SEED_OFFSET = 0x5EED


@dataclass(frozen=True)
class Measurement:
    """What a policy does on held-out prompts."""

    reward_mean: float
    reward_std: float
    kl: float  # mean over completions of Σ_t log π - log π_ref, nats
    length: float  # tokens
    distinct_2: float
    rows: list[dict[str, Any]]  # query, completion, reward

    def summary(self, when: str) -> dict[str, float]:
        """Return the numbers under names that end in `when`: before, after or best."""
        names = ("reward_mean", "reward_std", "kl", "length", "distinct_2")
        return {f"{name.removesuffix('_mean')}_{when}": getattr(self, name) for name in names}


def measure(trainer: Any, prompts: Prompts, reward: Reward, sampling: SamplingConfig) -> Measurement:
    """Generate once for each prompt and score it, without touching the state of the training."""
    engine = trainer.engine
    served, engine.num_requests = engine.num_requests, 0
    try:
        seed = trainer.config.seed + _SEED_OFFSET
        rollout, completions, scores, _ = generate_and_score(trainer, prompts, reward, replace(sampling, seed=seed))
    finally:
        engine.num_requests = served
    samples = check_samples(
        prompts.ids,
        rollout,
        torch.zeros(len(rollout)),
        None,
        vocabulary=2**62,
        context=None,
        prefix=decoder_prefix(trainer.model),
        end_ids=(),
        temperature=rollout.temperature,
        device=trainer.current_device,
    )
    size = trainer.config.micro_batch_size
    evaluation = evaluate(trainer.model, trainer.reference, samples, rollout, max_size=size, exact_kl=False)
    kl = ppo.sample_sums(evaluation.logprobs - evaluation.ref_logprobs, samples.offsets)
    scored = scores[~scores.isnan()]
    queries = texts(trainer.tokenizer, prompts)
    rows = zip(queries, completions, scores.tolist(), strict=True)
    return Measurement(
        reward_mean=float(scored.mean()) if len(scored) else float("nan"),
        reward_std=float(scored.std()) if len(scored) > 1 else 0.0,
        kl=float(kl.mean()),
        length=len(rollout.tokens) / len(rollout),
        distinct_2=distinct_2(completions),
        rows=[{"query": q, "completion": c, "reward": r} for q, c, r in rows],
    )


def distinct_2(completions: Sequence[Any]) -> float:
    """Return unique / total word bigrams, pooled over the completions; 0 without any bigram.

    >>> distinct_2(["a b a b", "a b"])
    0.5
    """
    pairs: list[tuple[Any, Any]] = []
    for completion in completions:
        words = completion.split() if isinstance(completion, str) else completion
        pairs += pairwise(words)
    return len(set(pairs)) / len(pairs) if pairs else 0.0

"""Whether the sampler's records are believed, decided anew every few steps; see `fastppo.engine.agreement`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastppo.config import PPOConfig
from fastppo.engine.agreement import Agreement, agreement, importance_weights, rows_to_rescore
from fastppo.models.attach import is_attached
from fastppo.models.network import evaluating, weight_version
from fastppo.models.passes import pass_tokens, passing, response_hidden, sample_groups
from fastppo.trainers.evaluate import recorded_tokens, token_logprobs
from fastppo.types import Evaluation, Rollout, Samples


class Records:
    """The verdict on the records, and the measurement of this step, if there was one."""

    def __init__(self, config: PPOConfig):
        self.config = config
        self.are_refused = False
        self.last: Agreement | None = None

    def check(self, model: Any, samples: Samples, rollout: Rollout, step: int) -> bool:
        """Whether the rollout's log-probs may serve as the old ones; looks when it is time to, or after a refusal."""
        self.last = None
        if self.are_refused or step % self.config.rescore_every == 0:
            rows = rows_to_rescore(len(samples), self.config.seed * 1_000_003 + step)
            tokens = samples.take(rows)
            recorded = rollout.logprobs[recorded_tokens(samples, rollout)[tokens].to(rollout.logprobs.device)]
            self.last = agreement(recorded, _rescore(model, samples, rows, self.config.micro_batch_size))
            self._judge(len(tokens) / len(rows))
        return not self.are_refused

    def _judge(self, mean_length: float) -> None:
        assert self.last is not None
        if self.config.consistency == "exact" and self.last.gap_max != 0:
            raise RuntimeError(
                f"consistency='exact', but recorded and recomputed log-probs differ by up to {self.last.gap_max:.3g}; "
                "this model is not computed row by row here: use consistency='bounded'"
            )
        was_refused, self.are_refused = self.are_refused, not self.last.is_close(self.config.cliprange, mean_length)
        if self.are_refused and not was_refused:
            warnings.warn(
                f"recorded log-probs are off by {self.last.gap_q999:.3g} (99.9% quantile): the old ones are computed "
                "anew and tokens weighted with the ratio, until they agree; fp32 weights would agree",
                stacklevel=2,
            )

    def weigh(self, evaluation: Evaluation, samples: Samples, rollout: Rollout) -> Evaluation:
        """Return an evaluation with new old log-probs, and the weight of each token under the policy that drew it."""
        recorded = rollout.logprobs[recorded_tokens(samples, rollout).to(rollout.logprobs.device)]
        weights = importance_weights(evaluation.logprobs, recorded, self.config.importance_cap)
        return replace(evaluation, importance=weights)

    def stats(self, evaluation: Evaluation) -> dict[str, float]:
        """Return the verdict and, where there was one, the measurement under the names of a step's statistics."""
        measured = {} if self.last is None else {f"agreement/{name}": x for name, x in self.last._asdict().items()}
        return measured | {"agreement/recomputed": float(evaluation.importance is not None)}


@torch.no_grad()
def _rescore(model: Any, samples: Samples, rows: list[int], size: int) -> Tensor:
    """Return the trainer's own log-probs (T',) of some samples' tokens, in their order."""
    logprobs = torch.zeros(len(samples.labels), device=samples.labels.device)
    limit = pass_tokens(logprobs.device)
    with evaluating(model), passing(model):
        for group in sample_groups(samples, rows, size, is_attached(model), limit):
            tokens = samples.take(group).to(logprobs.device)
            logprobs[tokens] = token_logprobs(model, response_hidden(model, samples, group), samples, tokens)
    return logprobs[samples.take(rows).to(logprobs.device)]


def is_current(model: Any, rollout: Rollout, queries: Sequence[Tensor], samples: Samples) -> bool:
    """Whether a rollout's records are those of the model as it is now, for these very queries and samples.

    What a tool has written has none (NaN): they are only believed where such tokens are masked out.
    """
    return (
        rollout.values is not None
        and rollout.is_untouched
        and rollout.temperature == samples.temperature
        and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(rollout.queries, queries, strict=True))
        and rollout.weight_version == weight_version(model)
        and not bool(rollout.logprobs[recorded_tokens(samples, rollout).to(rollout.logprobs.device)].isnan().any())
    )

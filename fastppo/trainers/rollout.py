"""The first half of an iteration: responses, and their scores, which may begin while others are still generated."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.rewards import Reward
from fastppo.trainers.prompts import Prompts, as_given, decode, reward_columns
from fastppo.types import Rollout


def generate_and_score(
    trainer: Any, prompts: Prompts, reward: Reward, sampling: SamplingConfig
) -> tuple[Rollout, list[Any], Tensor, dict[str, float]]:
    """Return the responses to the prompts, their texts (token ids without a tokenizer), their scores, and seconds.

    The scores are (B,) fp32 on the host, NaN for a response without one. `time/score` is what scoring took after the
    last token was drawn. Raises what the engine and the rewards raise.
    """
    given, columns = as_given(prompts, trainer.tokenizer), reward_columns(prompts, [])
    start = time.perf_counter()
    with reward.scoring(given, columns, late=["completion_ids"]) as scoring:

        def hand_over(row: int, tokens: list[int]) -> None:
            (completion,) = decode(trainer.tokenizer, [torch.tensor(tokens)])
            scoring.add(row, completion, completion_ids=tokens)

        on_response = hand_over if reward.takes_parts else None
        rollout = trainer.engine.generate(prompts.ids, sampling, on_response=on_response)
        generated = time.perf_counter()
        completions = decode(trainer.tokenizer, rollout)
        for row, (completion, response) in enumerate(zip(completions, rollout, strict=True)):
            scoring.add(row, completion, completion_ids=response.tolist())
        scores = scoring.scores()
    seconds = {"time/generate": generated - start, "time/score": time.perf_counter() - generated}
    return rollout, completions, scores, seconds

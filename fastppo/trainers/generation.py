"""`PPOTrainer.generate`: TRL's arguments and shapes over the engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.engine.engine import Engine
from fastppo.types import Rollout


def generate(
    trainer: Any,
    query_tensor: Tensor | Sequence[Tensor],
    with_reference: bool,
    options: Mapping[str, Any],
    generation_kwargs: Mapping[str, Any],
) -> Any:
    """Generate from the policy and, if asked for, from the reference with the same settings."""
    is_single = isinstance(query_tensor, Tensor)
    queries = [query_tensor] if is_single else list(query_tensor)
    sampling = SamplingConfig.from_generation_kwargs(**generation_kwargs)
    warn_of_truncation(sampling)
    trainer.temperature = sampling.temperature if sampling.do_sample else 1.0
    trainer.stop_ids = trainer.end_ids if sampling.stop_ids is None else frozenset(sampling.stop_ids)
    sampler = options["length_sampler"]
    limits = [sampler() for _ in queries] if sampler is not None else None
    rollout = trainer.engine.generate(queries, sampling, max_new_tokens=limits)
    return_prompt = options["return_prompt"] and not trainer.is_encoder_decoder
    result = _as_asked(rollout, is_single, return_prompt)
    if not with_reference:
        return result
    with trainer.reference.active() as network:
        engine = Engine(network, trainer.tokenizer, seed=trainer.config.seed)
        answers = engine.generate(queries, sampling, max_new_tokens=limits)
    return result, _as_asked(answers, is_single, return_prompt)


def warn_of_truncation(sampling: SamplingConfig) -> None:
    """Warn if responses are drawn from another distribution than the one that is trained."""
    if sampling.is_truncated:
        warnings.warn(
            f"top_k={sampling.top_k}, top_p={sampling.top_p}: responses are drawn from a part of the distribution "
            "that the update scores, which biases ratio and KL; use top_k=0 and top_p=1 for training",
            stacklevel=4,
        )


def _as_asked(rollout: Rollout, is_single: bool, return_prompt: bool) -> Any:
    if not return_prompt:
        return rollout[0][None] if is_single else rollout
    whole = [torch.cat([query, response]) for query, response in zip(rollout.queries, rollout, strict=True)]
    return whole[0][None] if is_single else whole

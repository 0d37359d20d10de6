"""What the settings of `PPOConfig` may be."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

KL_PENALTIES = ("kl", "abs", "mse", "full", "k1", "k2", "k3")
COMPAT = "trl-0.7"
OPTIMISERS = ("adam", "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


def holds(is_right: Callable[[Any], bool], value: Any) -> bool:
    """Whether a value keeps to a rule; one of another type does not."""
    try:
        return is_right(value)
    except (TypeError, ValueError, OverflowError):  # a text where a number belongs: YAML reads 1e-5 as one
        return False


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1, and of a whole number's type. May raise TypeError."""
    return index(value) >= 1


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), "one of " + ", ".join(names)


def _are_texts(value: Any) -> bool:
    return not isinstance(value, str) and all(isinstance(part, str) and part for part in value)


_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: value > 0), "greater than 0"
_AT_LEAST_0: tuple[Callable[[Any], bool], str] = (lambda value: value >= 0), "at least 0"
_COUNT: tuple[Callable[[Any], bool], str] = (lambda value: value == int(value) and value >= 1), "a whole number from 1"
_SHARE: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value <= 1), "between 0 and 1"
RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("log_with", *_one_of("wandb", "tensorboard", "trackio")),
    ("learning_rate", *_POSITIVE),
    ("critic_learning_rate", *_POSITIVE),
    ("warmup_steps", *_AT_LEAST_0),
    ("init_kl_coef", *_AT_LEAST_0),
    ("kl_penalty", *_one_of(*KL_PENALTIES)),
    ("target", *_POSITIVE),
    ("horizon", *_POSITIVE),
    ("gamma", *_SHARE),
    ("lam", *_SHARE),
    ("lam_critic", *_SHARE),
    ("critic", *_one_of("head", "adapter", "full")),
    ("critic_warmup_steps", *_AT_LEAST_0),
    ("critic_init", *_one_of("policy", "reward_adapter")),
    ("consistency", *_one_of("bounded", "exact")),
    ("rescore_every", *_COUNT),
    ("importance_cap", *_POSITIVE),
    ("cliprange", (lambda value: 0 < value <= 1), "greater than 0 and at most 1"),
    ("cliprange_high", *_POSITIVE),
    ("cliprange_value", *_POSITIVE),
    ("vf_coef", *_AT_LEAST_0),
    ("loss_aggregation", *_one_of("token-mean", "sequence-mean")),
    ("batch_size", *_COUNT),
    ("mini_batch_size", *_COUNT),
    ("gradient_accumulation_steps", *_COUNT),
    ("ppo_epochs", *_COUNT),
    ("max_grad_norm", *_POSITIVE),
    ("target_kl", *_POSITIVE),
    ("compare_steps", *_COUNT),
    ("ratio_threshold", *_POSITIVE),
    ("score_clip", *_POSITIVE),
    ("optim", *_one_of(*OPTIMISERS)),
    ("weight_decay", *_AT_LEAST_0),
    ("overlong_prompts", *_one_of("error", "drop", "truncate")),
    ("max_skipped_steps", *_COUNT),
    ("compat", *_one_of(COMPAT)),
]
# What those of `SamplingConfig` may be.
SAMPLING_RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("max_new_tokens", is_count, "a whole number, at least 1"),
    ("min_new_tokens", (lambda value: index(value) >= 0), "a whole number between 0 and max_new_tokens"),
    ("temperature", (lambda value: 0 < value < float("inf")), "greater than 0; use do_sample=False for greedy"),
    ("top_k", (lambda value: index(value) >= 0), "a whole number, at least 0; 0 keeps all tokens"),
    ("top_p", (lambda value: 0 < value <= 1), "greater than 0 and at most 1"),
    (
        "stop_ids",
        (lambda value: value is None or all(index(i) is not None for i in value)),
        "a tuple of token ids",
    ),
    ("stop_strings", _are_texts, "a tuple of texts, none of them empty"),
    ("seed", (lambda value: value is None or isinstance(index(value), int)), "a whole number"),
]

"""PPO for transformer language models on one machine, behind the API that TRL's users know."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: importing the package must not load transformers or triton.
_HOMES = {
    "AutoModelForCausalLMWithValueHead": "fastppo.models.value_head",
    "AutoModelForSeq2SeqLMWithValueHead": "fastppo.models.value_head",
    "BestOfNSampler": "fastppo.rewards.best_of_n",
    "DataCollatorForCompletionOnlyLM": "fastppo.trainers.completions",
    "Engine": "fastppo.engine.engine",
    "LengthSampler": "fastppo.core",
    "PPOConfig": "fastppo.config",
    "PPOTrainer": "fastppo.trainers.ppo",
    "RewardConfig": "fastppo.trainers.reward",
    "RewardTrainer": "fastppo.trainers.reward",
    "Rollout": "fastppo.types",
    "SFTConfig": "fastppo.trainers.sft",
    "SFTTrainer": "fastppo.trainers.sft",
    "SamplingConfig": "fastppo.config",
    "TextEnvironment": "fastppo.environments.environment",
    "TextHistory": "fastppo.environments.history",
    "create_reference_model": "fastppo.models.reference",
    "set_seed": "fastppo.core",
}
_MODULES = ("core", "ops")
__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import_module("fastppo.ops")  # before transformers, which has torch load what a CPU has no use for
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"fastppo.{name}")
    raise AttributeError(f"module 'fastppo' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

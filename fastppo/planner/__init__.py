"""What a run will take of memory, known before it starts: from a configuration alone, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastppo.config import PPOConfig


@dataclass(frozen=True, eq=False)
class Work:
    """What a step does, and on which machine."""

    prompt: int  # tokens of the longest prompt
    response: int  # tokens of the longest response
    config: PPOConfig
    device: str = "cpu"  # or cuda
    memory: int = 2**40  # bytes that there are for weights and all
    kv_memory: int | None = None  # the engine's; None: a quarter of what the weights leave free
    max_rows: int = 128  # the engine's
    prefill_tokens: int = 2048  # the engine's

    @property
    def record_bytes(self) -> int:
        """Bytes of token ids and of the numbers that are kept of every response token through a step."""
        tokens, minibatches = self.config.batch_size * self.response, self.config.batch_size
        minibatches //= self.config.micro_batch_size * self.config.gradient_accumulation_steps
        ids = 2 * 8 * self.config.batch_size * (self.prompt + self.response)
        # Rollout 24 bytes, samples 16, evaluation 24, experience 16, the minibatch under way 28; ratios of each.
        return ids + tokens * (108 + 4 * self.config.ppo_epochs * max(1, minibatches))


@dataclass(frozen=True)
class Plan:
    """Bytes by item in each phase of a step, at the moment when they are most together."""

    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step."""
        return max(sum(items.values()) for items in self.phases.values())

    @property
    def worst_phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

"""How a reward is called, and what it means when it is late, fails, or gives a score without bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class RewardPolicy:
    """What is stated of one reward. A reward with an attribute `reward_policy` brings its own; see `guard`."""

    timeout: float | None = 300.0
    """Seconds that a call may take. After that its samples have no score, and it is left to itself. None waits for
    ever, and calls a function that takes the whole batch on the caller's own thread."""
    on_error: str | float = "raise"
    """What an exception means: "raise" ends the run, "drop" leaves the call's samples without a score, a number is
    their score. What a reward returns wrongly always ends the run."""
    clip: float | None = None
    """Scores are cut to [-clip, clip], infinite ones too; without it an infinite score ends the run."""
    batch_size: int | None = None
    """None: called once with the whole batch, when all of it is generated. A number: called from other threads with so
    many finished samples at most, while the rest are still generated; it must score each sample by itself."""
    concurrency: int = 8
    """Calls under way at the same time, where `batch_size` makes several of them."""

    def __post_init__(self) -> None:
        is_number = isinstance(self.on_error, (int, float)) and math.isfinite(self.on_error)
        for name, is_right, expectation in (
            ("timeout", self.timeout is None or self.timeout > 0, "greater than 0, or None to wait for ever"),
            ("on_error", is_number or self.on_error in ("raise", "drop"), "'raise', 'drop' or a finite number"),
            ("clip", self.clip is None or 0 < self.clip < math.inf, "a finite number greater than 0, or None"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1, or None for the whole batch"),
            ("concurrency", self.concurrency >= 1, "at least 1"),
        ):
            if not is_right:
                raise ValueError(f"RewardPolicy.{name} must be {expectation}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Guarded:
    """A reward under a policy of its own; called, it is the reward."""

    function: Any
    reward_policy: RewardPolicy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the reward itself, without the policy."""
        return self.function(*args, **kwargs)


def guard(reward: Callable[..., Any], **fields: Any) -> Guarded:
    """Return the reward under a policy of its own: `guard(judge, timeout=20, on_error="drop", batch_size=1)`.

    The fields are those of `RewardPolicy`; those that are not named stay the reward's own, or the defaults. Raises
    ValueError for a URL by itself, whose `URLReward` has a policy of its own.
    """
    if isinstance(reward, str):
        raise ValueError("guard got a text, expected a reward; for a server use URLReward(url, timeout=..., ...)")
    if isinstance(reward, Guarded):
        return Guarded(reward.function, replace(reward.reward_policy, **fields))
    return Guarded(reward, replace(getattr(reward, "reward_policy", RewardPolicy()), **fields))

"""Which of a reward function's parameters get what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastppo.reward_models import AdapterReward, ModelReward, as_reward, is_pipeline
from fastppo.rewards.calls import finished
from fastppo.rewards.policy import Guarded, RewardPolicy
from fastppo.rewards.url import URLReward

RewardFunction = Callable[..., Any]

_OWN_ARGUMENTS = ("prompts", "completions")


@dataclass(frozen=True)
class Bound:
    """A reward function, and which of its parameters get what."""

    function: RewardFunction
    name: str
    policy: RewardPolicy
    by_position: bool  # prompts and completions are its first two arguments, whatever they are called
    takes_all: bool  # it has **kwargs
    taken: frozenset[str]  # parameters filled by name
    required: frozenset[str]  # parameters without a default that a name has to fill
    unfillable: tuple[str, ...]  # parameters that no name can fill

    @property
    def is_concurrent(self) -> bool:
        """Whether its calls may run beside those of other rewards, and not one after the other as functions expect."""
        is_async = inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004 - of an object, the method is what may be async
        )
        return is_async or self.policy.batch_size is not None

    def check(self, columns: Collection[str] | None) -> None:
        """Raise ValueError if a parameter stays empty with these columns, or with any for None."""
        given = {*(columns or ()), *(() if self.by_position else _OWN_ARGUMENTS)}
        missing = [*self.unfillable, *(sorted(self.required - given) if columns is not None else ())]
        if missing:
            raise ValueError(
                f"reward {self.name} has the parameters {missing}, but is given prompts, completions and the data's "
                f"columns {sorted(columns or ())}; name its parameters after these, or give the others a default"
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> Any:
        """Call the function, and wait for what it returns if that is awaitable."""
        named = dict(columns) if self.by_position else {**columns, "prompts": prompts, "completions": completions}
        named = {name: value for name, value in named.items() if self.takes_all or name in self.taken}
        given = (prompts, completions) if self.by_position else ()
        return finished(self.function(*given, **named), self.policy.timeout)


def bind(reward: Any, tokenizer: Any, default: RewardPolicy) -> Bound:
    """Return a reward with what its signature says, under its own policy or the default one.

    `tokenizer` is the policy model's. Raises ValueError for something that is no reward.
    """
    if isinstance(reward, str) and reward.lower().startswith(("http://", "https://")):
        reward = URLReward(reward)
    policy = getattr(reward, "reward_policy", default)
    function = reward.function if isinstance(reward, Guarded) else reward
    if isinstance(function, torch.nn.Module) or is_pipeline(function):
        function = as_reward(function, tokenizer)
    if isinstance(function, (ModelReward, AdapterReward)):
        if policy.batch_size is not None and isinstance(reward, Guarded):
            raise ValueError(
                f"batch_size={policy.batch_size} is for rewards that run elsewhere while responses are generated; a "
                "network shares this machine with them: set its own batch_size, ModelReward(model, batch_size=...)"
            )
        # It may be the policy's own base, which no other thread can be let near.
        policy = replace(policy, timeout=None, batch_size=None)
    if not callable(function):
        raise ValueError(
            f"a reward must be a callable (prompts, completions, **columns) or a classification model, got {function!r}"
        )
    return _signed(function, policy)


def _signed(reward: RewardFunction, policy: RewardPolicy) -> Bound:
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except ValueError:  # compiled functions may not tell
        return Bound(reward, name, policy, True, False, frozenset(), frozenset(), ())
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    fixed = [p for p in positional if p.kind is p.POSITIONAL_ONLY]
    has_two = len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    knows_names = takes_all or any(p.name in _OWN_ARGUMENTS for p in parameters)
    by_position = has_two and (bool(fixed) or not knows_names)
    rest = parameters[2:] if by_position and len(positional) >= 2 else parameters
    named = [p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = frozenset(p.name for p in named if p.default is p.empty)
    unfillable = tuple(p.name for p in rest if p.kind is p.POSITIONAL_ONLY and p.default is p.empty)
    taken = frozenset(p.name for p in named)
    return Bound(reward, name, policy, by_position, takes_all, taken, required, unfillable)

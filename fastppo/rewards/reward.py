"""One reward out of one or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastppo.rewards.binding import bind
from fastppo.rewards.calls import Pool
from fastppo.rewards.policy import RewardPolicy
from fastppo.rewards.scoring import Problem, Scoring


class Reward:
    """One reward out of one or several: the weighted sum of what each gives.

    A function gets `prompts`, `completions` and the data's columns by keyword, those that it has parameters for; one
    that names its first two parameters otherwise gets prompts and completions by position. It may be asynchronous. A
    response for which any function gives None or NaN has no score. In a training run `prompt_ids` and `completion_ids`,
    lists of token ids, are among the columns. A network or a text-classification pipeline in the place of a function is
    a `ModelReward`, or a policy with a reward adapter an `AdapterReward`; an http or https URL is a `URLReward`.

    Args:
        rewards: one, or a list of them.
        weights: one number for each; by default 1.
        columns: the names of the data's columns, if they are known already.
        tokenizer: the policy's.
        policy: of rewards that bring none of their own.
        on_problem: told of every call that failed or took too long.

    Raises ValueError for weights that do not fit and for a function with a parameter that nothing can fill.
    """

    def __init__(
        self,
        rewards: Any,
        weights: Sequence[float] | None = None,
        *,
        columns: Collection[str] | None = None,
        tokenizer: Any = None,
        policy: RewardPolicy | None = None,
        on_problem: Callable[[Problem], None] | None = None,
    ):
        functions = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        default = RewardPolicy() if policy is None else policy
        self.functions = [bind(function, tokenizer, default) for function in functions]
        self.weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise ValueError(f"got {len(self.weights)} reward weights for {len(self.functions)} rewards; give one each")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"reward weights must be finite numbers, got {self.weights}")
        for bound in self.functions:
            bound.check(columns)
        self.on_problem = on_problem
        # One call of the whole batch at a time: a function need not expect to be called from two threads.
        self._pools = [Pool(1 if b.policy.batch_size is None else b.policy.concurrency) for b in self.functions]

    @property
    def takes_parts(self) -> bool:
        """Whether some reward can begin before the whole batch is there."""
        return any(bound.policy.batch_size is not None for bound in self.functions)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> Tensor:
        """Return the scores, (B,) fp32 on the host, NaN for a response without one.

        Raises ValueError, naming the function, for a wrong count, a wrong type, or an infinite score, and whatever a
        function raises, unless its policy says otherwise.
        """
        with self.scoring(prompts, columns) as scoring:
            for row, completion in enumerate(completions):
                scoring.add(row, completion)
            return scoring.scores()

    def scoring(self, prompts: Sequence[Any], columns: Mapping[str, Any], late: Collection[str] = ()) -> Scoring:
        """Return the scoring of a batch whose completions are yet to come, and with them the columns named `late`."""
        return Scoring(self.functions, self.weights, self._pools, prompts, columns, late, self.on_problem)

"""What rewards failed to give in a run: written down, counted, and too much of it refused."""

from __future__ import annotations

import warnings

from torch import Tensor

from fastppo.monitor import RunFolder
from fastppo.rewards import Problem

_SAMPLES_PER_PROBLEM = 8  # whose texts are written down, of a call that may have had the whole batch


class Missing:
    """The failed calls of a run's rewards, and the batches that were skipped because too few scores were left.

    Args:
        min_valid: share of a batch that must have scores; with fewer, or none, it is skipped.
        max_in_a_row: raise after so many skipped batches.
    """

    def __init__(self, min_valid: float, max_in_a_row: int):
        if not 0 <= min_valid <= 1:
            raise ValueError(f"reward_min_valid must be a share from 0 to 1, got {min_valid!r}")
        self.min_valid, self.max_in_a_row = min_valid, max_in_a_row
        self.skipped = self.in_a_row = 0
        self.folder: RunFolder | None = None
        self._problems: list[Problem] = []  # since the last step
        self._gave_up: ValueError | None = None

    def note(self, problem: Problem) -> None:
        """Remember a failed call, and write it down at once."""
        self._problems.append(problem)
        if self.folder is not None:
            shown = problem.samples[:_SAMPLES_PER_PROBLEM]
            samples = [{"prompt": prompt, "completion": completion} for prompt, completion in shown]
            row = {"reward": problem.reward, "kind": problem.kind, "rows": problem.rows, "samples": samples}
            self.folder.problem(row, problem.text)

    def has_raised(self, error: BaseException) -> bool:
        """Whether an error that ends the run came from a reward, so that the trainer's state is whole."""
        return error is self._gave_up or any(problem.error is error for problem in self._problems)

    def skips(self, scores: Tensor) -> bool:
        """Whether a batch with these scores (B,) is skipped. Raises ValueError if that goes on."""
        valid = int((~scores.isnan()).sum())
        if valid and valid >= self.min_valid * len(scores):
            self.in_a_row = 0
            return False
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        lost = "".join(f", {int(n)} in {name.partition('/reward_')[2]}" for name, n in self._lost().items() if n)
        what = f"{valid} of {len(scores)} responses of a batch have a score (reward_min_valid={self.min_valid}{lost})"
        if self.in_a_row >= self.max_in_a_row:
            self._gave_up = ValueError(
                f"{self.in_a_row} batches in a row had too few scores; of the last {what}: mend the reward"
            )
            raise self._gave_up
        warnings.warn(f"{what}; going on to the next prompts", stacklevel=2)
        return True

    def stats(self) -> dict[str, float]:
        """Return the samples lost to failed calls since the last step, and the batches skipped in the run so far."""
        lost = self._lost()
        self._problems.clear()
        return lost | {"env/skipped_batches": float(self.skipped)}

    def _lost(self) -> dict[str, float]:
        kinds = {"error": "env/reward_errors", "timeout": "env/reward_timeouts"}
        return {name: float(sum(len(p.rows) for p in self._problems if p.kind == kind)) for kind, name in kinds.items()}

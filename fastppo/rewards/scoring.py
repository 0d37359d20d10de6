"""The scoring of one batch, whose completions become known one after the other."""

from __future__ import annotations

import math
import queue
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.rewards.binding import Bound
from fastppo.rewards.calls import TIMEOUTS, Call, Pool
from fastppo.rewards.scores import parse_scores


@dataclass(frozen=True)
class Problem:
    """A call of a reward that failed or took too long."""

    reward: str
    kind: str  # "error" or "timeout"
    rows: tuple[int, ...]  # positions in the batch of the samples that it was to score
    samples: tuple[tuple[Any, Any], ...]  # their prompts and completions
    error: BaseException | None  # None if the call was given up on
    text: str  # the traceback, or what took too long


class Scoring:
    """Calls each of several rewards as its policy has it, and adds up what they give.

    Use it as a context manager: calls that nobody waits for any more are given up on at its end.
    """

    def __init__(
        self,
        rewards: Sequence[Bound],
        weights: Sequence[float],
        pools: Sequence[Pool],
        prompts: Sequence[Any],
        columns: Mapping[str, Any],
        late: Collection[str],
        on_problem: Callable[[Problem], None] | None,
    ):
        count = len(prompts)
        self._rewards, self._weights, self._pools, self._on_problem = rewards, weights, pools, on_problem
        self._prompts, self._completions = prompts, [None] * count  # type: tuple[Any, list[Any]]
        self._columns = {**columns, **{name: [None] * count for name in late}}
        self._added: set[int] = set()
        self._queues: list[list[int]] = [[] for _ in rewards]  # rows that no call has taken yet
        self._calls: dict[Call, tuple[int, list[int]]] = {}  # those that are not over: number of the reward, rows
        self._over: queue.SimpleQueue[Call] = queue.SimpleQueue()  # filled by the calls' threads
        self._scores = torch.full((len(rewards), count), math.nan, dtype=torch.float64)
        for bound in rewards:
            bound.check(self._columns)

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        for call, (number, _) in self._calls.items():
            self._pools[number].give_up(call)
        self._calls.clear()

    def add(self, row: int, completion: Any, **late: Any) -> None:
        """Hand in the completion of a row and its entries of the late columns; a row that is there already stays.

        Raises what a call has raised so far, as `scores` does.
        """
        if row in self._added:
            return
        self._added.add(row)
        self._completions[row] = completion
        for name, value in late.items():
            self._columns[name][row] = value
        for number, bound in enumerate(self._rewards):
            self._queues[number].append(row)
            if len(self._queues[number]) == bound.policy.batch_size:
                self._start(number)
        self._settle()

    def scores(self) -> Tensor:
        """Return the scores, (B,) fp32 on the host, NaN for a response without one, when every call is over.

        Raises what a reward raised, unless its policy says otherwise, and ValueError for what it returned wrongly.
        """
        for number, bound in enumerate(self._rewards):
            if bound.is_concurrent and self._queues[number]:
                self._start(number)
        for number, bound in enumerate(self._rewards):
            if self._queues[number] and bound.policy.timeout is None:
                self._call_here(number)
            elif self._queues[number]:
                call = self._start(number)
                while call in self._calls:
                    self._wait()
        while self._calls:
            self._wait()
        return self._total()

    def _total(self) -> Tensor:
        total = (torch.tensor(self._weights, dtype=torch.float64)[:, None] * self._scores).sum(0).float()
        infinite = total.isinf().nonzero().flatten().tolist()
        if infinite:
            raise ValueError(
                f"the weighted sum of the scores of response {infinite[0]} is {total[infinite[0]].item()}: weights "
                f"{self._weights}, scores {self._scores[:, infinite[0]].tolist()}; use smaller weights"
            )
        return total

    # --- calls ------------------------------------------------------------------------------------------------

    def _take(self, number: int) -> tuple[list[int], Callable[[], Any]]:
        """Return the rows that wait for a reward, and the call that scores them."""
        rows, self._queues[number] = self._queues[number], []
        bound = self._rewards[number]
        if bound.policy.batch_size is None:
            rows.sort()
        if rows == list(range(len(self._completions))):
            prompts, completions, columns = self._prompts, self._completions, self._columns
        else:
            prompts, completions = [self._prompts[i] for i in rows], [self._completions[i] for i in rows]
            columns = {name: [values[i] for i in rows] for name, values in self._columns.items()}
        return rows, lambda: bound(prompts, completions, columns)

    def _start(self, number: int) -> Call:
        rows, run = self._take(number)
        call = self._pools[number].submit(run, self._over.put)
        self._calls[call] = (number, rows)
        return call

    def _call_here(self, number: int) -> None:
        rows, run = self._take(number)
        try:
            returned = run()
        except Exception as error:
            self._fail(number, rows, error)
        else:
            self._keep(number, rows, returned)

    def _wait(self) -> None:
        """Wait until some call is over or has taken too long."""
        left = [pool.seconds_left(timeout) for pool, timeout in self._timed()]
        known = [seconds for seconds in left if seconds is not None]
        with suppress(queue.Empty):
            self._finish(self._over.get(timeout=min(known) if known else None))
        self._settle()

    def _settle(self) -> None:
        """Take in what calls have returned or raised, and give up on those that have taken too long."""
        with suppress(queue.Empty):
            while True:
                self._finish(self._over.get_nowait())
        for pool, timeout in self._timed():
            for call in pool.late(timeout):
                pool.give_up(call)
                if call in self._calls:
                    self._report(*self._calls.pop(call), None)

    def _timed(self) -> list[tuple[Pool, float]]:
        """Return the pools whose calls can be late, and after how many seconds."""
        limits = [bound.policy.timeout for bound in self._rewards]
        return [(pool, limit) for pool, limit in zip(self._pools, limits, strict=True) if limit is not None]

    def _finish(self, call: Call) -> None:
        if call not in self._calls:  # it was given up on at the same moment
            return
        number, rows = self._calls.pop(call)
        if call.error is None:
            self._keep(number, rows, call.returned)
        else:
            self._fail(number, rows, call.error)

    # --- outcomes ---------------------------------------------------------------------------------------------

    def _keep(self, number: int, rows: list[int], returned: Any) -> None:
        bound = self._rewards[number]
        try:
            scores = parse_scores(returned, len(rows), clip=bound.policy.clip, rows=rows)
        except (ValueError, TypeError) as error:
            wrong = ValueError(f"reward {bound.name}: {error}")
            wrong.__cause__ = error
            self._report(number, rows, wrong)
            raise wrong from error
        self._scores[number, rows] = scores.double()

    def _fail(self, number: int, rows: list[int], error: BaseException) -> None:
        if not isinstance(error, Exception):  # an interrupt is nobody's fault
            raise error
        self._report(number, rows, error)
        on_error = self._rewards[number].policy.on_error
        if isinstance(error, TIMEOUTS) or on_error == "drop":
            return
        if on_error == "raise":
            raise error
        self._scores[number, rows] = float(on_error)

    def _report(self, number: int, rows: list[int], error: BaseException | None) -> None:
        """Tell of a call that failed; without an error it was given up on."""
        if self._on_problem is None:
            return
        bound = self._rewards[number]
        kind = "timeout" if error is None or isinstance(error, TIMEOUTS) else "error"
        text = f"no answer within {bound.policy.timeout} seconds"
        if error is not None:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        samples = tuple((self._prompts[i], self._completions[i]) for i in rows)
        self._on_problem(Problem(bound.name, kind, tuple(rows), samples, error, text))

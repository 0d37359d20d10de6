"""Who computes what in the next step: continuous batching, chunked prefill, forks, preemption. No tensors.

A prompt is prefilled once, as a sequence of its own; the jobs that answer it are forked from that, and the last of
them takes it over. A job that was preempted keeps its tokens and comes back the same way: its prompt is prefilled
again if it must be, then its response, without drawing anew.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fastppo.engine.blocks import Held, Ledger
from fastppo.engine.jobs import Chunk, Job, Plan, Prompt
from fastppo.reference_attention import BLOCK

# Until so many responses have ended, their length is unknown and half of what is allowed is expected.
_MIN_OBSERVED = 8
_QUANTILE = 0.75


class Scheduler:
    """Plans steps until every job is over.

    Args:
        ledger: the blocks; each job must fit into them alone.
        jobs: served longest limit first, otherwise in this order.
        max_rows: jobs in work at a time.
        prefill_tokens: tokens in the chunks of a step, at most.
        spare: names a sequence that may be freed when blocks run out, or None.
        keep: leave the sequences of ended jobs to the caller, without rows in the tables.
    """

    def __init__(
        self,
        ledger: Ledger,
        jobs: Sequence[Job],
        max_rows: int,
        prefill_tokens: int,
        spare: Callable[[], Held | None] = lambda: None,
        keep: bool = False,
    ):
        self.ledger, self.max_rows, self.prefill_tokens = ledger, max_rows, prefill_tokens
        self._spare, self._keep = spare, keep
        self.queue = deque(sorted(jobs, key=lambda job: -job.limit))
        self.rows: list[Job] = []  # in the order in which they came in
        self.decoding: list[Job] = []  # of the rows, those that decode; the jobs of one prompt side by side
        self.prefilling: list[Prompt | Job] = []
        self.preemptions = self.recomputed_tokens = 0
        self._open = {job.prompt: None for job in jobs if job.prompt.held is not None}  # prompts with a sequence
        self._lengths: list[int] = []  # of the responses that have ended
        self._is_full = False  # the head of the queue was refused, and nobody has left since
        for job in jobs:
            job.prompt.jobs += 1

    @property
    def is_done(self) -> bool:
        """Whether every job is over."""
        return not self.queue and not self.rows

    def join(self, jobs: Sequence[Job]) -> None:
        """Take in more jobs, ahead of those that wait: what they go on with holds blocks already."""
        self.queue.extendleft(reversed(jobs))
        self._is_full = False
        for job in jobs:
            job.prompt.jobs += 1
            if job.prompt.held is not None:
                self._open[job.prompt] = None

    def plan(self) -> Plan:
        """Return the next step, empty if all is done. The caller runs it and then calls `commit`."""
        self._grow()
        self._admit()
        while True:
            plan = Plan(list(self.decoding))
            self._prefill(plan)
            self._fork(plan)
            if plan.decode or plan.chunks or plan.starts or self.is_done:
                return plan
            self._preempt()
            if not self.rows:  # all were sent back: the first begins again, with all blocks for itself
                self._admit()

    def reserve(self, plan: Plan, most: int) -> int:
        """Return for how many steps in a row, up to `most`, the plan can be run before anybody looks at its draws.

        One, unless it only decodes and there are blocks for more. After `commit`, `again` gives the later ones.
        """
        if plan.chunks or plan.starts:
            return 1
        steps = min([most, *(job.limit - job.drawn for job in plan.decode)])
        if steps == 1:
            return 1
        helds = [held for job in plan.decode if (held := job.held) is not None]
        lengths = [held.length for held in helds]
        for held in helds:
            self.ledger.forget(held, held.length - 1)
        if not self.ledger.fits(self.ledger.missing(helds, steps - 1)):
            return 1
        for held, length in zip(helds, lengths, strict=True):
            self.ledger.extend(held, length + steps - 1)
            held.length = length
        return steps

    def again(self, plan: Plan) -> Plan:
        """Return the next of the steps that were reserved for a plan: what is left of its jobs."""
        left = set(self.decoding)
        decode = [job for job in plan.decode if job in left]
        for job in decode:
            if job.held is not None:
                job.held.length += 1
        return Plan(decode)

    def commit(self, plan: Plan, ended: Iterable[Job]) -> None:
        """Count the tokens that the plan drew, and let the jobs go that ended with them."""
        joined = [*plan.resumed, *plan.starts]
        for job in (*plan.decode, *joined):
            job.drawn += 1
        if joined:
            self.decoding = sorted([*self.decoding, *joined], key=lambda job: (job.prompt.number, job.index))
        for job in ended:
            insort(self._lengths, job.drawn)
            self.leave(job)

    def leave(self, job: Job) -> None:
        """End a job, wherever it is."""
        self._is_full = False
        if job in self.queue:
            self.queue.remove(job)
        self._unplan(job)
        if job.held is None:
            job.prompt.jobs -= 1
            if not job.prompt.jobs:
                self._close(job.prompt)
        elif self._keep:
            self.ledger.unseat(job.held)
        else:
            self._free(job)

    def abandon(self) -> None:
        """Give back whatever the jobs that are not over hold."""
        self._keep = False
        for job in [*self.rows, *self.queue]:
            self.leave(job)

    def _grow(self) -> None:
        """Make room for the token of every job that decodes, at the cost of the youngest if need be."""
        while True:
            full = [held for job in self.decoding if (held := job.held) is not None and not held.length % BLOCK]
            for held in full:
                self.ledger.forget(held, held.length)
            if self.ledger.fits(self.ledger.missing(full, 1)):  # steps that ended early have reserved some
                break
            self._preempt()
        for job in self.decoding:
            if job.held is not None:
                job.held.length += 1
        for held in full:
            self.ledger.extend(held, held.length)

    def _admit(self) -> None:
        """Give free rows to the queue, as long as the blocks are expected to last."""
        while self.queue and len(self.rows) < self.max_rows and not (self.rows and self._is_full):
            job, prompt = self.queue[0], self.queue[0].prompt
            while self.rows and not self.ledger.fits(self._wanted(job)):
                spare = self._spare()
                if spare is None:
                    self._is_full = True
                    return
                self.ledger.free(spare)
            self.rows.append(self.queue.popleft())
            prompt.waiting.append(job)
            if prompt.held is None:
                prompt.held = self.ledger.open()
                self._open[prompt] = None
            if prompt.held.length < prompt.length and prompt not in self.prefilling:
                self.ledger.seat(prompt.held)
                self.prefilling.append(prompt)

    def _prefill(self, plan: Plan) -> None:
        budget = self.prefill_tokens
        for owner in list(self.prefilling):
            held = owner.held
            if held is None or not budget:
                break
            self.ledger.forget(held, held.length)
            start, stop = held.length, self.ledger.reach(held, min(owner.length, held.length + budget))
            if stop == start:
                break  # those behind it must not take the blocks that it waits for
            self.ledger.extend(held, stop)
            plan.chunks.append(Chunk(owner, held, start, stop))
            budget -= stop - start
            if stop == owner.length:
                self.prefilling.remove(owner)
            self.recomputed_tokens += max(0, min(stop, owner.seen) - start)
            owner.seen = max(owner.seen, stop)

    def _fork(self, plan: Plan) -> None:
        """Start the jobs whose prompt is computed."""
        for prompt in list(self._open):
            while prompt.waiting and prompt.held is not None and prompt.held.length == prompt.length:
                fork = None if prompt.jobs == 1 else self.ledger.fork(prompt.held)
                is_blocked = prompt.jobs > 1 and fork is None
                if is_blocked and (plan.decode or plan.chunks or plan.starts):
                    break  # there will be blocks when others have ended
                job = prompt.waiting.pop(0)
                prompt.jobs -= 1
                if fork is None:
                    job.held, prompt.held = prompt.held, None
                    self._close(prompt)
                else:
                    job.held = fork[0]
                    plan.copies += fork[1]
                if job.drawn:
                    self.prefilling.append(job)
                else:
                    plan.starts.append(job)

    def _wanted(self, job: Job) -> list[int]:
        """Return the blocks that this job and those in work are expected to want yet, in every group."""
        owners: list[Prompt | Job] = [*{*self._open, job.prompt}, *self.rows, job]
        return [sum(self._still(owner, group) for owner in owners) for group in range(len(self.ledger.pools))]

    def _still(self, owner: Prompt | Job, group: int) -> int:
        length, have = owner.length // BLOCK * BLOCK, 0  # what is left of a prompt counts as its jobs'
        if isinstance(owner, Job):
            expected = owner.limit // 2
            if len(self._lengths) >= _MIN_OBSERVED:
                expected = self._lengths[int(_QUANTILE * len(self._lengths))]
            length = owner.prompt.length + min(owner.limit, max(owner.drawn + BLOCK, expected))
            have = self.ledger.least(group, owner.prompt.length // BLOCK * BLOCK)  # shared with the prompt
        if owner.held is not None:
            have = len(owner.held.blocks[group])
        return max(0, self.ledger.least(group, length) - have)

    def _preempt(self) -> None:
        """Free somebody's blocks: of an earlier call, of a prompt that nobody in a row waits for, of the youngest."""
        spare = self._spare()
        if spare is not None:
            return self.ledger.free(spare)
        for prompt in self._open:
            if not prompt.waiting:
                return self._close(prompt)
        for job in reversed(self.rows):
            return self._send_back(job) if job.held is not None else self._close(job.prompt)
        raise RuntimeError("a request does not fit into the KV cache alone, which should have been found before")

    def _send_back(self, job: Job) -> None:
        """Free the sequence of a job and put it at the head of the queue."""
        self.preemptions += 1
        self._is_full = True
        self._unplan(job)
        if job.held is not None:
            job.seen = max(job.seen, job.held.length)
        self._free(job)
        job.prompt.jobs += 1
        self.queue.appendleft(job)

    def _free(self, owner: Prompt | Job) -> None:
        if owner.held is not None:
            self.ledger.free(owner.held)
        owner.held = None

    def _unplan(self, job: Job) -> None:
        for jobs in (self.rows, self.decoding, self.prefilling, job.prompt.waiting):
            if job in jobs:
                jobs.remove(job)

    def _close(self, prompt: Prompt) -> None:
        """Free the sequence of a prompt, and send back those who wait for it."""
        self._free(prompt)
        self._open.pop(prompt, None)
        if prompt in self.prefilling:
            self.prefilling.remove(prompt)
        for job in reversed(prompt.waiting):
            self.rows.remove(job)
            self.queue.appendleft(job)
        prompt.waiting.clear()

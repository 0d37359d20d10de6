"""Decoding over the paged cache: runs the scheduler's plans on the model and draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastppo.engine.jobs import Chunk, Job, Plan, Prompt
from fastppo.engine.kv import Kept, PagedCache
from fastppo.engine.loop import Loop
from fastppo.engine.requests import Draw, Requests, on_host
from fastppo.engine.sampler import Sampler
from fastppo.engine.schedule import Scheduler
from fastppo.engine.steps import DecodeStep, module_step
from fastppo.models.attach import attached


class PagedDecoder:
    """One generate call on a `PagedCache`, `max_rows` requests and `prefill_tokens` prompt tokens at a time.

    `program` runs the decode rows in place of the model's modules, if there is one. Where nothing but decoding is to
    be done, up to `steps_per_check` tokens are drawn before the host looks whether a response has ended with them; what
    was drawn after that is dropped. A `loop` draws many as well, but stops where a response ends.
    """

    def __init__(
        self,
        model: Any,
        requests: Requests,
        sampler: Sampler,
        cache: PagedCache,
        *,
        max_rows: int,
        prefill_tokens: int,
        keep: bool = False,
        program: DecodeStep | None = None,
        steps_per_check: int = 1,
        loop: Loop | None = None,
    ):
        self.loop = loop
        self.model, self.requests, self.sampler, self.cache = model, requests, sampler, cache
        self.program, self.keep, self.steps_per_check = program, keep, steps_per_check
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        lengths = [len(ids) + limit for ids, limit in zip(requests.prompts, requests.limits, strict=True)]
        # What is kept holds its blocks when its row is another's.
        ledger = cache.take(lengths, len(lengths) if keep else max_rows, prefill_tokens)
        self.jobs = self._make_jobs(range(len(requests.prompts)))
        self.scheduler = Scheduler(ledger, self.jobs, max_rows, prefill_tokens, cache.spare, keep)
        self._ends: dict[Prompt, Tensor] = {}  # last hidden states (H,) of prompts that have jobs to start yet
        self._bytes = cache.num_bytes
        self._counts = {"steps": 0, "prefill_tokens": 0, "decode_tokens": 0}
        self._seconds = {"schedule": 0.0, "forward": 0.0, "draw": 0.0}

    def _make_jobs(self, indices: Iterable[int]) -> list[Job]:
        """Return a job per request; equal prompts are one, with what was kept of it."""
        prompts: dict[tuple[int, ...], Prompt] = {}
        jobs = []
        for index in indices:
            ids, number = self.requests.prompts[index], self.requests.places.sources[index]
            prompt = prompts.setdefault(tuple(ids.tolist()), Prompt(index, len(ids)))
            held = self.cache.recall(number, ids)
            if prompt.held is None:
                prompt.held = held
            elif held is not None and self.cache.ledger is not None:
                self.cache.ledger.free(held)
            jobs.append(Job(index, prompt, self.requests.limits[index]))
        return jobs

    def extend(self, indices: Sequence[int]) -> None:
        """Take in requests that were added to the list while others are under way; enlarge the cache if need be."""
        jobs = self._make_jobs(indices)
        self.jobs += jobs
        self.scheduler.join(jobs)
        going_on = [job for job, reason in zip(self.jobs, self.requests.reasons, strict=True) if not reason]
        self.sampler.logits.make_room(min(len(going_on), self.max_rows))
        lengths = [job.prompt.length + job.limit for job in going_on]
        ledger, helds = self.scheduler.ledger, [job.held or job.prompt.held for job in going_on]
        missing = [
            sum(
                max(0, ledger.least(group, length) - (0 if held is None else len(held.blocks[group])))
                for length, held in zip(lengths, helds, strict=True)
            )
            for group in range(len(ledger.pools))
        ]
        if max(lengths) > ledger.longest or not ledger.fits(missing):
            self.cache.take(lengths, len(lengths) if self.keep else self.max_rows, self.prefill_tokens)
            self._bytes = self.cache.num_bytes

    def ready(self) -> AbstractContextManager[None]:
        """Return the context that steps need."""
        return attached(self.model)

    def step(self) -> bool:
        """Run the schedule up to the next look at what was drawn; return whether anything is left to do."""
        start = perf_counter()
        for request in self.requests.cancel():
            self.scheduler.leave(self.jobs[request])
            self._store(self.jobs[request])
        if self.scheduler.is_done:  # what was left has just been cancelled: there is nothing to compute
            return False
        plan = self.scheduler.plan()
        steps = self.scheduler.reserve(plan, self.tokens_per_step)
        planned = perf_counter()
        if self.loop is not None and steps > 1:
            draws = self.loop.draws(*self._last(plan.decode), self.requests.next_places(plan.drawing), steps)
            computed = perf_counter()
        else:
            hidden = self._compute(plan)
            self.cache.copy(plan.copies)
            computed = perf_counter()
            draws = self._draw(plan, hidden, steps)
        drawn = perf_counter()
        self._commit(plan, draws)
        self._counts["steps"] += max(1, len(draws))
        self._counts["prefill_tokens"] += sum(chunk.stop - chunk.start for chunk in plan.chunks)
        self._seconds["forward"] += computed - planned
        self._seconds["draw"] += drawn - computed
        self._seconds["schedule"] += planned - start + perf_counter() - drawn
        return not self.scheduler.is_done

    @property
    def tokens_per_step(self) -> int:
        """The most tokens that `step` draws for a row."""
        return self.steps_per_check if self.loop is None else self.loop.most

    def close(self, is_complete: bool) -> None:
        """Give the memory back, except for the sequences that are to be kept after a call that is complete."""
        self.scheduler.abandon()
        self.cache.drop(() if is_complete else self.requests.places.numbers)

    def metrics(self) -> dict[str, Any]:
        """Return what the call has cost so far."""
        scheduler, ledger, decoded = self.scheduler, self.scheduler.ledger, self._counts["decode_tokens"]
        return self._counts | {
            "tier": "A",
            "decoder": "modules" if self.program is None else self.program.name,
            "mean_rows": decoded / max(1, self._counts["steps"]),
            "recomputed_tokens": scheduler.recomputed_tokens,
            "preemptions": scheduler.preemptions,
            "shared_blocks": ledger.shared,
            "kv_blocks_peak": sum(pool.peak for pool in ledger.pools),
            "kv_bytes": self._bytes,
            "seconds": dict(self._seconds),
        }

    def _store(self, job: Job) -> None:
        """Leave the sequence of a job that is over to the cache, if it is to be kept."""
        if job.held is not None:
            number = self.requests.places.numbers[job.index]
            self.cache.kept[number] = Kept(job.held, self.requests.sequence(job.index))
            job.held = None

    # --- one step ---------------------------------------------------------------------------------------------

    def _draw(self, plan: Plan, hidden: Tensor, steps: int) -> list[Draw]:
        """Draw a token for every job of the plan, and `steps` - 1 more from steps like it, all on the device."""
        jobs = plan.drawing
        if not jobs:
            return []
        places, may_be_early = self.requests.next_places(jobs), self.sampler.may_be_early(jobs)
        draws = [self.sampler.draw_at(hidden, places, may_be_early)]
        if steps > 1:
            _, positions, sequences = self._last(plan.decode)
        for _ in range(steps - 1):
            places[1:] += 1
            positions = positions + 1
            hidden = self._forward(self.program, draws[-1].tokens, positions, sequences)
            draws.append(self.sampler.draw_at(hidden, places, may_be_early))
        return on_host(draws)

    def _commit(self, plan: Plan, draws: list[Draw]) -> None:
        """Record what the plan and the steps after it drew, as far as responses had not ended."""
        if not draws:
            return self.scheduler.commit(plan, [])
        rows = {request: row for row, request in enumerate(plan.drawing)}
        for number, draw in enumerate(draws):
            plan = plan if number == 0 else self.scheduler.again(plan)
            if not plan.drawing:
                return
            left = draw.rows([rows[request] for request in plan.drawing])
            ended = self.requests.record(plan.drawing, left)
            self.scheduler.commit(plan, [self.jobs[request] for request in ended])
            for request in ended:
                self._store(self.jobs[request])
            self._counts["decode_tokens"] += len(plan.decode)

    def _compute(self, plan: Plan) -> Tensor:
        """Run a plan through the model; return the hidden states (N, H) that its draws are made from."""
        parts, decode = [], plan.decode
        if decode and (self.program is not None or not plan.chunks):
            parts.append(self._forward(self.program, *self._last(decode)))
        if plan.chunks:
            parts.append(self._run([] if parts else decode, plan.chunks))
        if not plan.chunks and not plan.starts:
            return parts[0]
        hidden = torch.cat(parts) if parts else self.sampler.head.weight[:0]
        rows, place = list(range(len(decode))), len(decode) - 1
        for chunk in plan.chunks:
            place += chunk.stop - chunk.start
            if chunk.is_last and isinstance(chunk.owner, Prompt):
                self._ends[chunk.owner] = hidden[place]
            elif chunk.is_last:
                rows.append(place)
        result = torch.cat([hidden[rows], *(self._ends[job.prompt][None] for job in plan.starts)])
        self._ends = {prompt: end for prompt, end in self._ends.items() if prompt.held is not None}
        return result

    def _last(self, decode: Sequence[Job]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last tokens of jobs, their positions and their rows of the tables, (N,) each."""
        helds = [job.held for job in decode if job.held is not None]
        device = self.cache.like.device
        ids = torch.tensor([self.requests.tokens[job.index][-1] for job in decode], dtype=torch.int64, device=device)
        places = [[held.length - 1 for held in helds], [held.slot for held in helds]]
        positions, sequences = torch.tensor(places, dtype=torch.int32, device=device)
        return ids, positions, sequences

    def _run(self, decode: Sequence[Job], chunks: Sequence[Chunk]) -> Tensor:
        """Run the last tokens of jobs and then chunks side by side; return their hidden states (T, H)."""
        ids, positions, sequences = self._last(decode)
        where = [(place, chunk.held.slot) for chunk in chunks for place in range(chunk.start, chunk.stop)]
        places = torch.tensor(where, dtype=torch.int32, device=ids.device).T
        ids = torch.cat([ids, *map(self._tokens, chunks)])
        return self._forward(None, ids, torch.cat([positions, places[0]]), torch.cat([sequences, places[1]]))

    def _forward(self, program: DecodeStep | None, ids: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        if program is not None:
            return program(ids, positions, sequences)
        return module_step(self.model, self.cache, ids, positions, sequences)

    def _tokens(self, chunk: Chunk) -> Tensor:
        owner = chunk.owner
        whole = (
            self.requests.prompts[owner.number] if isinstance(owner, Prompt) else self.requests.sequence(owner.index)
        )
        return whole[chunk.start : chunk.stop]

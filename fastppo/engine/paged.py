"""Decoding over the paged cache: runs the scheduler's plans on the model and draws."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastppo.engine.kv import Kept, PagedCache
from fastppo.engine.requests import Requests
from fastppo.engine.sampler import Sampler
from fastppo.engine.schedule import Chunk, Job, Plan, Prompt, Scheduler
from fastppo.engine.steps import ProgramStep, module_step
from fastppo.models.attach import attached


class PagedDecoder:
    """One generate call on a `PagedCache`, `max_rows` requests and `prefill_tokens` prompt tokens at a time.

    `program` runs the decode rows in place of the model's modules, if there is one.
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
        program: ProgramStep | None = None,
    ):
        self.model, self.requests, self.sampler, self.cache = model, requests, sampler, cache
        self.program, self.keep = program, keep
        lengths = [len(ids) + limit for ids, limit in zip(requests.prompts, requests.limits, strict=True)]
        ledger = cache.take(lengths, max_rows, prefill_tokens)
        self.jobs = self._make_jobs()
        self.scheduler = Scheduler(ledger, self.jobs, max_rows, prefill_tokens, cache.spare, keep)
        self._ends: dict[Prompt, Tensor] = {}  # last hidden states (H,) of prompts that have jobs to start yet
        self._bytes = cache.num_bytes
        self._counts = {"steps": 0, "prefill_tokens": 0, "decode_tokens": 0}
        self._seconds = {"schedule": 0.0, "forward": 0.0, "draw": 0.0}

    def _make_jobs(self) -> list[Job]:
        """Return a job per request; equal prompts are one, with what was kept of it."""
        prompts: dict[tuple[int, ...], Prompt] = {}
        jobs = []
        for index, (ids, number) in enumerate(zip(self.requests.prompts, self.requests.places.sources, strict=True)):
            prompt = prompts.setdefault(tuple(ids.tolist()), Prompt(index, len(ids)))
            held = self.cache.recall(number, ids)
            if prompt.held is None:
                prompt.held = held
            elif held is not None and self.cache.ledger is not None:
                self.cache.ledger.free(held)
            jobs.append(Job(index, prompt, self.requests.limits[index]))
        return jobs

    def ready(self) -> AbstractContextManager[None]:
        """Return the context that steps need."""
        return attached(self.model)

    def step(self) -> bool:
        """Run one step of the schedule; return whether anything is left to do."""
        start = perf_counter()
        for request in self.requests.cancel():
            self.scheduler.leave(self.jobs[request])
        plan = self.scheduler.plan()
        planned = perf_counter()
        hidden = self._compute(plan)
        self.cache.copy(plan.copies)
        computed = perf_counter()
        jobs = [job.index for part in (plan.decode, plan.resumed, plan.starts) for job in part]
        ended = self.requests.record(jobs, self.sampler.draw(hidden, jobs)) if jobs else []
        drawn = perf_counter()
        self.scheduler.commit(plan, [self.jobs[request] for request in ended])
        self._counts["steps"] += 1
        self._counts["decode_tokens"] += len(plan.decode)
        self._counts["prefill_tokens"] += sum(chunk.stop - chunk.start for chunk in plan.chunks)
        self._seconds["forward"] += computed - planned
        self._seconds["draw"] += drawn - computed
        self._seconds["schedule"] += planned - start + perf_counter() - drawn
        return not self.scheduler.is_done

    def close(self, is_complete: bool) -> None:
        """Give the memory back, except for the sequences that are to be kept after a call that is complete."""
        self.scheduler.abandon()
        for job, number in zip(self.jobs, self.requests.places.numbers, strict=True):
            if job.held is not None and is_complete:
                self.cache.kept[number] = Kept(job.held, self.requests.sequence(job.index))
            elif job.held is not None:
                self.scheduler.ledger.free(job.held)
        if not self.cache.kept:
            self.cache.release()

    def metrics(self) -> dict[str, Any]:
        """Return what the call has cost so far."""
        scheduler, ledger, decoded = self.scheduler, self.scheduler.ledger, self._counts["decode_tokens"]
        return self._counts | {
            "tier": "A",
            "decoder": "modules" if self.program is None else "program",
            "mean_rows": decoded / max(1, self._counts["steps"]),
            "recomputed_tokens": scheduler.recomputed_tokens,
            "preemptions": scheduler.preemptions,
            "shared_blocks": ledger.shared,
            "kv_blocks_peak": sum(pool.peak for pool in ledger.pools),
            "kv_bytes": self._bytes,
            "seconds": dict(self._seconds),
        }

    # --- one step ---------------------------------------------------------------------------------------------

    def _compute(self, plan: Plan) -> Tensor:
        """Run a plan through the model; return the hidden states (N, H) that its draws are made from."""
        parts, decode = [], plan.decode
        if decode and (self.program is not None or not plan.chunks):
            parts.append(self._run(decode, [], self.program))
        if plan.chunks:
            parts.append(self._run([] if parts else decode, plan.chunks, None))
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

    def _run(self, decode: Sequence[Job], chunks: Sequence[Chunk], program: ProgramStep | None) -> Tensor:
        """Run the last tokens of jobs and then chunks side by side; return their hidden states (T, H)."""
        helds = [job.held for job in decode if job.held is not None]
        tokens = torch.tensor([self.requests.tokens[job.index][-1] for job in decode], dtype=torch.int64)
        places = [held.length - 1 for held in helds]
        slots = [held.slot for held in helds]
        for chunk in chunks:
            places += range(chunk.start, chunk.stop)
            slots += [chunk.held.slot] * (chunk.stop - chunk.start)
        device = self.cache.like.device
        ids = torch.cat([tokens.to(device), *map(self._tokens, chunks)]) if chunks else tokens.to(device)
        positions, sequences = torch.tensor([places, slots], dtype=torch.int32, device=device)
        if program is not None:
            return program(ids, positions, sequences)
        return module_step(self.model, self.cache, ids, positions, sequences)

    def _tokens(self, chunk: Chunk) -> Tensor:
        owner = chunk.owner
        whole = (
            self.requests.prompts[owner.number] if isinstance(owner, Prompt) else self.requests.sequence(owner.index)
        )
        return whole[chunk.start : chunk.stop]

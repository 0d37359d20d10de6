"""The scheduler on random traces, with a KV cache of labels: who computes what, and what every token would see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.engine.blocks import BLOCK, Ledger, blocks_of
from fastppo.engine.jobs import Job, Prompt
from fastppo.engine.schedule import Scheduler


class Simulation:
    """Runs plans; instead of keys each slot of each block holds a label of the token that was stored there."""

    def __init__(self, prompts, windows, sizes, max_rows, prefill_tokens, lengths, most=1):
        width = max(blocks_of(prompt + limit) for prompt, _, limit in prompts)
        self.most, self.longest = most, 0
        self.ledger, self.lengths = Ledger(windows, sizes, width), lengths
        self.slots = [np.full((size, BLOCK), None, dtype=object) for size in sizes]
        self.prompts = [Prompt(number, length) for number, (length, _, _) in enumerate(prompts)]
        self.jobs = []
        for prompt, (_, n, limit) in zip(self.prompts, prompts, strict=True):
            self.jobs += [Job(len(self.jobs) + i, prompt, limit) for i in range(n)]
        self.scheduler = Scheduler(self.ledger, self.jobs, max_rows, prefill_tokens)
        self.drawn = [[] for _ in self.jobs]
        self.over, self.prefilled, self.cancelled = set(), 0, {}

    def label(self, owner, position):
        prompt = owner if isinstance(owner, Prompt) else owner.prompt
        return ("prompt", prompt.number, position) if position < prompt.length else ("job", owner.index, position)

    def compute(self, owner, held, start, stop):
        """Store tokens, and check that each of them sees exactly its own past."""
        for group, (window, table) in enumerate(zip(self.ledger.windows, self.ledger.tables, strict=True)):
            row, slots, pool = table[held.slot], self.slots[group], self.ledger.pools[group]
            for p in range(start, stop):
                # The forks of a prompt are made in the step that ends it, and only then see what is written.
                assert isinstance(owner, Prompt) or not pool.is_shared(int(row[p // BLOCK]))
                slots[row[p // BLOCK], p % BLOCK] = self.label(owner, p)
            for query in {start, stop - 1}:
                for p in range(0 if window is None else max(0, query + 1 - window), query + 1):
                    assert slots[row[p // BLOCK], p % BLOCK] == self.label(owner, p)

    def step(self):
        scheduler = self.scheduler
        for job in [self.jobs[i] for i, when in self.cancelled.items() if i not in self.over and when <= self.steps]:
            self.over.add(job.index)
            scheduler.leave(job)
        plan = scheduler.plan()
        steps = scheduler.reserve(plan, self.most)
        self.longest = max(self.longest, steps)
        assert 1 <= steps <= self.most
        for pool, slots in zip(self.ledger.pools, self.slots, strict=True):
            slots[pool._free] = None  # what was given back is gone
        assert len(scheduler.rows) <= scheduler.max_rows
        assert sum(chunk.stop - chunk.start for chunk in plan.chunks) <= scheduler.prefill_tokens
        for job in plan.decode:
            self.compute(job, job.held, job.length - 1, job.length)
        for chunk in plan.chunks:
            self.compute(chunk.owner, chunk.held, chunk.start, chunk.stop)
            self.prefilled += chunk.stop - chunk.start if isinstance(chunk.owner, Prompt) else 0
        for group, source, target in plan.copies:
            self.slots[group][target] = self.slots[group][source]
        for ahead in range(1, steps):  # all of it happens before anybody knows who has ended
            for job in plan.decode:
                self.compute(job, job.held, job.length - 1 + ahead, job.length + ahead)
        self.commit(plan)
        for _ in range(1, steps):
            plan = scheduler.again(plan)
            self.commit(plan)

    def commit(self, plan):
        draws = [*plan.decode, *plan.resumed, *plan.starts]
        assert plan.drawing == [job.index for job in draws]
        assert len({job.index for job in draws}) == len(draws)
        for job in draws:
            self.drawn[job.index].append(job.drawn)
        ended = [job for job in draws if job.drawn + 1 >= self.lengths[job.index]]
        self.scheduler.commit(plan, ended)
        self.over |= {job.index for job in ended}
        self.check_references()

    def check_references(self):
        helds = [h for part in (self.prompts, self.jobs) for x in part if (h := x.held) and x not in self.ended()]
        for group, pool in enumerate(self.ledger.pools):
            counts = np.zeros(pool.size, int)
            for held in helds:
                np.add.at(counts, held.blocks[group], 1)
            assert counts.tolist() == pool._references
            assert pool.free == int((counts == 0).sum())

    def ended(self):
        return [self.jobs[i] for i in self.over]

    def run(self):
        self.steps = 0
        while not self.scheduler.is_done:
            self.step()
            self.steps += 1
            assert self.steps < 20000, "somebody starves"
        assert all(pool.free == pool.size for pool in self.ledger.pools)
        for job in self.jobs:
            assert self.drawn[job.index] == list(range(len(self.drawn[job.index])))
            if job.index not in self.cancelled:
                assert len(self.drawn[job.index]) == self.lengths[job.index]
        return self


@st.composite
def traces(draw):
    prompts = draw(
        st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 50)), min_size=1, max_size=8)
    )
    windows = draw(st.sampled_from([(None,), (None, 5), (None, 20), (16,), (None, 33, 7)]))
    ledger = Ledger(windows, [0] * len(windows), 1)
    least = [max(ledger.least(g, length + limit) for length, _, limit in prompts) for g in range(len(windows))]
    sizes = [count + draw(st.integers(0, 12)) for count in least]
    limits = [limit for _, n, limit in prompts for _ in range(n)]
    lengths = [draw(st.integers(1, limit)) for limit in limits]
    most = draw(st.sampled_from([1, 2, 8, 40]))
    return prompts, windows, sizes, draw(st.integers(1, 9)), draw(st.integers(1, 70)), lengths, most


@settings(max_examples=150, deadline=None)
@given(traces(), st.data())
def test_nothing_is_lost_or_seen_that_should_not_be(trace, data):
    simulation = Simulation(*trace)
    count = len(simulation.jobs)
    simulation.cancelled = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 30), max_size=3))
    simulation.run()


def test_a_prompt_is_prefilled_once_for_all_its_samples():
    done = Simulation([(33, 8, 4), (5, 1, 4)], (None,), [40], 3, 16, [4] * 9).run()
    assert done.prefilled == 33 + 5
    assert done.ledger.shared == 7 * 2
    assert done.scheduler.recomputed_tokens == done.scheduler.preemptions == 0


def test_the_youngest_makes_room_and_comes_back():
    done = Simulation([(16, 1, 64), (16, 1, 64)], (None,), [7], 2, 64, [64, 64]).run()
    assert done.scheduler.preemptions > 0
    assert done.scheduler.recomputed_tokens > 0


@pytest.mark.parametrize("reverse", [False, True])
def test_long_limits_come_first(reverse):
    limits = [3, 30, 20][:: -1 if reverse else 1]
    simulation = Simulation([(4, 1, limit) for limit in limits], (None,), [40], 1, 64, limits)
    order = [job.limit for job in simulation.scheduler.queue]
    assert order == sorted(limits, reverse=True)
    simulation.run()


def test_a_block_cannot_be_given_back_twice():
    ledger = Ledger((None,), [2], 2)
    held = ledger.open()
    ledger.extend(held, 20)
    blocks = list(held.blocks[0])
    ledger.free(held)
    with pytest.raises(RuntimeError, match="given back twice"):
        ledger.pools[0].give_back(blocks[:1])


def test_truncation_leaves_shared_blocks_alone_and_knows_what_a_window_has_forgotten():
    ledger = Ledger((None, 4), [9, 9], 4)
    held = ledger.open()
    ledger.extend(held, 40)
    fork, copies = ledger.fork(held)
    assert len(copies) == 2
    ledger.truncate(fork, 39)  # its last block is its own
    assert fork.length == 39
    ledger.truncate(fork, 30)  # block 1 is shared: it is not to be written to
    assert fork.length == 16
    ledger.forget(held, held.length)
    assert held.first == [0, 2]
    ledger.truncate(held, 34)  # a query at 34 sees 31, whose block is gone
    assert held.length == 0
    for one in (held, fork):
        ledger.free(one)
    assert [pool.free for pool in ledger.pools] == [9, 9]


def test_what_was_reserved_is_not_asked_for_again():
    """Steps may end before all that were reserved are done, with every block in somebody's hands."""
    ledger = Ledger([None], [6], 3)
    scheduler = Scheduler(ledger, [Job(i, Prompt(i, BLOCK), 2 * BLOCK) for i in range(2)], 2, 64)
    scheduler.commit(scheduler.plan(), [])
    plan = scheduler.plan()
    assert scheduler.reserve(plan, BLOCK + 4) == BLOCK + 4
    assert ledger.pools[0].free == 0
    scheduler.commit(plan, [])
    for _ in range(BLOCK - 1):
        scheduler.commit(scheduler.again(plan), [])
    assert [job.held.length for job in scheduler.decoding] == [2 * BLOCK] * 2
    assert len(scheduler.plan().decode) == 2
    assert scheduler.preemptions == 0

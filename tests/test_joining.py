"""Requests that join a call under way: they draw what they would have drawn in a call of their own."""

import pytest
import tiny
import torch

from fastppo import Engine, SamplingConfig
from fastppo.engine.requests import Places

FIRST, SECOND = SamplingConfig(max_new_tokens=5, stop_ids=()), SamplingConfig(max_new_tokens=20, stop_ids=())


def joined(engine, queries, added, looks):
    """Each request's first turn has 4, 9 or 14 tokens; its second joins the call as soon as that is seen to be over."""
    limits = [4 + 5 * (i % 3) for i in range(len(queries))]
    call = engine.open(queries, SECOND, limits)
    owners, going = list(range(len(queries))), set(range(len(queries)))
    while call.is_open:
        call.run(looks)
        over = [i for i in sorted(going) if call.requests.reasons[i]]
        going.difference_update(over)
        if over and call.is_extensible:
            numbers = tuple(call.requests.places.numbers[i] for i in over)
            prompts = [torch.cat([call.requests.sequence(i), torch.tensor(added[i])]) for i in over]
            starts = tuple(limits[i] + len(added[i]) for i in over)
            call.extend(prompts, [20] * len(over), Places(numbers, starts, numbers))
            owners += over
    return owners, call.rollout()


@pytest.mark.parametrize(("rows", "looks", "memory"), [(64, 1, None), (2, 1, None), (64, 3, None), (64, 1, 5)])
def test_a_turn_that_joins_is_the_turn_that_continues(rows, looks, memory):
    model, queries = tiny.llama(), tiny.queries(5, longest=18)
    added = [[11, 12], [13], [7, 8, 9], [5], [6, 6]]
    plain = Engine(model, seed=3)
    plain.generate([[5] * 10], max_new_tokens=6)  # in one block of the cache
    block = plain.metrics()["kv_bytes"]
    engine = Engine(model, seed=3, max_rows=rows, kv_memory=memory and memory * block)
    owners, rollout = joined(engine, queries, added, looks)
    counts = engine.metrics()
    # In one call of its own for every turn of every request.
    for i, query in enumerate(queries):
        alone = Engine(model, seed=3)
        alone.num_requests = i
        limit = 4 + 5 * (i % 3)
        first = alone.generate([query], max_new_tokens=limit, stop_ids=())
        second = alone.continue_(first, [added[i]], SECOND)
        mine = [rollout[place].tolist() for place, owner in enumerate(owners) if owner == i]
        assert mine[0] == first[0].tolist()
        if len(mine) == 2:
            assert mine[1] == second[0].tolist()
            assert rollout.queries[owners.index(i, 5)].tolist() == second.queries[0].tolist()
    assert len(owners) >= 8  # all but those whose first turns were the last thing in the call
    joining = [len(added[i]) + 1 for i in owners[5:]]  # and the last token of the first turn
    least = sum(len(query) for query in queries) + sum(joining)
    if memory is None:
        assert counts["prefill_tokens"] == least
    else:
        assert counts["kv_bytes"] <= memory * block
        assert counts["prefill_tokens"] > least
    engine.release()
    assert engine.kv_tensors == []


def test_what_is_kept_outlasts_its_row():
    engine, queries = Engine(tiny.llama(), seed=3, max_rows=2), tiny.queries(9, longest=20)
    rollout = engine.generate(queries, SamplingConfig(max_new_tokens=30, stop_ids=()), keep=True)
    engine.continue_(rollout, [[7]] * 9, FIRST)
    assert engine.metrics()["prefill_tokens"] == 9 * 2


def test_release_of_some_requests_keeps_the_others():
    engine = Engine(tiny.llama(), seed=3)
    rollout = engine.generate(tiny.queries(3), FIRST, keep=True)
    engine.release(rollout.requests[:2])
    assert engine.kv_tensors != []
    turn = engine.continue_(rollout, [[7]] * 3, FIRST)
    assert engine.metrics()["prefill_tokens"] == sum(len(q) for q in turn.queries[:2]) + 2
    assert engine.kv_tensors == []


def test_what_does_not_fit_cannot_join():
    engine = Engine(tiny.llama(context=32))
    call = engine.open([[5] * 9], FIRST, [5])
    with pytest.raises(ValueError, match="has 30 tokens and may get 5 new ones, but the model's context is 32"):
        call.extend([torch.full((30,), 5)], [5], Places((0,), (5,), (0,)))
    call.close(is_complete=True)
    assert not call.is_extensible

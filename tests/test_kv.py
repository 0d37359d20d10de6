"""The memory behind the block tables: what is stored survives growth and copies, and budgets are shared fairly."""

import pytest
import torch

from fastppo.attention import LayerShape
from fastppo.engine.kv import Kept, PagedCache, free_bytes

# Layer 0 sees everything, 1 and 2 a window; 2 stores values of another size.
SHAPES = {0: LayerShape(2, 8, 8, None), 2: LayerShape(1, 8, 4, 20), 1: LayerShape(1, 8, 8, 20)}
BLOCK_BYTES = (2 * 16 * 16 * 4, (16 + 12) * 16 * 4)


def cache(budget=None):
    return PagedCache(SHAPES, torch.zeros(1), budget)


def test_layers_of_a_window_share_tables_and_sizes_are_their_own():
    one = cache()
    ledger = one.take([40, 40], 2, 16)
    held = ledger.open()
    ledger.extend(held, 33)
    layers = one.layers()
    assert one.windows == (None, 20)
    assert list(layers) == [0, 1, 2]
    assert layers[1].tables is layers[2].tables is not layers[0].tables
    assert layers[0].tables[held.slot, :3].tolist() == held.blocks[0]
    assert layers[2].pool[1].shape == (ledger.pools[1].size, 1, 16, 4)
    assert one.num_bytes == sum(pool.size * cost for pool, cost in zip(ledger.pools, BLOCK_BYTES, strict=True))
    assert one.layers()[0].tables is layers[0].tables  # nothing was edited
    one.release()
    assert one.num_bytes == 0


def test_growing_and_copying_keep_what_is_stored():
    one = cache()
    held = (ledger := one.take([20], 1, 16)).open()
    ledger.extend(held, 20)
    marks = {layer: [torch.randn_like(part) for part in pool] for layer, pool in one.pools.items()}
    for layer, pool in one.pools.items():
        for part, mark in zip(pool, marks[layer], strict=True):
            part.copy_(mark)
    size = ledger.pools[0].size
    assert one.take([300, 300], 2, 16) is ledger
    assert ledger.pools[0].size > size
    fork, copies = ledger.fork(held)
    one.copy(copies)
    last = held.blocks[0][-1], fork.blocks[0][-1]
    for layer, pool in one.pools.items():
        group = 0 if layer == 0 else 1
        for part, mark in zip(pool, marks[layer], strict=True):
            assert torch.equal(part[: len(mark)][held.blocks[group]], mark[held.blocks[group]])
            assert torch.equal(part[fork.blocks[group]], mark[held.blocks[group]])
    assert last[0] != last[1]


def test_a_short_budget_is_shared_between_the_groups():
    least = 10 * BLOCK_BYTES[0] + 3 * BLOCK_BYTES[1]  # of one sequence of 160 tokens
    for budget in (least, 2 * least, 10**9):
        one = cache(budget)
        ledger = one.take([160] * 8, 8, 16)
        assert one.num_bytes <= budget
        assert ledger.pools[0].size >= 10
        assert ledger.pools[1].size >= 3
    assert ledger.pools[0].size == 80
    with pytest.raises(ValueError, match=rf"prompt 1 may grow to 160 tokens, .* {least} bytes, but kv_memory is"):
        cache(least - 1).take([20, 160], 8, 16)


def test_a_kept_sequence_is_recalled_as_far_as_it_agrees():
    one = cache()
    tokens = torch.arange(40)
    for changed, expected in ((None, 39), (37, 37), (0, None)):
        held = (ledger := one.take([60], 1, 64)).open()
        ledger.extend(held, 39)
        one.kept[7] = Kept(held, tokens)
        longer = torch.cat([tokens, torch.tensor([1, 2])])
        if changed is not None:
            longer[changed] = 99
        assert one.recall(8, longer) is None
        found = one.recall(7, longer)
        assert one.kept == {}
        assert (None if found is None else found.length) == expected
        if found is not None:
            ledger.free(found)
        assert [pool.free for pool in ledger.pools] == [pool.size for pool in ledger.pools]


def test_free_memory_is_a_part_of_the_machines():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50

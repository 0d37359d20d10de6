"""Attention over packed sequences and over a paged cache, by every backend of this machine, against fp64."""

import itertools
import random

import pytest
import torch
from attention_cases import HEADS, HOW, LENGTHS, Cache, attention_by_query, make, offsets_of, shape_of
from tolerances import close

from fastppo import ops, reference_attention
from fastppo.ops import backends
from fastppo.ops.attention import paged_attention, paged_write, ragged_attention

ISAS = backends.native().available_isas() if backends.native() else []


@pytest.fixture(params=["reference", *ISAS])
def server(request):
    """Serve the test by plain torch, then by the kernels of each instruction set."""
    if request.param == "reference":
        with ops.use_backend("reference"):
            yield request.param
        return
    native = backends.native()
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def wide(parts):
    return [part.detach().double().requires_grad_() for part in parts]


def assert_all_close(ours, expected, dtype, factor):
    names = ("out", "dq", "dk", "dv", "dsinks")
    for name, our, truth in zip(names, ours, expected, strict=False):
        # Against the largest number of its kind: those near zero are differences of such.
        limits = close(dtype, factor)
        limits["atol"] *= max(1.0, float(truth.detach().abs().max()))
        torch.testing.assert_close(our.double(), truth, **limits, msg=lambda m, name=name: f"{name}: {m}")


def check_ragged(lengths, heads, how, dtype, factor=8, causal=True, key_lengths=None):
    """Compare attention and every gradient with those of plain torch in fp64."""
    offsets, shape = offsets_of(lengths), shape_of(how, heads[0], heads[2])
    key_offsets = None if key_lengths is None else offsets_of(key_lengths)
    q, k, v = make(lengths, heads, dtype)
    if key_lengths is not None:
        _, k, v = make(key_lengths, heads, dtype)
    more = {"causal": causal, "key_offsets": key_offsets}
    inputs = [part.requires_grad_() for part in (q, k, v)]
    exact = wide(inputs)
    exact_shape = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in shape.items()}
    if "sinks" in shape:
        inputs.append(shape["sinks"].requires_grad_())
        exact.append(exact_shape["sinks"].detach().requires_grad_())
        exact_shape["sinks"] = exact[-1]
    out = ragged_attention(q, k, v, offsets, **shape, **more)
    truth = reference_attention.ragged_attention(*exact[:3], offsets, **exact_shape, **more)
    upstream = torch.randn(out.shape).to(dtype)
    gradients = torch.autograd.grad(out, inputs, upstream)
    assert [part.dtype for part in (out, *gradients)] == [part.dtype for part in (q, *inputs)]
    expected = torch.autograd.grad(truth, exact, upstream.double())
    assert_all_close((out, *gradients), (truth, *expected), dtype, factor)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("heads", HEADS[:3], ids=str)
def test_the_reference_is_each_query_over_the_keys_that_it_sees(heads, how):
    lengths = [1, 0, 7, 40]
    q, k, v = (part.double() for part in make(lengths, heads))
    shape, offsets = shape_of(how, heads[0], heads[2], torch.float64), offsets_of(lengths)
    with ops.use_backend("reference"):
        ours = ragged_attention(q, k, v, offsets, **shape)
    torch.testing.assert_close(ours, attention_by_query(q, k, v, offsets, **shape), **close(torch.float64, 10))


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_with_keys_of_other_lengths(causal):
    lengths, key_lengths = [1, 3, 0, 5], [4, 3, 2, 18]
    q, (_, k, v) = make(lengths, HEADS[1])[0].double(), (part.double() for part in make(key_lengths, HEADS[1]))
    offsets, more = offsets_of(lengths), {"key_offsets": offsets_of(key_lengths), "causal": causal, "scale": 0.3}
    with ops.use_backend("reference"):
        ours = ragged_attention(q, k, v, offsets, **more)
    torch.testing.assert_close(ours, attention_by_query(q, k, v, offsets, **more), **close(torch.float64, 10))


@pytest.mark.parametrize("how", ["plain", "all"])
def test_the_references_gradients_are_its_differences(how):
    heads, offsets = (2, 1, 3, 2), offsets_of([1, 4])
    parts, shape = make([1, 4], heads), shape_of(how, 2, 3, torch.float64)
    if how == "all":
        shape["window"] = 3

    def attend(q, k, v):
        return reference_attention.ragged_attention(q, k, v, offsets, **shape)

    assert torch.autograd.gradcheck(attend, wide(parts))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_and_every_gradient(server, heads, how):
    lengths = LENGTHS if heads == HEADS[2] or how == "all" else [1, 17, 0, 81]
    check_ragged(lengths, heads, how, torch.float32)


@pytest.mark.parametrize("how", ["plain", "all"])
@pytest.mark.parametrize("heads", HEADS[1:4], ids=str)
def test_bf16_costs_its_last_digits_only(server, heads, how):
    check_ragged([1, 17, 0, 81], heads, how, torch.bfloat16, factor=1)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_other_lengths(server, causal):
    check_ragged([1, 3, 0, 20], HEADS[2], "plain", torch.float32, causal=causal, key_lengths=[4, 3, 2, 90])


def test_every_query_sees_every_key_unless_causal(server):
    check_ragged(LENGTHS, HEADS[2], "softcap", torch.float32, causal=False)


def test_a_query_without_keys_is_zero(server):
    q, k, v = make([2], HEADS[0])
    out = ragged_attention(q, k[:0], v[:0], offsets_of([2]), key_offsets=offsets_of([0]), causal=False, scale=1.0)
    assert out.count_nonzero() == 0


def test_large_scores_and_far_sinks_stay_finite(server):
    q, k, v = make([70], HEADS[0])
    for sinks in (None, torch.tensor([300.0, -300.0])):
        out = ragged_attention(300 * q, k, v, offsets_of([70]), scale=1.0, sinks=sinks)
        exact = (part.double() for part in (300 * q, k, v))
        truth = reference_attention.ragged_attention(*exact, offsets_of([70]), scale=1.0, sinks=sinks)
        torch.testing.assert_close(out.double(), truth, atol=1e-3, rtol=1e-3)


def schedule(lengths, seed):
    """Yield (sequences, positions) of steps in which some sequences go on by some tokens, each to its end."""
    generator, done = random.Random(seed), [0] * len(lengths)
    while done != lengths:
        sequences, positions = [], []
        for s in generator.sample(range(len(lengths)), len(lengths)):
            count = min(lengths[s] - done[s], generator.choice([0, 1, 1, 3, 40]))
            sequences += [s] * count
            positions += range(done[s], done[s] + count)
            done[s] += count
        yield sequences, positions


def run_schedule(lengths, parts, offsets, shape, seed, dtype=torch.float32):
    """Return the attention (T, H, Dv) that a paged cache gives in random steps."""
    q, k, v = parts
    cache = Cache.empty(len(lengths), max(lengths), k.shape[1], k.shape[2], v.shape[2], dtype)
    out = torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=dtype)
    for sequences, positions in schedule(lengths, seed):
        rows = offsets[sequences].long() + torch.tensor(positions, dtype=torch.int64)
        if len(rows):
            out[rows] = cache.attend([part[rows] for part in parts], sequences, positions, **shape)
    return out


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_cache_gives_what_the_whole_sequence_gives(server, heads, how):
    """To the bit where both are native, in random steps, over blocks at random places among poisoned ones."""
    lengths = [1, 16, 5, 130, 77]
    parts, shape, offsets = make(lengths, heads), shape_of(how, heads[0], heads[2]), offsets_of(lengths)
    whole = ragged_attention(*parts, offsets, **shape)
    ours = run_schedule(lengths, parts, offsets, shape, seed=heads[2])
    if server == "reference":
        torch.testing.assert_close(ours, whole, **close(torch.float32, 4))
    else:
        assert ours.equal(whole)


def test_a_cache_in_bf16(server):
    lengths = [1, 16, 130]
    parts, offsets = make(lengths, HEADS[2], torch.bfloat16), offsets_of(lengths)
    whole = ragged_attention(*parts, offsets, scale=0.2)
    ours = run_schedule(lengths, parts, offsets, {"scale": 0.2}, 3, torch.bfloat16)
    assert ours.sub(whole).abs().max() < 0.02 if server == "reference" else ours.equal(whole)


@pytest.mark.parametrize("heads", [HEADS[0], HEADS[3]], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_sequences_that_share_blocks_have_the_bits_of_those_that_do_not(server, heads, window):
    """Forked at a block's end, at different lengths after; and blocks that left the window are never read."""
    prompt, lengths = 96, [97, 130, 101, 250, 97]
    parts, offsets = make(lengths, heads), offsets_of(lengths)
    for part in parts[1:]:
        for start in offsets[1:-1].tolist():
            part[start : start + prompt] = part[:prompt]
    shape = {"scale": 0.3, "window": window}
    cache = Cache.empty(len(lengths), max(lengths), heads[1], heads[2], heads[3])
    rows = torch.cat([torch.arange(start, end) for start, end in itertools.pairwise(offsets)])
    sequences = [s for s, length in enumerate(lengths) for _ in range(length)]
    positions = [p for length in lengths for p in range(length)]
    cache.attend([part[rows] for part in parts], sequences, positions, **shape)
    last, where = offsets[1:].long() - 1, (list(range(len(lengths))), [length - 1 for length in lengths])
    apart = cache.attend([part[last] for part in parts], *where, **shape)
    for s, length in enumerate(lengths):
        cache.tables[s, : prompt // 16] = cache.tables[0, : prompt // 16]
        if window is not None:
            cache.tables[s, : max(0, length - window) // 16] = 10**6 if server != "reference" else 0
    shared = cache.attend([part[last] for part in parts], *where, **shape)
    assert shared.equal(apart)


def test_neither_neighbours_nor_threads_change_a_bit(server, monkeypatch):
    lengths = [5, 40, 130, 17]
    parts, offsets = make(lengths, HEADS[2]), offsets_of(lengths)
    upstream, results = torch.randn(sum(lengths), 4, 48), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        inputs = [part.clone().requires_grad_() for part in parts]
        out = ragged_attention(*inputs, offsets, scale=0.1)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
        results[-1] += (run_schedule(lengths, parts, offsets, {"scale": 0.1}, threads),)
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    alone = [part[5:45].clone().requires_grad_() for part in parts]
    out = ragged_attention(*alone, offsets_of([40]), scale=0.1)
    gradients = (out, *torch.autograd.grad(out, alone, upstream[5:45]))
    if server != "reference":
        assert all(a.equal(b[5:45]) for a, b in zip(gradients, results[0], strict=False))


def test_heads_before_tokens_and_slices_are_read_in_place(server):
    q, k, v = (part.transpose(0, 1).contiguous().transpose(0, 1) for part in make([33, 2], HEADS[2]))
    fused = torch.cat([q, k, v], 1).requires_grad_()
    a, b, c = fused.split([4, 2, 2], 1)
    for parts in ((a, b, c), (q, k, v)):
        out = ragged_attention(*parts, offsets_of([33, 2]), scale=0.2)
        plain = ragged_attention(*(part.contiguous() for part in parts), offsets_of([33, 2]), scale=0.2)
        assert out.equal(plain)
    upstream = torch.randn(4, 35, 48).transpose(0, 1)
    (ours,) = torch.autograd.grad(ragged_attention(a, b, c, offsets_of([33, 2]), scale=0.2), fused, upstream)
    exact = [part.detach().double().requires_grad_() for part in (q, k, v)]
    truth = reference_attention.ragged_attention(*exact, offsets_of([33, 2]), scale=0.2)
    expected = torch.cat(torch.autograd.grad(truth, exact, upstream.double()), 1)
    torch.testing.assert_close(ours.double(), expected, **close(torch.float32, 16))


def ragged(q=(6, 2, 8), k=(6, 2, 8), v=(6, 2, 8), offsets=(0, 2, 6), **how):
    tensors = map(torch.zeros, (q, k, v))
    return ragged_attention(*tensors, torch.tensor(offsets), **({"scale": 1.0} | how))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": (6, 2, 7)}, r"q \(6, 2, 8\), k \(6, 2, 7\) and v \(6, 2, 8\) are not \(T, H, D\)"),
        ({"q": (6, 3, 8)}, "with H a multiple of Hkv"),
        ({"v": (5, 2, 8)}, r"v \(5, 2, 8\) are not"),
        ({"v": (6, 2)}, r"v \(6, 2\) are not"),
        ({"offsets": (0, 2, 5)}, r"offsets are \[0, 2, 5\], expected 3 that rise from 0 to 6"),
        ({"offsets": (0, 4, 2, 6)}, "expected 4 that rise from 0 to 6"),
        ({"offsets": (1, 6)}, "expected 2 that rise from 0 to 6"),
        ({"key_offsets": torch.tensor([0, 6])}, r"key_offsets are \[0, 6\], expected 3 that rise"),
        ({"key_offsets": torch.tensor([0, 1, 6])}, "more queries than keys: .* or causal=False"),
        ({"causal": False, "window": 4}, "window=4 and alibi_slopes are for causal attention"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\), expected \(2,\): one a head"),
        ({"softcap": -1.0}, r"softcap is -1\.0, expected a number above 0, or None"),
    ],
)
def test_what_ragged_attention_refuses(server, arguments, message):
    with pytest.raises(ValueError, match=message):
        ragged(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": [0, 32]}, "positions are 0 to 32, expected 0 to 31"),
        ({"sequences": [0, 1]}, "sequences are 0 to 1, expected 0 to 0"),
        ({"sequences": [0]}, r"sequences has shape \(1,\), expected \(2,\): one a token"),
        ({"tables": torch.zeros(1, 2)}, r"tables are torch\.float32 \(1, 2\), expected int32"),
        ({"q": torch.zeros(2, 3, 8)}, r"heads of shape \(2, 3, 8\) do not fit a pool"),
        ({"pool": (torch.zeros(3, 2, 8, 16), torch.zeros(4, 2, 16, 8))}, "pool has keys"),
    ],
)
def test_what_the_cache_refuses(server, arguments, message):
    given = {
        "q": torch.zeros(2, 2, 8),
        "pool": (torch.zeros(3, 2, 8, 16), torch.zeros(3, 2, 16, 8)),
        "sequences": [0, 0],
        "positions": [0, 1],
        "tables": torch.zeros(1, 2, dtype=torch.int32),
    } | arguments
    where = torch.tensor(given["sequences"]), torch.tensor(given["positions"]), given["tables"]
    with pytest.raises(ValueError, match=message):
        paged_attention(given["q"], given["pool"], *where, scale=1.0)
    with pytest.raises(ValueError, match=message):
        paged_write(given["q"], given["q"], given["pool"], *where)

"""The C++ extension against loops written here, and its plain twins against both."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import close

from fastppo import ops

_native = pytest.importorskip("fastppo._native", reason="fastppo was installed without its C++ extension")

RAGGED = {
    "no segments": [],
    "one empty segment": [0],
    "one token": [1],
    "empty between": [3, 0, 1, 0],
    "random": np.random.default_rng(3).integers(0, 40, size=25).tolist(),
}
DTYPES = {np.float32: torch.float32, np.float64: torch.float64}


def ragged(lengths: list[int], dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return random rewards and values (T,) and the offsets (B + 1,) of segments of these lengths."""
    generator = np.random.default_rng(len(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rewards, values = generator.normal(size=(2, offsets[-1])).astype(dtype)
    return rewards, values, offsets


def gae_by_sums(rewards, values, offsets, gamma, lam) -> np.ndarray:
    """Return each advantage as the explicit sum over k of (gamma lam)^k delta_{t+k}, in fp64."""
    rewards, values = rewards.astype(np.float64), values.astype(np.float64)
    advantages = np.zeros_like(rewards)
    for start, end in itertools.pairwise(offsets):
        following = np.append(values[start + 1 : end], 0.0)[: end - start]
        deltas = rewards[start:end] + gamma * following - values[start:end]
        for t in range(end - start):
            advantages[start + t] = ((gamma * lam) ** np.arange(end - start - t) * deltas[t:]).sum()
    return advantages


def assert_close(ours: np.ndarray, truth: np.ndarray, dtype: type) -> None:
    torch.testing.assert_close(
        torch.from_numpy(ours).double(), torch.from_numpy(truth).double(), **close(DTYPES[dtype], 10)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RAGGED)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_the_discounted_sum_of_deltas(case, dtype, gamma, lam):
    rewards, values, offsets = ragged(RAGGED[case], dtype)
    ours = _native.gae(rewards, values, offsets, gamma, lam)
    assert ours.dtype == dtype
    assert_close(ours, gae_by_sums(rewards, values, offsets, gamma, lam), dtype)


def test_gae_by_hand():
    ours = _native.gae(np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.5, 2.0]), np.array([0, 2, 3]), 1.0, 0.5)
    # Segment one: deltas 0 + 0.5 - 0.5 = 0 and 1 - 0.5 = 0.5, so 0 + 0.5 * 0.5 and 0.5; segment two: 5 - 2.
    assert ours.tolist() == [0.25, 0.5, 3.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RAGGED)
def test_gae_agrees_with_its_twin_and_ops_gives_either(case, dtype):
    from fastppo import ops, reference

    rewards, values, offsets = ragged(RAGGED[case], dtype)
    tensors = [torch.from_numpy(array) for array in (rewards, values, offsets)]
    ours = _native.gae(rewards, values, offsets, 0.97, 0.9)
    assert_close(ours, reference.gae(*tensors, 0.97, 0.9).numpy(), dtype)
    with ops.use_backend("native"):
        assert np.array_equal(ops.gae(*tensors, 0.97, 0.9).numpy(), ours)
    with ops.use_backend("reference"):
        assert torch.equal(ops.gae(*tensors, 0.97, 0.9), reference.gae(*tensors, 0.97, 0.9))


def test_gae_reads_a_million_tokens_without_touching_its_arguments():
    rewards, values, offsets = ragged([1000] * 1000, np.float32)
    before = rewards.copy(), values.copy(), offsets.copy()
    first = _native.gae(rewards, values, offsets, 1.0, 0.95)
    assert all(np.array_equal(a, b) for a, b in zip(before, (rewards, values, offsets), strict=True))
    assert np.array_equal(first, _native.gae(rewards, values, offsets, 1.0, 0.95))
    assert np.isfinite(first).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [1.0, 2.0], [0, 2]), TypeError, r"rewards is int64\[2\], expected float32 or float64"),
        (([1.0, 2.0], np.float32([1, 2]), [0, 2]), TypeError, r"values is float32\[2\], expected float64: convert"),
        (([1.0], [1.0], [0.0, 1.0]), TypeError, r"offsets is float64\[2\], expected int64: convert"),
        (([[1.0]], [1.0], [0, 1]), ValueError, r"rewards is float64\[1, 1\], expected one axis: flatten"),
        ((np.ones(6)[::2], np.ones(3), [0, 3]), ValueError, r"rewards is not contiguous: pass numpy\.ascontiguous"),
        (([1.0, 2.0], [1.0], [0, 2]), ValueError, "rewards has 2 tokens and values 1"),
        (([1.0], [1.0], np.zeros(0, np.int64)), ValueError, "offsets is empty"),
        (([1.0], [1.0], [1, 1]), ValueError, r"offsets\[0\] is 1, expected 0"),
        (([1.0, 2.0], [1.0, 2.0], [0, 2, 1, 2]), ValueError, r"offsets\[2\] is 1 after 2: offsets must never fall"),
        (([1.0, 2.0], [1.0, 2.0], [0, 3]), ValueError, "offsets end at 3 but rewards has 2 tokens"),
    ],
)
def test_gae_says_what_the_caller_must_do(arguments, error, message):
    with pytest.raises(error, match=message):
        _native.gae(*map(np.asarray, arguments), 1.0, 0.95)


def pack_by_scan(lengths: list[int], num_bins: int, max_per_bin: int) -> list[int]:
    """Return the bin of each item by looking at every bin for every item."""
    contents: list[list[int]] = [[] for _ in range(num_bins)]
    chosen = []
    for length in lengths:
        room = [bin for bin in range(num_bins) if len(contents[bin]) < max_per_bin]
        fewest = min(sum(contents[bin]) for bin in room)
        best = next(bin for bin in room if sum(contents[bin]) == fewest)
        contents[best].append(length)
        chosen.append(best)
    return chosen


PACKINGS = [
    ([], 1, 0),
    ([7], 1, 1),
    ([5, 3, 2, 4], 2, 2),
    ([0, 0, 0, 1, 0], 3, 2),
    ([9, 1, 1, 1, 1, 1], 2, 3),
    ([4, 4, 4], 10, 1),
    (np.random.default_rng(5).integers(0, 200, size=300).tolist(), 7, 43),
    (np.random.default_rng(6).integers(1, 3, size=300).tolist(), 16, 1000),
]


@pytest.mark.parametrize(("lengths", "num_bins", "max_per_bin"), PACKINGS)
def test_pack_gives_each_item_to_the_emptiest_bin_with_room(lengths, num_bins, max_per_bin):
    from fastppo import ops, reference

    expected = pack_by_scan(lengths, num_bins, max_per_bin)
    ours = _native.pack(np.array(lengths, dtype=np.int64), num_bins, max_per_bin)
    assert ours.dtype == np.int64
    assert ours.tolist() == expected
    assert reference.pack(lengths, num_bins, max_per_bin).tolist() == expected
    for backend in ("native", "reference"):
        with ops.use_backend(backend):
            assert ops.pack(lengths, num_bins, max_per_bin).tolist() == expected


def test_pack_by_hand():
    # 9 to bin 0; 1, 1, 1 to bin 1, which is then full; the rest has only bin 0 left.
    assert _native.pack(np.array([9, 1, 1, 1, 1, 1]), 2, 3).tolist() == [0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(("num_bins", "max_per_bin", "value"), [(0, 5, "num_bins=0"), (-1, 5, "num_bins=-1")])
def test_pack_needs_a_bin_in_both_forms(num_bins, max_per_bin, value):
    from fastppo import reference

    for pack in (_native.pack, reference.pack):
        with pytest.raises(ValueError, match=value):
            pack(np.array([1, 2]), num_bins, max_per_bin)


def test_pack_refuses_what_does_not_fit_in_both_forms():
    from fastppo import reference

    for pack in (_native.pack, reference.pack):
        with pytest.raises(ValueError, match=r"7 sequences .*num_bins=3 .*max_per_bin=2"):
            pack(np.ones(7, dtype=np.int64), 3, 2)


def test_pack_refuses_other_types_and_negative_lengths():
    with pytest.raises(TypeError, match=r"lengths is int32\[2\], expected int64: convert it with \.astype"):
        _native.pack(np.array([1, 2], dtype=np.int32), 1, 2)
    with pytest.raises(ValueError, match=r"lengths\[1\] is -4: a sequence has zero tokens or more"):
        _native.pack(np.array([1, -4]), 1, 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    """Two in one process wait for each other's threads: the extension takes the one that torch has loaded."""
    code = """
import torch
from fastppo import ops
torch.set_num_threads(2)
hidden, weight = torch.randn(64, 8), torch.randn(500, 8)
ops.linear_logprobs(hidden, weight, torch.zeros(64, dtype=torch.int64))
lines = open("/proc/self/maps").read().split("\\n")
print(sorted({line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line or "libiomp" in line}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = ast.literal_eval(done.stdout)
    assert len(found) == 1, found
    assert Path(torch.__file__).parent in Path(found[0]).parents, "not the one that torch brings"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(5, 7), (1, 33), (40,), (3, 4, 5), ()])
def test_the_checksum_is_that_of_torch(dtype, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    with ops.use_backend("reference"):
        expected = ops.checksum(x)
    assert ops.checksum(x).equal(expected)
    if x.dim() == 2:
        assert not ops.checksum(x.flip(0)).equal(expected) or len(x) == 1
        assert not ops.checksum(x.flip(1)).equal(expected)
        assert ops.checksum(x.t().contiguous().t()).equal(expected)

"""The Triton kernel of paged attention in the interpreter, against attention over whole sequences in fp64."""

import pytest
import torch
from interpreter import Call, interpret

pytest.importorskip("triton", reason="triton has no wheel for this platform")

BLOCK = 16
# name: (dtype, heads, key heads, key size, value size, lengths, further arguments)
CASES = {
    "plain": (torch.float32, 4, 4, 16, 16, [1, 15, 16, 17, 40], {}),
    "grouped": (torch.float32, 6, 2, 48, 48, [33, 5], {}),
    "one key head, odd sizes": (torch.float32, 5, 1, 20, 12, [64, 3], {}),
    "several splits": (torch.float32, 2, 1, 16, 16, [600, 256, 257], {}),
    "window": (torch.float32, 2, 2, 16, 16, [300, 40, 9], {"window": 24}),
    "window of one": (torch.float32, 2, 2, 16, 16, [300, 9], {"window": 1}),
    "softcap": (torch.float32, 2, 1, 16, 16, [50, 7], {"softcap": 2.0}),
    "sinks": (torch.float32, 3, 3, 16, 16, [270, 7], {"sinks": True}),
    "slopes": (torch.float32, 4, 2, 16, 16, [60, 7], {"alibi_slopes": True}),
    "everything": (torch.float32, 4, 2, 16, 16, [290, 7], {"window": 40, "softcap": 3.0, "sinks": True}),
    "fp64": (torch.float64, 4, 2, 16, 16, [60, 300], {"window": 50, "softcap": 3.0, "sinks": True}),
    "fp16": (torch.float16, 4, 2, 64, 64, [60, 300], {}),
}


def problem(name: str) -> tuple[dict, torch.Tensor]:
    """The kernel's arguments for the last token of each sequence, and what it must return, in fp64.

    Blocks are in random places; the rest of the pool is NaN, and so is the end of every last block.
    """
    dtype, heads, kv_heads, size, value_size, lengths, more = CASES[name]
    draw = torch.Generator().manual_seed(7)
    counts = [-(-length // BLOCK) for length in lengths]
    places = torch.randperm(sum(counts) + 3, generator=draw)[: sum(counts)].split(counts)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    keys, values = (torch.full((sum(counts) + 3, BLOCK, kv_heads, n), torch.nan) for n in (size, value_size))
    q = 2 * torch.randn(len(lengths), heads, size, generator=draw)
    shape = dict(more)
    for key in ("sinks", "alibi_slopes"):
        if key in shape:
            shape[key] = torch.rand(heads, generator=draw)
    expected = []
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    for row, length in enumerate(lengths):
        tables[row, : counts[row]] = places[row]
        k, v = (torch.randn(length, kv_heads, n, generator=draw).to(dtype) for n in (size, value_size))
        at = torch.arange(length)
        keys[tables[row, at // BLOCK].long(), at % BLOCK] = k
        values[tables[row, at // BLOCK].long(), at % BLOCK] = v
        expected.append(attention(q[row].double(), k.double(), v.double(), **shape))
    given = {"q": q, "keys": keys, "values": values, "tables": tables, "scale": 0.3, **shape}
    given["sequences"] = torch.arange(len(lengths), dtype=torch.int32)
    given["positions"] = torch.tensor(lengths, dtype=torch.int32) - 1
    return given, torch.stack(expected)


def attention(q, k, v, window=None, softcap=None, sinks=None, alibi_slopes=None):
    """One query row (H, D) over its keys (S, Hkv, D), head by head, from the definition."""
    out = []
    for head in range(len(q)):
        kv_head = head * k.shape[1] // len(q)
        z = 0.3 * (k[:, kv_head] @ q[head])
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        distance = torch.arange(len(k) - 1, -1, -1)
        if alibi_slopes is not None:
            z = z - alibi_slopes[head].double() * distance
        weights = torch.where(distance < (window or len(k)), z.exp(), 0.0)
        total = weights.sum() + (sinks[head].double().exp() if sinks is not None else 0.0)
        out.append(weights @ v[:, kv_head] / total)
    return torch.stack(out)


def attend(keys: torch.Tensor, values: torch.Tensor, **given) -> torch.Tensor:
    """Call the kernel, in the interpreter's process: pools cross over to it as two tensors."""
    from fastppo.kernels.paged_attention import paged_attention

    given["sequences"] = given["sequences"].int()
    return paged_attention(given.pop("q"), (keys, values), **given)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    calls = {name: Call("test_kernels_attention.attend", problem(name)[0]) for name in CASES}
    given = problem("several splits")[0]
    alone = {key: part[1:2] if key in ("q", "positions", "sequences") else part for key, part in given.items()}
    calls["a row alone"] = Call("test_kernels_attention.attend", alone)
    return interpret(tmp_path_factory.mktemp("interpreter"), calls)


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention(name, interpreted):
    (found,), (_, expected) = interpreted[name], problem(name)
    tolerance = {torch.float16: 2e-3, torch.float32: 2e-6, torch.float64: 1e-14}[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_row_does_not_depend_on_the_batch(interpreted):
    assert torch.equal(interpreted["a row alone"][0], interpreted["several splits"][0][1:2])


def test_what_does_not_belong_together_is_refused():
    given = problem("plain")[0]
    with pytest.raises(ValueError, match=r"expected \(blocks, 16, Hkv, D\)"):
        attend(**given | {"keys": given["keys"].half()})
    with pytest.raises(ValueError, match=r"positions is torch.int64 \(5,\)"):
        attend(**given | {"positions": given["positions"].long()})

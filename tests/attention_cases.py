"""Attention one query at a time in fp64, written apart from the package, and caches that would show a wrong read."""

import itertools
from dataclasses import dataclass

import torch

from fastppo.ops.attention import paged_attention, paged_write

BLOCK = 16
# Heads of queries and of keys, sizes of keys and of values.
HEADS = [(2, 2, 8, 8), (2, 1, 15, 20), (4, 2, 48, 48), (8, 1, 64, 40), (3, 3, 80, 15), (2, 2, 128, 128)]
# Around a block of 16, a chunk of 64 and a tile of 16 queries; an empty sequence between.
LENGTHS = [1, 15, 16, 0, 17, 63, 64, 65, 200]
HOW = {
    "plain": {},
    "window": {"window": 5},
    "window over blocks": {"window": 70},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "slopes": {"alibi_slopes": True},
    "all": {"window": 33, "softcap": 4.0, "sinks": True, "alibi_slopes": True},
}


def shape_of(how: str, heads: int, size: int, dtype: torch.dtype = torch.float32) -> dict:
    """Return the keyword arguments of a case, with tensors in the place of True."""
    shape = {"scale": size**-0.5} | HOW[how]
    for name in ("sinks", "alibi_slopes"):
        if shape.get(name):
            shape[name] = torch.rand(heads, dtype=dtype) + 0.1
    return shape


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def attention_by_query(q, k, v, offsets, key_offsets=None, causal=True, **shape):
    """Return (T, H, Dv): each query of each head by itself over the list of the keys that it sees."""
    offsets = offsets.tolist()
    key_offsets = offsets if key_offsets is None else key_offsets.tolist()
    out, group = q.new_zeros(*q.shape[:2], v.shape[2]), q.shape[1] // k.shape[1]
    for b in range(len(offsets) - 1):
        ahead = key_offsets[b + 1] - offsets[b + 1]
        for t in range(offsets[b], offsets[b + 1]):
            last = t + ahead if causal else key_offsets[b + 1] - 1
            first = max(key_offsets[b], last + 1 - (shape.get("window") or 10**9))
            for head in range(q.shape[1]):
                keys, values = (x[first : last + 1, head // group] for x in (k, v))
                if len(keys):
                    out[t, head] = one_query(q[t, head], keys, values, head, **shape)
    return out


def one_query(q, keys, values, head, *, scale, softcap=None, window=None, sinks=None, alibi_slopes=None):
    z = (keys * q).sum(-1) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if alibi_slopes is not None:
        z = z - alibi_slopes[head] * torch.arange(len(keys) - 1, -1, -1)
    if sinks is not None:
        z = torch.cat([z, sinks[head : head + 1]])
    return (torch.exp(z - z.logsumexp(0))[: len(keys), None] * values).sum(0)


@dataclass
class Cache:
    """A pool whose blocks lie at random places, NaN wherever nothing was written."""

    pool: tuple[torch.Tensor, torch.Tensor]
    tables: torch.Tensor

    @classmethod
    def empty(cls, sequences, longest, kv_heads, size, value_size, dtype=torch.float32, spare=3):
        per_sequence = -(-longest // BLOCK)
        blocks = sequences * per_sequence + spare
        keys = torch.full((blocks, kv_heads, size, BLOCK), torch.nan, dtype=dtype)
        values = torch.full((blocks, kv_heads, BLOCK, value_size), torch.nan, dtype=dtype)
        tables = torch.randperm(blocks)[: sequences * per_sequence].view(sequences, per_sequence)
        return cls((keys, values), tables.to(torch.int32))

    def attend(self, qkv, sequences, positions, **shape):
        """Store and attend to rows of the given tokens, as the engine does in each step."""
        q, k, v = qkv
        where = torch.tensor(sequences, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32), self.tables
        paged_write(k, v, self.pool, *where)
        return paged_attention(q, self.pool, *where, **shape)


def make(lengths, heads, dtype=torch.float32):
    """Return q, k and v of packed sequences of these lengths."""
    h, kv, size, value_size = heads
    total = sum(lengths)
    shapes = (total, h, size), (total, kv, size), (total, kv, value_size)
    return [torch.randn(shape).to(dtype) for shape in shapes]

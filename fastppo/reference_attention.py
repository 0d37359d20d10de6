"""Attention in plain PyTorch, sequence by sequence: the specification of the ragged and of the paged form."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16  # tokens in a block of the KV cache


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Return (T, H, Dv) of one sequence: q (T, H, D) are its last T tokens, k (S, Hkv, D) and v (S, Hkv, Dv) all S.

    A query sees the keys up to its own position, and of those the last `window`. `sinks` (H,) are logits of a key
    whose value is zero; `alibi_slopes` (H,) times the distance are taken from the scores.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("thd,shd->hts", q.to(wide), k.to(wide)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None] - torch.arange(len(k), device=q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window:
        hidden = hidden | (distance >= window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(-1, len(q), 1)
        return torch.einsum("hts,shd->thd", torch.cat([scores, column], -1).softmax(-1)[..., :-1], v.to(wide)).to(q)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v.to(wide)).to(q.dtype)


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, key_offsets: Tensor | None = None, **shape: object
) -> Tensor:
    """Return (T, H, Dv) of packed sequences, queries cut at `offsets` (B + 1,), keys and values at `key_offsets`.

    See `attend_one` for the rest; without `key_offsets` keys are cut where queries are.
    """
    counts, key_counts = (x.diff().tolist() for x in (offsets, offsets if key_offsets is None else key_offsets))
    parts = zip(q.split(counts), k.split(key_counts), v.split(key_counts), strict=True)
    return torch.cat([attend_one(*part, **shape) for part in parts])  # type: ignore[arg-type]


def places(sequences: Tensor, positions: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return block and slot (T,) int64 of the tokens at `positions` (T,) of `sequences` (T,), rows of `tables`."""
    where = positions.long()
    return tables[sequences.long(), where // BLOCK].long(), where % BLOCK


def paged_write(
    keys: Tensor, values: Tensor, pool: tuple[Tensor, Tensor], sequences: Tensor, positions: Tensor, tables: Tensor
) -> None:
    """Store keys (T, Hkv, D) and values (T, Hkv, Dv) in a pool: (blocks, Hkv, D, 16) and (blocks, Hkv, 16, Dv)."""
    block, slot = places(sequences, positions, tables)
    pool[0][block, :, :, slot] = keys.to(pool[0].dtype)
    pool[1][block, :, slot] = values.to(pool[1].dtype)


def paged_attention(
    q: Tensor, pool: tuple[Tensor, Tensor], sequences: Tensor, positions: Tensor, tables: Tensor, **shape: object
) -> Tensor:
    """Return (T, H, Dv) of queries (T, H, D) at `positions` (T,) of `sequences` (T,), whose keys are in the pool."""
    out = []
    for query, sequence, position in zip(q, sequences.tolist(), positions.tolist(), strict=True):
        everything = torch.arange(position + 1, device=q.device)
        block, slot = places(torch.full_like(everything, sequence), everything, tables)
        window = int(shape.get("window") or 0)  # type: ignore[call-overload]
        seen = slice(max(0, position + 1 - window) if window else 0, None)
        k, v = pool[0][block, :, :, slot][seen], pool[1][block, :, slot][seen]
        out.append(attend_one(query[None], k, v, **shape))  # type: ignore[arg-type]
    return torch.cat(out)

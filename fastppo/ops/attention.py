"""Attention over packed sequences and over a paged KV cache, on the backend that serves the tensors.

Shapes: T tokens of B sequences, H heads of queries, Hkv of keys and values (H a multiple of it), D and Dv their sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo import reference_attention
from fastppo.ops import native_attention
from fastppo.ops.backends import backend, on_device
from fastppo.ops.native_attention import AttentionShape, Pool, Segments
from fastppo.reference_attention import BLOCK

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = True,
    key_offsets: Tensor | None = None,
) -> Tensor:
    """Return (T, H, Dv) of queries (T, H, D), keys (S, Hkv, D) and values (S, Hkv, Dv) of packed sequences.

    Sequence b has the queries offsets[b] to offsets[b + 1], (B + 1,), and the keys of the same places or of
    `key_offsets`; its queries are its last tokens. A query sees the keys up to its own, of these the last `window`, or
    all of its sequence if not `causal`. `sinks` (H,) are logits of a key whose value is zero; `alibi_slopes` (H,) times
    the distance are taken from the scores. Differentiable in q, k, v and sinks. Raises ValueError.
    """
    shape = AttentionShape(scale, softcap, window, sinks, alibi_slopes)
    segments = _segments(q, k, v, offsets, key_offsets, causal, shape)
    kind = backend(q.device)
    if kind == "native" and {q.dtype, k.dtype, v.dtype} <= set(_KERNEL_DTYPES):
        return native_attention.ragged_attention(q, k, v, segments, shape)
    if q.is_cuda and kind != "reference" and _serves_varlen(q, v, shape):
        return _varlen(q, k, v, segments, shape)
    more: dict[str, Any] = shape._asdict() | {"causal": causal}
    return reference_attention.ragged_attention(q, k, v, segments.offsets, key_offsets=segments.key_offsets, **more)


def paged_write(keys: Tensor, values: Tensor, pool: Pool, sequences: Tensor, positions: Tensor, tables: Tensor) -> None:
    """Store keys (T, Hkv, D) and values (T, Hkv, Dv) of tokens at positions (T,) of sequences (T,), rows of tables.

    `tables` (sequences, max_blocks) int32 says where in the pool each 16 tokens of a sequence lie. The pool is keys
    (blocks, Hkv, D, 16) and values (blocks, Hkv, 16, Dv) on the CPU, (blocks, 16, Hkv, D) and (blocks, 16, Hkv, Dv)
    elsewhere. Raises ValueError.
    """
    pool = _pool_views(pool)
    _check_paged(keys, pool, sequences, positions, tables)
    if values.shape != (*keys.shape[:2], pool[1].shape[3]) or keys.shape[1] != pool[0].shape[1]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} are not (T, Hkv, D) and (T, Hkv, Dv) for a "
            f"pool of {tuple(pool[0].shape)} and {tuple(pool[1].shape)}, (blocks, Hkv, D, 16) and (blocks, Hkv, 16, Dv)"
        )
    is_native = _serves_pool(pool, keys, values)
    write = native_attention.paged_write if is_native else reference_attention.paged_write
    write(keys, values, pool, sequences, positions, tables)


def paged_attention(
    q: Tensor,
    pool: Pool,
    sequences: Tensor,
    positions: Tensor,
    tables: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Return (T, H, Dv) of queries (T, H, D) at positions (T,) of sequences (T,), over keys that `paged_write` wrote.

    A query sees the keys of its sequence up to its own position, of these the last `window`; for sinks and slopes see
    `ragged_attention`. On the CPU a query has the bits that it has there, whatever else is asked for at the same time.
    Quickest where tokens of one sequence, and of sequences that share blocks, are neighbours. Raises ValueError.
    """
    shape = AttentionShape(scale, softcap, window, sinks, alibi_slopes)
    if q.is_cuda and backend(q.device) == "triton":
        from fastppo.kernels.paged_attention import paged_attention as attend

        with on_device(q):
            return attend(q.contiguous(), pool, sequences, positions, tables, **shape._asdict())  # type: ignore[no-any-return]
    pool = _pool_views(pool)
    _check_paged(q, pool, sequences, positions, tables)
    _check_shape(q, shape)
    if _serves_pool(pool, q):
        return native_attention.paged_attention(q, pool, sequences, positions, tables, shape)
    return reference_attention.paged_attention(q, pool, sequences, positions, tables, **shape._asdict())


def _pool_views(pool: Pool) -> Pool:
    """Return the pool in the CPU's layout, whatever lies behind it."""
    keys, values = pool
    return pool if keys.device.type in ("cpu", "meta") else (keys.permute(0, 2, 3, 1), values.permute(0, 2, 1, 3))


def _serves_pool(pool: Pool, *parts: Tensor) -> bool:
    """Whether the C++ kernels can be given these."""
    is_known = all(part.dtype in _KERNEL_DTYPES for part in (*pool, *parts)) and pool[0].dtype == pool[1].dtype
    return is_known and backend(pool[0].device) == "native" and all(part.is_contiguous() for part in pool)


def _check_shape(q: Tensor, shape: AttentionShape) -> None:
    for name in ("sinks", "alibi_slopes"):
        part = getattr(shape, name)
        if part is not None and part.shape != q.shape[1:2]:
            raise ValueError(f"{name} has shape {tuple(part.shape)}, expected {tuple(q.shape[1:2])}: one a head")
    for name in ("softcap", "window"):
        if (getattr(shape, name) or 0) < 0:
            raise ValueError(f"{name} is {getattr(shape, name)}, expected a number above 0, or None")


def _check_paged(part: Tensor, pool: Pool, sequences: Tensor, positions: Tensor, tables: Tensor) -> None:
    keys, values = pool
    if keys.shape[0] != values.shape[0] or keys.shape[1] != values.shape[1] or keys.shape[3] != values.shape[2]:
        raise ValueError(f"pool has keys {tuple(keys.shape)} and values {tuple(values.shape)}: see paged_write")
    if part.dim() != 3 or part.shape[2] != keys.shape[2] or part.shape[1] % keys.shape[1] or keys.shape[3] != BLOCK:
        raise ValueError(
            f"heads of shape {tuple(part.shape)} do not fit a pool of keys (blocks, Hkv, D, {BLOCK}) "
            f"{tuple(keys.shape)}: expected (T, a multiple of Hkv, D)"
        )
    if tables.dtype != torch.int32 or tables.dim() != 2 or tables.stride(1) != 1:
        raise ValueError(f"tables are {tables.dtype} {tuple(tables.shape)}, expected int32 (sequences, max_blocks)")
    checks = ("sequences", sequences, len(tables)), ("positions", positions, BLOCK * tables.shape[1])
    for name, numbers, limit in checks:
        if numbers.shape != part.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(numbers.shape)}, expected {tuple(part.shape[:1])}: one a token")
        if part.device.type == "cpu" and len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
            raise ValueError(f"{name} are {int(numbers.min())} to {int(numbers.max())}, expected 0 to {limit - 1}")


def _segments(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, key_offsets: Tensor | None, causal: bool, shape: AttentionShape
) -> Segments:
    """Return the checked segments; raise ValueError."""
    is_right = q.dim() == k.dim() == v.dim() == 3 and k.shape[:2] == v.shape[:2] and q.shape[2] == k.shape[2]
    if not is_right or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} are not (T, H, D), (S, Hkv, D) and "
            "(S, Hkv, Dv) with H a multiple of Hkv"
        )
    _check_shape(q, shape)
    if not causal and (shape.window or shape.alibi_slopes is not None):
        raise ValueError(f"window={shape.window} and alibi_slopes are for causal attention: leave them out")
    key_offsets = offsets if key_offsets is None else key_offsets
    segments = Segments(offsets.to(torch.int32).contiguous(), key_offsets.to(torch.int32).contiguous(), causal)
    if q.device.type == "cpu":
        _check_offsets(segments, len(q), len(k))
    return segments


def _check_offsets(segments: Segments, queries: int, keys: int) -> None:
    starts, key_starts = segments.offsets.tolist(), segments.key_offsets.tolist()
    for name, found, total in (("offsets", starts, queries), ("key_offsets", key_starts, keys)):
        if found[:1] != [0] or found[-1] != total or found != sorted(found) or len(found) != len(starts):
            raise ValueError(f"{name} are {found}, expected {len(starts)} that rise from 0 to {total}")
    lengths = zip(segments.offsets.diff().tolist(), segments.key_offsets.diff().tolist(), strict=True)
    if segments.is_causal and starts != key_starts and any(few > many for few, many in lengths):
        raise ValueError("a sequence has more queries than keys: its queries must be its last tokens, or causal=False")


def _serves_varlen(q: Tensor, v: Tensor, shape: AttentionShape) -> bool:
    """Whether torch's attention over packed sequences on CUDA knows all that is asked for."""
    is_plain = not shape.softcap and shape.sinks is None and shape.alibi_slopes is None
    return is_plain and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] == v.shape[2] <= 256


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, shape: AttentionShape) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = [int(offsets.diff().max()) for offsets in segments[:2]]
    seen = (-1 if not shape.window else shape.window - 1, 0) if segments.is_causal else (-1, -1)
    return varlen_attn(  # type: ignore[return-value]
        q, k, v, *segments[:2], *longest, scale=shape.scale, window_size=seen, enable_gqa=q.shape[1] != k.shape[1]
    )


def has_kernels(device: torch.device) -> bool:
    """Whether packed sequences have kernels there; the reference goes through them one by one and is slower than SDPA
    on padded ones.
    """
    return backend(device) == "native"


def has_paged_kernels(device: torch.device) -> bool:
    """Whether the paged cache has kernels there; the reference goes through it query by query."""
    return backend(device) == ("triton" if device.type == "cuda" else "native")

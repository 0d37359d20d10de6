"""Attention of one query row at a time over a paged KV cache: the decode step on CUDA.

The keys of a row are cut into splits of 256, whose number and bounds depend on its position alone: each is a program
of its own and keeps the running maximum, sum and weighted values of its keys; a second kernel merges the splits in
their order. So a row's result depends neither on the batch nor on who was first, and a launch of fixed size serves
rows of any length, which a CUDA graph needs. Query heads that share keys share their loads.
Sources: flash decoding, Dao et al. 2023; paging, Kwon et al. 2023, arXiv:2309.06180; sinks, Xiao et al. 2023,
arXiv:2309.17453, as logits of a key without a value.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16  # tokens in a block of the cache
SPLIT = 256
# Tensor cores want 16 rows; the query heads of a key head are seldom as many, and the rest is padding.
MIN_GROUP = 16
TILE = {1: 64, 2: 64, 4: 32, 8: 16}
LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def _split_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    sequences_ptr,
    positions_ptr,
    tables_ptr,
    slopes_ptr,
    m_ptr,
    s_ptr,
    acc_ptr,
    scale: tl.float64,
    softcap: tl.float64,
    window,
    num_splits,
    stride_q,
    stride_table,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    ACC: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions_ptr + row)
    first = tl.maximum(position + 1 - window, 0)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, position + 1)
    # The grid is made for the longest row that there can be: most splits of most rows have nothing to do.
    if (start <= position) & (end > first):
        group, depth, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        head = kv_head * GROUP + group
        is_head, is_depth, is_column = group < GROUP, depth < HEAD, columns < VALUE
        q = tl.load(
            q_ptr + row * stride_q + head[:, None] * HEAD + depth[None, :],
            mask=is_head[:, None] & is_depth[None, :],
            other=0.0,
        )
        if HAS_SLOPES:
            slopes = tl.load(slopes_ptr + head, mask=is_head, other=0.0).to(ACC)
        table = tables_ptr + tl.load(sequences_ptr + row).to(tl.int64) * stride_table
        m, s = tl.full((BLOCK_G,), -1e30, ACC), tl.zeros((BLOCK_G,), ACC)
        acc = tl.zeros((BLOCK_G, BLOCK_E), ACC)
        for tile in range(start, end, TILE):
            at = tile + tl.arange(0, TILE)
            is_seen = (at <= position) & (at >= first)
            page = tl.load(table + at // PAGE, mask=is_seen, other=0).to(tl.int64)
            place = (page * PAGE + at % PAGE) * KV_HEADS + kv_head
            k_ptrs = keys_ptr + place[None, :] * HEAD + depth[:, None]
            k = tl.load(k_ptrs, mask=is_depth[:, None] & is_seen[None, :], other=0.0)
            z = tl.dot(q, k, input_precision="ieee", out_dtype=ACC) * tl.full((), scale, ACC)
            if HAS_SOFTCAP:
                cap = tl.full((), softcap, ACC)
                # tanh by exp, which overflows on neither side
                squeezed = tl.exp(-2.0 * tl.abs(z / cap))
                z = tl.where(z < 0, -cap, cap) * (1.0 - squeezed) / (1.0 + squeezed)
            if HAS_SLOPES:
                z -= slopes[:, None] * (position - at)[None, :].to(ACC)
            z = tl.where(is_seen[None, :], z, float("-inf"))
            new_m = tl.maximum(m, tl.max(z, axis=1))
            p, shrink = tl.exp(z - new_m[:, None]), tl.exp(m - new_m)
            v_ptrs = values_ptr + place[:, None] * VALUE + columns[None, :]
            v = tl.load(v_ptrs, mask=is_seen[:, None] & is_column[None, :], other=0.0)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee", out_dtype=ACC)
            s = s * shrink + tl.sum(p, axis=1)
            m = new_m
        part = (row * KV_HEADS * GROUP + head) * num_splits + split
        tl.store(m_ptr + part, m, mask=is_head)
        tl.store(s_ptr + part, s, mask=is_head)
        out_ptrs = acc_ptr + part[:, None] * VALUE + columns[None, :]
        tl.store(out_ptrs, acc, mask=is_head[:, None] & is_column[None, :])


@triton.jit
def _merge_kernel(
    m_ptr,
    s_ptr,
    acc_ptr,
    positions_ptr,
    sinks_ptr,
    out_ptr,
    window,
    num_splits,
    HAS_SINKS: tl.constexpr,
    ACC: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions_ptr + row)
    first = tl.maximum(position + 1 - window, 0) // SPLIT
    columns = tl.arange(0, BLOCK_E)
    m, s, acc = tl.full((), -1e30, ACC), tl.zeros((), ACC), tl.zeros((BLOCK_E,), ACC)
    if HAS_SINKS:
        m = tl.load(sinks_ptr + head).to(ACC)
        s += 1.0
    for split in range(first, position // SPLIT + 1):
        part = (row * HEADS + head) * num_splits + split
        part_m, part_s = tl.load(m_ptr + part), tl.load(s_ptr + part)
        part_acc = tl.load(acc_ptr + part * VALUE + columns, mask=columns < VALUE, other=0.0)
        new_m = tl.maximum(m, part_m)
        old, new = tl.exp(m - new_m), tl.exp(part_m - new_m)
        acc = acc * old + part_acc * new
        s = s * old + part_s * new
        m = new_m
    out_ptrs = out_ptr + (row * HEADS + head) * VALUE + columns
    tl.store(out_ptrs, acc / s, mask=columns < VALUE)


def paged_attention(
    q: Tensor,
    pool: tuple[Tensor, Tensor],
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
    """Return (T, H, Dv) of queries (T, H, D) at `positions` (T,) int32 of `sequences` (T,) int32.

    `tables` (sequences, blocks) int32 name the blocks of the pool, (blocks, 16, Hkv, D) and (blocks, 16, Hkv, Dv), that
    hold the keys and values of each sequence. The rest as `reference_attention.attend_one`. Nothing is read back from
    the device. Raises ValueError for tensors that do not belong together.
    """
    _check(q, pool, sequences, positions, tables, sinks, alibi_slopes)
    keys, values = pool
    (rows, heads, head_size), (kv_heads, value_size) = q.shape, values.shape[2:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    splits = triton.cdiv(tables.shape[1] * BLOCK, SPLIT)
    m, s = torch.empty(2, rows, heads, splits, dtype=dtype, device=q.device).unbind()
    partial = torch.empty(rows, heads, splits, value_size, dtype=dtype, device=q.device)
    out = torch.empty(rows, heads, value_size, dtype=q.dtype, device=q.device)
    # A window as wide as the table hides nothing.
    seen = window or tables.shape[1] * BLOCK + 1
    sizes = {"HEAD": head_size, "VALUE": value_size, "BLOCK_E": max(16, triton.next_power_of_2(value_size))}
    if rows:
        _split_kernel[(rows, kv_heads, splits)](
            q, keys, values, sequences, positions, tables, alibi_slopes, m, s, partial,
            scale, softcap or 0.0, seen, splits, q.stride(0), tables.stride(0),
            HAS_SOFTCAP=bool(softcap), HAS_SLOPES=alibi_slopes is not None, ACC=acc, KV_HEADS=kv_heads,
            GROUP=heads // kv_heads, BLOCK_G=max(MIN_GROUP, triton.next_power_of_2(heads // kv_heads)),
            BLOCK_D=max(16, triton.next_power_of_2(head_size)), TILE=TILE[q.element_size()], SPLIT=SPLIT, PAGE=BLOCK,
            **sizes, **LAUNCH,
        )  # fmt: skip
        _merge_kernel[(rows, heads)](
            m, s, partial, positions, sinks, out, seen, splits,
            HAS_SINKS=sinks is not None, ACC=acc, HEADS=heads, VALUE=value_size, BLOCK_E=sizes["BLOCK_E"], SPLIT=SPLIT,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _check(
    q: Tensor,
    pool: tuple[Tensor, Tensor],
    sequences: Tensor,
    positions: Tensor,
    tables: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> None:
    """Raise ValueError unless shapes, dtypes and layouts belong together."""
    keys, values = pool
    if q.dim() != 3 or q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        raise ValueError(f"q is {tuple(q.shape)} with strides {q.stride()}, expected (T, H, D), dense within a row")
    fits = keys.shape[:3] == values.shape[:3] and keys.shape[1] == BLOCK and keys.shape[3] == q.shape[2]
    if not fits or q.shape[1] % keys.shape[2] or {keys.dtype, values.dtype} != {q.dtype}:
        raise ValueError(
            f"the pool is {keys.dtype} {tuple(keys.shape)} and {values.dtype} {tuple(values.shape)}, expected "
            f"(blocks, {BLOCK}, Hkv, D) and (blocks, {BLOCK}, Hkv, Dv) for queries {q.dtype} {tuple(q.shape)}"
        )
    if not (keys.is_contiguous() and values.is_contiguous() and tables.stride(1) == 1):
        raise ValueError("pool and tables must be contiguous: pass them as they were allocated")
    for name, part, shape, dtype in (
        ("sequences", sequences, q.shape[:1], torch.int32),
        ("positions", positions, q.shape[:1], torch.int32),
        ("tables", tables, tables.shape[:2], torch.int32),
        ("sinks", sinks, q.shape[1:2], None),
        ("alibi_slopes", slopes, q.shape[1:2], None),
    ):
        if part is not None and (part.shape != shape or dtype not in (None, part.dtype) or part.device != q.device):
            raise ValueError(
                f"{name} is {part.dtype} {tuple(part.shape)} on {part.device}, expected {dtype or 'floating point'} "
                f"{tuple(shape)} on {q.device}"
            )

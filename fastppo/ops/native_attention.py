"""Attention by the C++ kernels, which take addresses: `attention` checks what lies behind them, and here it is held."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops.backends import native

Pool = tuple[Tensor, Tensor]


class AttentionShape(NamedTuple):
    """How scores become probabilities: the keyword arguments of `attention.ragged_attention`."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None


class Segments(NamedTuple):
    """Where the queries and the keys of each sequence begin, (B + 1,) int32; whether a query sees the past only."""

    offsets: Tensor
    key_offsets: Tensor
    is_causal: bool = True


def paged_write(keys: Tensor, values: Tensor, pool: Pool, sequences: Tensor, positions: Tensor, tables: Tensor) -> None:
    """See `attention.paged_write`."""
    keys, values, (rows, cache, _held) = _dense(keys), _dense(values), _views(keys, pool, sequences, positions, tables)
    native().paged_write(rows, cache, _heads(keys), _heads(values), torch.get_num_threads())


def paged_attention(
    q: Tensor, pool: Pool, sequences: Tensor, positions: Tensor, tables: Tensor, shape: AttentionShape
) -> Tensor:
    """See `attention.paged_attention`."""
    q, shape = _dense(q), _plain(shape)
    rows, cache, _held = _views(q, pool, sequences, positions, tables)
    out = q.new_empty(*q.shape[:2], pool[1].shape[-1])
    native().paged_attention(rows, cache, _native_shape(shape), _heads(q), _heads(out), torch.get_num_threads())
    return out


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, shape: AttentionShape) -> Tensor:
    """See `attention.ragged_attention`."""
    shape, parts = _plain(shape), map(_dense, (q, k, v))
    result: Tensor = _Attention.apply(*parts, shape.sinks, segments, shape)
    return result


class _Attention(torch.autograd.Function):
    """Attention with the log of each softmax's sum kept, from which the backward pass makes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Segments, shape: AttentionShape
    ) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        log_sums = q.new_empty(q.shape[:2], dtype=torch.float32) if any(ctx.needs_input_grad) else None
        heads = tuple(map(_heads, (q, k, v, out)))
        native().attention_forward(_ragged(q, k, v, segments), _native_shape(shape), heads, _address(log_sums))
        ctx.save_for_backward(q, k, v, sinks, out, log_sums)
        ctx.segments, ctx.shape = segments, shape._replace(sinks=None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, log_sums = ctx.saved_tensors
        d_out, grads = _dense(d_out), tuple(map(torch.empty_like, (q, k, v)))
        heads = tuple(map(_heads, (q, k, v, out, d_out, *grads)))
        shape = _native_shape(ctx.shape._replace(sinks=sinks))
        native().attention_backward(_ragged(q, k, v, ctx.segments), shape, heads, log_sums.data_ptr())
        d_sinks = None
        if ctx.needs_input_grad[3]:
            # A sink's value is zero, so that only the probability which it takes from the others counts.
            d_sinks = -((sinks - log_sums).exp() * (d_out.float() * out.float()).sum(-1)).sum(0)
        return *grads, d_sinks, None, None


def _address(part: Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()


def _dense(part: Tensor) -> Tensor:
    """Return (T, H, D) with the numbers of a head side by side."""
    return part if part.stride(-1) == 1 else part.clone(memory_format=torch.contiguous_format)


def _heads(part: Tensor) -> tuple[int, int, int, bool]:
    return part.data_ptr(), part.stride(0), part.stride(1), part.dtype == torch.bfloat16


def _plain(shape: AttentionShape) -> AttentionShape:
    """Return the shape with its tensors as the kernels read them."""
    slopes, sinks = shape.alibi_slopes, shape.sinks
    return shape._replace(
        sinks=None if sinks is None else sinks.float().contiguous(),
        alibi_slopes=None if slopes is None else slopes.detach().float().contiguous(),
    )


def _native_shape(shape: AttentionShape) -> Any:
    tensors = _address(shape.sinks), _address(shape.alibi_slopes)
    return native().AttentionShape(shape.scale, shape.softcap or 0.0, shape.window or 0, *tensors)


def _ragged(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Any:
    sizes = len(segments.offsets) - 1, q.shape[1], k.shape[1], q.shape[2], v.shape[2]
    where = segments.offsets.data_ptr(), segments.key_offsets.data_ptr()
    return native().RaggedRows(sizes, *where, segments.is_causal, torch.get_num_threads())


def _views(part: Tensor, pool: Pool, sequences: Tensor, positions: Tensor, tables: Tensor) -> tuple[Any, Any, Any]:
    """Return the rows, the cache, and the tensors that must live as long as these."""
    held = [sequences.to(torch.int32).contiguous(), positions.to(torch.int32).contiguous(), tables]
    keys, values = pool
    sizes = keys.shape[1], keys.shape[2], values.shape[3]
    cache = native().KeyValuePool(keys.data_ptr(), values.data_ptr(), keys.dtype == torch.bfloat16, sizes)
    rows = native().PagedRows(part.shape[:2], *(x.data_ptr() for x in held), tables.stride(0))
    return rows, cache, held

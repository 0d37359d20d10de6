"""The one attention function: packed training and scoring, chunked prefill and paged decode.

It is registered with transformers as "fastppo" and gets queries, keys and values after rotation and norms. What it
does with them the context says; no mask is ever built, since transformers makes none for a function that it does
not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastppo.ops.attention import paged_attention, paged_write, ragged_attention

NAME = "fastppo"


@dataclass(frozen=True, eq=False)
class Packed:
    """Whole sequences side by side in one row, without a cache: training and scoring."""

    offsets: Tensor  # (B + 1,) int32, where each sequence begins


@dataclass(frozen=True, eq=False)
class LayerCache:
    """The KV cache of one layer; see `reference_attention.paged_write` for the pool's layout."""

    pool: tuple[Tensor, Tensor]
    tables: Tensor  # (sequences, max_blocks) int32, shared by the layers of a group


@dataclass(frozen=True, eq=False)
class Paged:
    """Some tokens of some sequences side by side in one row: their KV is stored, then everything before is seen."""

    sequences: Tensor  # (T,) int32, rows of the tables; tokens of a sequence are adjacent and ascend
    positions: Tensor  # (T,) int32
    layers: Sequence[LayerCache]  # by the module's layer_idx


_context: ContextVar[Packed | Paged] = ContextVar("attention")


@contextmanager
def attending(context: Packed | Paged) -> Iterator[None]:
    """Let the attention modules of an attached model work on this layout inside, backward passes included."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention (1, T, H, Dv) of query (1, H, T, D), key (1, Hkv, T, D) and value (1, Hkv, T, Dv)."""
    context = _context.get(None)
    if context is None:
        raise RuntimeError(f"{type(module).__name__} attends through fastppo outside of `attending(context)`")
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    shape: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "window": sliding_window,
        "sinks": s_aux,
    }
    if isinstance(context, Packed):
        return ragged_attention(q, k, v, context.offsets, **shape)[None], None
    cache = context.layers[module.layer_idx]
    where = context.sequences, context.positions, cache.tables
    paged_write(k, v, cache.pool, *where)
    return paged_attention(q, cache.pool, *where, **shape)[None], None

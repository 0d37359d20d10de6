"""The one attention function: packed training and scoring, chunked prefill and paged decode.

It is registered with transformers as "fastppo" and gets queries, keys and values after rotation and norms. What it
does with them the context says; no mask is ever built, since transformers makes none for a function that it does
not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.ops.attention import paged_attention, paged_write, ragged_attention
from fastppo.reference_attention import BLOCK

NAME = "fastppo"
# What modules hand over besides, and what does not change the result here: positions are the context's, and nothing
# is returned but the output. Any other argument may change it.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "use_cache", "output_attentions", "deterministic"}
_HARMLESS |= {"output_hidden_states", "return_dict", "num_items_in_batch", "logits_to_keep", "output_router_logits"}


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores for a token, and how far it looks back."""

    kv_heads: int
    head_size: int
    value_size: int
    window: int | None
    features: tuple[str, ...] = ()  # what else changes its scores

    def pool(self, blocks: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return uninitialised keys and values in `like`'s dtype, laid out as `ops.attention.paged_write` says."""
        if like.device.type not in ("cpu", "meta"):
            sizes = (self.head_size, self.value_size)
            keys, values = (like.new_empty(blocks, BLOCK, self.kv_heads, size) for size in sizes)
            return keys, values
        keys = like.new_empty(blocks, self.kv_heads, self.head_size, BLOCK)
        return keys, like.new_empty(blocks, self.kv_heads, BLOCK, self.value_size)


@dataclass(frozen=True, eq=False)
class Packed:
    """Whole sequences side by side in one row, without a cache: training and scoring."""

    offsets: Tensor  # (B + 1,) int32, where each sequence begins
    seen: dict[int, LayerShape] | None = None  # where given, the layers note themselves here by their layer_idx


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
    layers: Sequence[LayerCache] | Mapping[int, LayerCache]  # by the module's layer_idx


_context: ContextVar[Packed | Paged] = ContextVar("attention")


def current() -> Packed | Paged | None:
    """Return the layout that attention works on here, if any."""
    return _context.get(None)


@contextmanager
def attending(context: Packed | Paged) -> Iterator[None]:
    """Let the attention modules of an attached model work on this layout inside."""
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
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention (1, T, H, Dv) of query (1, H, T, D), key (1, Hkv, T, D) and value (1, Hkv, T, Dv).

    Raises NotImplementedError for arguments that would change the result and are not understood.
    """
    context = _context.get(None)
    if context is None:
        raise RuntimeError(f"{type(module).__name__} attends through fastppo outside of `attending(context)`")
    _refuse_others(module, others | {"dropout": dropout or None, "is_causal=False": is_causal is False})
    q, k, v = (part[0].transpose(0, 1) for part in _in_one_dtype(query, key, value))
    shape: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "window": sliding_window,
        "sinks": s_aux,
    }
    if isinstance(context, Packed):
        if context.seen is not None:
            features = {"soft cap": softcap, "sinks": s_aux is not None}
            sizes = k.shape[1], k.shape[2], v.shape[2]
            used = tuple(name for name, value in features.items() if value)
            context.seen[module.layer_idx] = LayerShape(*sizes, sliding_window, used)
        return ragged_attention(q, k, v, context.offsets, **shape)[None], None
    cache = context.layers[module.layer_idx]
    where = context.sequences, context.positions, cache.tables
    paged_write(k, v, cache.pool, *where)
    return paged_attention(q, cache.pool, *where, **shape)[None], None


def _in_one_dtype(*parts: Tensor) -> Sequence[Tensor]:
    """Return queries, keys and values in autocast's dtype, if it is on: rotary positions have widened the first two."""
    device = parts[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return parts
    return [part.to(torch.get_autocast_dtype(device)) for part in parts]


def _refuse_others(module: Any, others: Mapping[str, Any]) -> None:
    unknown = [n for n, value in others.items() if value is not None and value is not False and n not in _HARMLESS]
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention, which fastppo's does not know"
        )

"""The parts of a decoder, as fastppo/engine/recognition.py finds them in a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastppo.engine.tracing import RotaryCall


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm, or LayerNorm where `is_centred`, by weight + offset."""

    module: Any
    is_centred: bool
    offset: float
    epsilon: float


@dataclass(frozen=True)
class Rope:
    """Which of a trace's rotary calls turns the heads, and how its tables are laid out."""

    rotary: int
    layout: str  # a key of LAYOUTS

    @property
    def is_interleaved(self) -> bool:
        """Whether columns 0 and 1, 2 and 3, ... are turned together, not 0 and half, 1 and half + 1, ..."""
        return "pairs" in self.layout


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads (of queries, keys or values) that a projection makes."""

    linear: Any
    columns: tuple[int, ...]  # (heads,) first column of each in the projection
    size: int
    norm: Norm | None = None
    rope: Rope | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of one layer, from hidden states to hidden states."""

    norm: Norm | None
    queries: Heads
    keys: Heads
    values: Heads
    output: Any
    norm_after: Norm | None
    scale: float
    softcap: float
    window: int  # 0: none
    sinks: Tensor | None


@dataclass(frozen=True, eq=False)
class FeedForward:
    """function(gate)·up, or function(gate) where up is None, then `down`."""

    norm: Norm | None
    gate: tuple[Any, int]  # a projection and its first column
    up: tuple[Any, int] | None
    size: int
    function: int
    down: Any
    norm_after: Norm | None


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a decoder. A parallel one feeds both parts the same hidden states, or one norm of them."""

    attention: Attention
    feed_forward: FeedForward
    is_parallel: bool
    shares_norm: bool
    residual_scale: float


@dataclass(frozen=True, eq=False)
class Structure:
    """A decoder without its head."""

    embedding: Any
    embedding_scale: float
    positions: Any | None
    position_offset: int
    layers: tuple[Layer, ...]
    norm: Norm
    rotaries: tuple[RotaryCall, ...]

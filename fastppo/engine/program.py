"""One step of a decoder on the CPU as one C++ call: the list of operations that csrc/decode_program.hpp runs.

The operations read the model's own weights where they lie, adapters unmerged. Activations are fp32 between them, and
a bf16 model's are rounded where its modules round theirs: what was drawn is what the update computes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.engine.listing import Listing
from fastppo.engine.matching import LAYOUTS
from fastppo.engine.recognition import recognise
from fastppo.engine.structure import Layer, Rope, Structure
from fastppo.engine.tracing import RotaryCall, UnsupportedModelError, trace
from fastppo.models.attach import pinned_rope
from fastppo.reference_attention import BLOCK


@dataclass(frozen=True)
class CacheShape:
    """What a layer keeps of a token, and the number of its group: layers of one window share block tables."""

    kv_heads: int
    head_size: int
    value_size: int
    window: int  # tokens that a query sees, its own included; 0: all
    group: int


def build_program(model: nn.Module) -> tuple[Program | None, str]:
    """Return the decode program of a causal language model on the CPU, or None and the reason why it has none."""
    try:
        return Program(model), ""
    except UnsupportedModelError as error:
        return None, str(error)


class Program:
    """A model's body for the tokens of one decode step, or of a chunk of a prompt.

    `refresh` must be called after weights have changed or adapters were switched: the matrices are read where they lie,
    but smaller parameters through copies. Not for use from two threads at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._structure = recognise(trace(model))
        layers = self._structure.layers
        self.windows = tuple(dict.fromkeys(layer.attention.window for layer in layers))  # of each group of layers
        self.layers = tuple(_cache_shape(layer, self.windows) for layer in layers)
        self._ropes = _ropes(model, self._structure)
        # torch sums a LayerNorm in an order of its own.
        self.may_be_exact = not self._structure.norm.is_centred
        self.refresh()

    def refresh(self) -> None:
        """Read all weights and adapters as they are now. Raises UnsupportedModelError if they do not fit."""
        groups = tuple(layer.group for layer in self.layers)
        self._listing = Listing(self._structure, [table.rope for table in self._ropes], groups)
        self.hidden_size = self._listing.width

    def step(
        self,
        input_ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        tables: Sequence[Tensor],
        pools: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Write keys and values of M tokens to the cache and return their last hidden states (M, H), fp32.

        Args:
            input_ids: (M,) int64.
            positions: (M,) int, of each token in its sequence; all before it are in the cache or in this step.
            sequences: (M,) int, each token's row in the tables. Tokens of one sequence stand side by side.
            tables: for each of `windows` int32 (sequences, max_blocks) block numbers.
            pools: for each layer keys (blocks, kv_heads, head_size, 16) and values (blocks, kv_heads, 16, value_size).
        """
        out = torch.empty(len(input_ids), self.hidden_size)
        if len(input_ids):
            rows = _as_read(input_ids, positions, sequences)
            step = self._arguments(rows, tables, pools, 1)
            self._listing.native.run(step, out.data_ptr(), torch.get_num_threads())
        return out

    def loop(
        self,
        input_ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        tables: Sequence[Tensor],
        pools: Sequence[tuple[Tensor, Tensor]],
        hidden: Tensor,
        *drawing: Any,
    ) -> int:
        """Do up to len(hidden) steps in a row, each from the tokens that the one before has drawn; return how many.

        Only where each token is its sequence's last. `hidden` (steps, M, H) fp32 gets the hidden states; `drawing` is
        head, sampling, bounds and results as csrc/decode_loop.hpp wants them. For the rest see `step`.
        """
        rows = _as_read(input_ids, positions, sequences)
        step = self._arguments(rows, tables, pools, len(hidden))
        head, sampling, bounds, out = drawing
        most, threads = len(hidden), torch.get_num_threads()
        count: int = self._listing.native.loop(step, head, sampling, bounds, most, hidden.data_ptr(), out, threads)
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of all that a step reads but the cache."""
        return sum(tensor.nbytes for tensor in self._listing.tensors)

    @property
    def vocabulary(self) -> int:
        """Tokens that have an embedding."""
        return self._listing.vocabulary

    def _arguments(
        self, rows: list[Tensor], tables: Sequence[Tensor], pools: Sequence[tuple[Tensor, Tensor]], steps: int
    ) -> tuple[Any, ...]:
        """Check what so many steps need and return the addresses."""
        positions = rows[1]
        self._check(rows[0], int(positions.max()) + steps - 1, tables, pools)
        angles = [rope.up_to(int(positions.max()) + steps) for rope in self._ropes]
        return (
            (len(positions), *(part.data_ptr() for part in rows)),
            [(table.data_ptr(), table.stride(0)) for table in tables],
            [
                (k.data_ptr(), v.data_ptr(), k.dtype is torch.bfloat16, s.kv_heads, s.head_size, s.value_size)
                for (k, v), s in zip(pools, self.layers, strict=True)
            ],
            [(cosines.data_ptr(), sines.data_ptr(), cosines.shape[1]) for cosines, sines in angles],
        )

    def _check(
        self, input_ids: Tensor, last: int, tables: Sequence[Tensor], pools: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Raise ValueError for what would read or write beside a tensor, with positions up to `last`."""
        lowest, highest = map(int, input_ids.aminmax())
        if lowest < 0 or highest >= self._listing.vocabulary:
            raise ValueError(
                f"input_ids reach from {lowest} to {highest}, expected 0 to {self._listing.vocabulary - 1}: they are "
                "another tokenizer's"
            )
        limit = self._listing.num_positions
        if limit is not None and last >= limit:
            raise ValueError(f"position {last} is past the {limit} that the model has learned: generate shorter texts")
        if len(tables) != len(self.windows) or any(table.dtype is not torch.int32 for table in tables):
            raise ValueError(f"{len(tables)} block tables, expected {len(self.windows)} of int32, one for each window")
        room = min(table.shape[1] for table in tables) * BLOCK
        if last >= room:
            raise ValueError(f"position {last} is past the {room} that the block tables have room for: enlarge them")
        for (keys, values), shape in zip(pools, self.layers, strict=True):
            sizes = (shape.kv_heads, shape.head_size, BLOCK), (shape.kv_heads, BLOCK, shape.value_size)
            is_dense = keys.is_contiguous() and values.is_contiguous() and keys.dtype in (torch.float32, torch.bfloat16)
            if (keys.shape[1:], values.shape[1:]) != sizes or not is_dense or keys.dtype != values.dtype:
                raise ValueError(
                    f"a layer's cache is {keys.dtype} {tuple(keys.shape)} and {values.dtype} {tuple(values.shape)}, "
                    f"expected contiguous fp32 or bf16 blocks of {sizes[0]} and {sizes[1]}"
                )


def _as_read(input_ids: Tensor, positions: Tensor, sequences: Tensor) -> list[Tensor]:
    parts = input_ids, positions.to(torch.int32), sequences.to(torch.int32)
    return [part.contiguous() for part in parts]


def _cache_shape(layer: Layer, windows: tuple[int, ...]) -> CacheShape:
    keys, values, window = layer.attention.keys, layer.attention.values, layer.attention.window
    return CacheShape(len(keys.columns), keys.size, values.size, window, windows.index(window))


class _Angles:
    """Cosines and sines of positions, made by the model's own module and kept."""

    def __init__(self, model: nn.Module, rope: Rope, call: RotaryCall) -> None:
        self.rope = rope
        self._model, self._call = model, call
        self._table = (torch.empty(0, 0), torch.empty(0, 0))

    def up_to(self, count: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (positions, width), fp32, of at least `count` positions."""
        if len(self._table[0]) < count:
            with pinned_rope(self._model):
                angles = self._call(torch.arange(max(256, 2 * count)))
            cosines, sines = (LAYOUTS[self.rope.layout](part).contiguous() for part in angles)
            self._table = cosines, sines
        return self._table


def _ropes(model: nn.Module, structure: Structure) -> list[_Angles]:
    parts = [heads for layer in structure.layers for heads in (layer.attention.queries, layer.attention.keys)]
    ropes = dict.fromkeys(heads.rope for heads in parts if heads.rope is not None)
    return [_Angles(model, rope, structure.rotaries[rope.rotary]) for rope in ropes]

"""A cache whose rows end at the same column: left-padded, the one layout that every attention supports.

All rows live in one buffer per layer, [rows, heads, columns, head size]. A decode step writes one column; a new
prompt is prefilled by itself and moved into a free row so that it ends where the others end; rows that finished
are overwritten by the next prompt, or squeezed out when nobody waits. Columns that no row needs any more are cut off.
Recurrent states have no columns: a row is a slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

_SPARE_COLUMNS = 64


class _WindowLayer(DynamicLayer):
    """One layer's share of the buffer; `start` and `end` are the columns that hold tokens."""

    def __init__(self, like: Any, rows: int):
        super().__init__()
        shapes = ((rows, part.shape[1], 0, part.shape[3]) for part in (like.keys, like.values))
        self.keys, self.values = (like.keys.new_zeros(shape) for shape in shapes)
        self.dtype, self.device = like.keys.dtype, like.keys.device
        self.is_initialized = True
        self.start = self.end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.end + key_states.shape[-2]
        self.keys[:, :, self.end : end] = key_states
        self.values[:, :, self.end : end] = value_states
        self.end = end
        return self.keys[:, :, self.start : end], self.values[:, :, self.start : end]

    def get_seq_length(self) -> int:
        return self.end - self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end - self.start + query_length, 0

    def place(self, rows: Tensor, prompts: Any) -> None:
        """Write prompts, left-padded to a common length, into `rows` so that they end at the last used column."""
        begin = self.end - prompts.keys.shape[-2]
        self.keys[rows, :, begin : self.end] = prompts.keys
        self.values[rows, :, begin : self.end] = prompts.values

    def resize(self, used: int, spare: int) -> None:
        """Move the last `used` columns (zeros where there are fewer) to the front of a buffer with `spare` more."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], used + spare, old.shape[3])
            have = min(used, self.end - self.start)
            new[:, :, used - have : used] = old[:, :, self.end - have : self.end]
            setattr(self, name, new)
        self.start, self.end = 0, used

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


class _StateLayer(LinearAttentionLayer):
    """One layer's recurrent states, a slot for each row."""

    def __init__(self, like: Any, rows: int):
        super().__init__(like.number_of_states)
        for name, value in vars(like).items():
            if isinstance(value, dict):  # sizes and flags are the prompt's; the states begin empty
                setattr(self, name, dict(value))
        self.dtype, self.device = like.dtype, like.device
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: x.new_zeros(rows, *x.shape[1:]) for i, x in states.items() if x is not None})

    def place(self, rows: Tensor, prompts: Any) -> None:
        pairs = (self.conv_states, prompts.conv_states), (self.recurrent_states, prompts.recurrent_states)
        for states, given in pairs:
            for number, state in given.items():
                if state is not None:
                    states[number][rows] = state

    def select(self, rows: Tensor) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: state[rows] for i, state in states.items() if state is not None})


class _HybridLayer(_StateLayer, _WindowLayer):
    """Keys, values and recurrent states of one layer."""

    def __init__(self, like: Any, rows: int):
        _WindowLayer.__init__(self, like, rows)
        columns = self.keys, self.values
        _StateLayer.__init__(self, like, rows)
        self.keys, self.values = columns

    def place(self, rows: Tensor, prompts: Any) -> None:
        _StateLayer.place(self, rows, prompts)
        _WindowLayer.place(self, rows, prompts)

    def select(self, rows: Tensor) -> None:
        _StateLayer.select(self, rows)
        _WindowLayer.select(self, rows)


def _opened(like: Any, rows: int) -> Any:
    """Return an empty layer of so many rows for what the layer of a prefilled cache holds."""
    has_keys, has_states = getattr(like, "keys", None) is not None, hasattr(like, "conv_states")
    if has_keys:
        return _HybridLayer(like, rows) if has_states else _WindowLayer(like, rows)
    return _StateLayer(like, rows) if has_states else like


class WindowCache(Cache):
    """The cache of all layers, and which columns belong to which row."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []  # tokens held by each row

    @property
    def used(self) -> int:
        """Columns in use: the length of the longest row."""
        return self._attention[0].get_seq_length() if self._attention else max(self.lengths, default=0)

    @property
    def _attention(self) -> list[_WindowLayer]:
        return [layer for layer in self.layers if isinstance(layer, _WindowLayer)]

    def mask(self, device: torch.device) -> Tensor:
        """Return the (rows, used + 1) int64 attention mask of the next decode step: 1 on a row's own tokens."""
        columns = torch.arange(self.used + 1, device=device)
        starts = self.used - torch.tensor(self.lengths, device=device)
        return (columns >= starts[:, None]).long()

    def admit(self, prompts: Cache, lengths: list[int], rows: list[int], capacity: int) -> None:
        """Take prefilled prompts, left-padded if their lengths differ, into free rows of `capacity` in all."""
        if not self.layers:
            self.layers: list[Any] = [_opened(layer, capacity) for layer in prompts.layers]
            self.lengths = [0] * capacity
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        if max(lengths) > self.used:
            self._resize(max(lengths))
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            if hasattr(layer, "place"):  # others hold nothing
                layer.place(torch.tensor(rows, device=prompt.device), prompt)

    def make_room(self) -> None:
        """Make sure that one more column fits, cutting off those that no row needs."""
        longest = max(self.lengths)
        for layer in self._attention[:1]:
            if layer.end == layer.keys.shape[-2]:
                self._resize(longest)
        for layer in self._attention:
            layer.start = layer.end - longest

    def advance(self) -> None:
        """Count the column that a forward pass has just written; free rows stay empty."""
        self.lengths = [length + 1 if length else 0 for length in self.lengths]

    def release(self, row: int) -> None:
        """Mark a row as free: it no longer keeps columns alive."""
        self.lengths[row] = 0

    def keep(self, rows: list[int]) -> None:
        """Squeeze out all rows but these, in this order."""
        for layer in self.layers:
            if hasattr(layer, "select"):
                layer.select(torch.tensor(rows, device=layer.device))
        self.lengths = [self.lengths[row] for row in rows]

    def _resize(self, used: int) -> None:
        for layer in self._attention:
            layer.resize(used, max(_SPARE_COLUMNS, used // 2))

"""A KV cache whose rows end at the same column: left-padded, the one layout that every decoder supports.

All rows live in one buffer per layer, [rows, heads, columns, head size]. A decode step writes one column; a new
prompt is prefilled by itself and moved into a free row so that it ends where the others end; rows that finished
are overwritten by the next prompt, or squeezed out when nobody waits. Columns that no row needs any more are cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

_SPARE_COLUMNS = 64


class _WindowLayer(DynamicLayer):
    """One layer's share of the buffer; `start` and `end` are the columns that hold tokens."""

    def __init__(self, keys: Tensor, values: Tensor, columns: int):
        super().__init__()
        self.keys, self.values = self._buffer(keys, columns), self._buffer(values, columns)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.start = self.end = columns

    @staticmethod
    def _buffer(like: Tensor, columns: int) -> Tensor:
        return like.new_zeros(like.shape[0], like.shape[1], columns, like.shape[3])

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

    def place(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write prompts, left-padded to a common length, into `rows` so that they end at the last used column."""
        begin = self.end - keys.shape[-2]
        self.keys[rows, :, begin : self.end] = keys
        self.values[rows, :, begin : self.end] = values

    def resize(self, used: int, spare: int) -> None:
        """Move the last `used` columns (zeros where there are fewer) to the front of a buffer with `spare` more."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._buffer(old, used + spare)
            have = min(used, self.end - self.start)
            new[:, :, used - have : used] = old[:, :, self.end - have : self.end]
            setattr(self, name, new)
        self.start, self.end = 0, used

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


def check_kind(model: Any, prefilled: DynamicCache | None = None) -> None:
    """Raise NotImplementedError for a model whose state is not, or not only, keys and values.

    The configuration tells it of most models before they run; of others, what they left in a cache after a prompt.
    """
    if prefilled is None:
        layers = DynamicCache(config=model.config.get_text_config()).layers
        is_recurrent = any(hasattr(layer, "update_conv_state") for layer in layers)
    else:
        layers = prefilled.layers
        is_recurrent = not layers or any(getattr(layer, "keys", None) is None for layer in layers)
    if is_recurrent:
        raise NotImplementedError(
            f"{type(model).__name__} (model type {model.config.model_type}) keeps a recurrent state between tokens, "
            "which is not supported yet; use a model whose layers are all attention"
        )


class WindowCache(Cache):
    """The cache of all layers, and which columns belong to which row."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []  # tokens held by each row

    @property
    def used(self) -> int:
        """Columns in use: the length of the longest row."""
        return self.layers[0].get_seq_length() if self.layers else 0

    def mask(self, device: torch.device) -> Tensor:
        """Return the (rows, used + 1) int64 attention mask of the next decode step: 1 on a row's own tokens."""
        columns = torch.arange(self.used + 1, device=device)
        starts = self.used - torch.tensor(self.lengths, device=device)
        return (columns >= starts[:, None]).long()

    def admit(self, prompts: DynamicCache, lengths: list[int], rows: list[int]) -> None:
        """Take prefilled, left-padded prompts into free rows; the first prompts open the cache in rows 0, 1, ..."""
        longest = max(lengths)
        if not self.layers:
            self.layers: list[Any] = [_WindowLayer(layer.keys, layer.values, 0) for layer in prompts.layers]
            self.lengths = [0] * len(rows)
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        if longest > self.used:
            self._resize(longest)
        index = torch.tensor(rows, device=prompts.layers[0].keys.device)
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            layer.place(index, prompt.keys, prompt.values)

    def make_room(self) -> None:
        """Make sure that one more column fits, cutting off those that no row needs."""
        layer = self.layers[0]
        longest = max(self.lengths)
        if layer.end == layer.keys.shape[-2]:
            self._resize(longest)
        for layer in self.layers:
            layer.start = layer.end - longest

    def advance(self) -> None:
        """Count the column that a forward pass has just written; free rows stay empty."""
        self.lengths = [length + 1 if length else 0 for length in self.lengths]

    def release(self, row: int) -> None:
        """Mark a row as free: it no longer keeps columns alive."""
        self.lengths[row] = 0

    def keep(self, rows: list[int]) -> None:
        """Squeeze out all rows but these, in this order."""
        index = torch.tensor(rows, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.select(index)
        self.lengths = [self.lengths[row] for row in rows]

    def _resize(self, used: int) -> None:
        for layer in self.layers:
            layer.resize(used, max(_SPARE_COLUMNS, used // 2))

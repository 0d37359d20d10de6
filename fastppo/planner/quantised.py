"""Linear layers in 8 or 4 bits as the memory sees them: codes and scales stay, wide weights come and go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.ops.four_bits import FourBits, Nested

_BLOCK = 64  # weights that share a scale in 4 bits, as bitsandbytes has them


class Quantised(nn.Linear):
    """A linear layer on the meta device with its weight in 8 or 4 bits, of another layer's size or taken over from it.

    In 4 bits the scales are as bitsandbytes has them: of the layer, or in fp32 where it is not quantised yet.
    """

    def __init__(self, like: Any, bits: int):
        inputs, outputs = _sizes(like)
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.bias, self.meaning = like.bias, getattr(like, "meaning", "weight_only")
        if bits == 8:
            codes, scales = _meta((outputs, inputs), torch.int8), _meta((outputs,))
            self.four_bits: FourBits | None = None
        else:
            self.four_bits = _four_bits(like, inputs, outputs)
            codes, *tensors = self.four_bits.tensors
            for number, tensor in enumerate(tensors[1:]):
                self.register_buffer(f"scales_{number}", tensor, persistent=False)
            scales = tensors[0]
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (..., outputs) of inputs (..., inputs), without numbers."""
        if self.four_bits is not None:
            return ops.four_bit_linear(x, self.four_bits, self._widen, self.bias)
        scales: Any = self.scales
        return ops.int8_linear(x, self.weight, scales, self.bias, meaning=self.meaning)

    def _widen(self) -> Tensor:
        """Make what bitsandbytes makes when it widens a weight."""
        assert self.four_bits is not None
        absmax = self.four_bits.absmax
        absmax = absmax if self.four_bits.nested is None else absmax.float()
        return absmax.new_empty(self.four_bits.shape, dtype=self.four_bits.dtype)


def _four_bits(like: Any, inputs: int, outputs: int) -> FourBits:
    """Return the meta twin of a layer's 4-bit weight, or what bitsandbytes would make of a plain layer's by default."""
    if hasattr(like, "four_bits"):
        bits: FourBits = like.four_bits()
        nested = None
        if bits.nested is not None:
            table, absmax, block, offset = bits.nested
            nested = Nested(table.to("meta"), absmax.to("meta"), block, offset.to("meta"))
        codes, table, absmax = (part.to("meta") for part in (bits.codes, bits.table, bits.absmax))
        return replace(bits, codes=codes, table=table, absmax=absmax, nested=nested)
    numel = inputs * outputs
    codes, absmax = _meta((-(-numel // 2), 1), torch.uint8), _meta((-(-numel // _BLOCK),))
    return FourBits(codes, (outputs, inputs), _meta((16,)), absmax, _BLOCK, like.weight.dtype)


def _meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sizes(module: Any) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer, transformers' transposed one included."""
    if hasattr(module, "nf"):
        return module.nx, module.nf
    return module.in_features, module.out_features


def quantise(model: Any, bits: int) -> None:
    """Replace the linear layers of a model on the meta device but for its head, which bitsandbytes leaves alone too."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.Linear, Conv1D)) and child is not head:
                setattr(parent, name, Quantised(child, bits))

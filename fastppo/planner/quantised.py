"""Linear layers in 8 or 4 bits as the memory sees them: codes and scales stay, wide weights come and go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastppo import ops

_BLOCK = 64  # weights that share a scale in 4 bits, as bitsandbytes has them


class Quantised(nn.Linear):
    """A linear layer on the meta device with its weight in 8 or 4 bits; 4 are widened whole for each matmul."""

    def __init__(self, like: Any, bits: int):
        inputs, outputs = _sizes(like)
        super().__init__(inputs, outputs, bias=False, device="meta")
        numel = inputs * outputs
        shape = (outputs, inputs) if bits == 8 else (numel // 2,)
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        scales = torch.empty(outputs if bits == 8 else -(-numel // _BLOCK), device="meta")
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), like.bias
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (..., outputs) of inputs (..., inputs), without numbers."""
        if self.weight.dim() == 2:
            scales: Any = self.scales
            return ops.int8_linear(x, self.weight, scales, self.bias)
        result: Tensor = _Widened.apply(x, self.out_features)
        return result if self.bias is None else result + self.bias


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int) -> Tensor:
        ctx.inputs, ctx.outputs = x.shape[-1], outputs
        return x @ x.new_empty(x.shape[-1], outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (d_out,) = upstream
        return d_out @ d_out.new_empty(ctx.outputs, ctx.inputs), None


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

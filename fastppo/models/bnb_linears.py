"""bitsandbytes' 8-bit and 4-bit layers with one meaning: the same weights in the rollout, the update and its backward.

An adopted layer keeps its class's base, tensors, names and checkpoints, so PEFT and bitsandbytes still know it; only
what it computes changes. bitsandbytes' own int8 layer rounds activations, takes columns out by what else is in the
batch, and on the CPU decodes with other numbers than it trains with; its 4-bit layer on the CPU packs its storage anew
when it decodes.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from torch import Tensor, nn

from fastppo import ops

_FOUR_BITS = (Linear4bit, LinearFP4, LinearNF4)


class Int8Linear(Linear8bitLt):
    """y = x · (codes · scales)ᵀ + bias with the int8 codes (N, K) and row scales (N,) that bitsandbytes stored."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype of x (..., K)."""
        codes, scales = self.codes_and_scales()
        return ops.int8_linear(x, codes, scales, self.bias)

    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """Return the codes (N, K) int8 and what a row of them is multiplied by, (N,) fp32."""
        absmax: Any = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
        return self.weight.data, absmax / 127


class Linear4Bit(Linear4bit):
    """y = x · Wᵀ + bias with W (N, K) as bitsandbytes dequantises it, for any number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype of x (..., K)."""
        product: Tensor = _Dequantised.apply(x, self.weight)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Dequantised(torch.autograd.Function):
    """x (..., K) · Wᵀ, whose W is dequantised again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        product: Tensor = x @ dequantize_4bit(weight.data, weight.quant_state).to(x.dtype).t()
        return product

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None]:
        (d_out,) = upstream
        return d_out @ dequantize_4bit(ctx.weight.data, ctx.weight.quant_state).to(d_out.dtype), None


def adopt(model: nn.Module) -> int:
    """Give every quantised bitsandbytes layer of the model its one meaning, in place; return how many there are.

    Raises ValueError for a layer that was not quantised yet.
    """
    count = 0
    for name, module in model.named_modules():
        if type(module) is Linear8bitLt and not module.state.has_fp16_weights:
            _check(name, module, module.weight.dtype == torch.int8)
            module.__class__ = Int8Linear
        elif type(module) in _FOUR_BITS:
            _check(name, module, getattr(module.weight, "quant_state", None) is not None)
            _unpack(module)
            module.__class__ = Linear4Bit
        else:
            continue
        count += 1
    return count


def _unpack(module: Any) -> None:
    """Put codes that bitsandbytes has rearranged for its own decoding on the CPU back into their order."""
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        data, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, module.weight.quant_state)
        module.weight.data, module.weight.quant_state, module.quant_state = data, state, state


def _check(name: str, module: nn.Module, is_quantised: bool) -> None:
    if not is_quantised:
        raise ValueError(
            f"{name} is a {type(module).__name__} that is not quantised yet; load the model with a "
            "quantization_config, or move it to its device first"
        )

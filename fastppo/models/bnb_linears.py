"""bitsandbytes' 8-bit and 4-bit layers with one meaning: the same weights in the rollout, the update and its backward.

An adopted layer keeps its class's base, tensors, names and checkpoints, so PEFT and bitsandbytes still know it; only
what it computes changes. bitsandbytes' own int8 layer rounds activations, takes columns out by what else is in the
batch, and on the CPU decodes with other numbers than it trains with; its 4-bit layer on the CPU packs its storage anew
when it decodes.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from torch import Tensor, nn

from fastppo import ops
from fastppo.ops.four_bits import FourBits, Nested
from fastppo.ops.quantised import MEANINGS

_FOUR_BITS = (Linear4bit, LinearFP4, LinearNF4)


class Int8Linear(Linear8bitLt):
    """y = x · (codes · scales)ᵀ + bias with the int8 codes (N, K) and row scales (N,) that bitsandbytes stored.

    `meaning` says whether each row of x is rounded to int8 first: one of `ops.quantised.MEANINGS`.
    """

    meaning: str = "weight_only"
    _absmax: Any = None
    _absmax_version = 0
    _scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype of x (..., K)."""
        codes, scales = self.codes_and_scales()
        return ops.int8_linear(x, codes, scales, self.bias, meaning=self.meaning)

    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """Return the codes (N, K) int8 and what a row of them is multiplied by, (N,) fp32."""
        weight: Any = self._parameters["weight"]
        absmax: Any = weight.SCB if weight.SCB is not None else self.state.SCB
        # Kept until the tensor that they are of is another, or has been written to.
        if absmax is not self._absmax or absmax._version != self._absmax_version:
            self._absmax, self._absmax_version, self._scales = absmax, absmax._version, absmax / 127
        return weight.data, self._scales


class Linear4Bit(Linear4bit):
    """y = x · Wᵀ + bias with W (N, K) as bitsandbytes dequantises it, for any number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype of x (..., K)."""
        weight: Any = self.weight
        return ops.four_bit_linear(x, self.four_bits(), partial(widened, weight), self.bias)

    def four_bits(self) -> FourBits:
        """Return what the codes are and stand for."""
        weight: Any = self.weight
        state, nested = weight.quant_state, None
        if state.nested:
            nested = Nested(state.state2.code, state.state2.absmax, state.state2.blocksize, state.offset)
        codes = weight.data.view(torch.uint8)
        return FourBits(codes, tuple(state.shape), state.code, state.absmax, state.blocksize, state.dtype, nested)


def widened(weight: Any) -> Tensor:
    """Return the weight (N, K), in the dtype that it had, that 4-bit codes stand for."""
    state = weight.quant_state
    if state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    # Where a block reaches into the next row, on a CPU bitsandbytes takes another's scale; in one long row it does not.
    long = copy.copy(state)
    long.shape = torch.Size([state.shape.numel()])
    return dequantize_4bit(weight.data, long).view(state.shape)  # type: ignore[no-any-return]


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


def set_int8_meaning(model: nn.Module, meaning: str) -> None:
    """Let all 8-bit layers of a model compute one of `ops.quantised.MEANINGS`. Raises ValueError."""
    if meaning not in MEANINGS:
        raise ValueError(f"int8_meaning must be one of {', '.join(MEANINGS)}, got {meaning!r}")
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    if not layers:
        raise ValueError(
            f"int8_meaning={meaning!r} says what 8-bit layers compute, but the model has none; add load_in_8bit=True"
        )
    for layer in layers:
        layer.meaning = meaning


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

"""What lies between the matmuls of a layer, in plain PyTorch: RMSNorm, gated activation, rotary positions.

16-bit inputs are widened, and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return x / √(mean(x²) + eps) · (offset + weight), the mean over the last axis: x (..., H), weight (H,).

    Source: Zhang and Sennrich (arXiv:1910.07467) eq. 4; Gemma's weight has an offset of 1.
    """
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (offset + _wide(weight))).to(x.dtype)


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Return act(gate)·up of two (..., I); `up` None: of the halves of gate (..., 2 I). Source: arXiv:2002.05202."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return (ACTIVATIONS[activation](_wide(gate)) * _wide(up)).to(gate.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x·cos + (-x₂, x₁)·sin on the first R numbers x = (x₁, x₂) of each head, and the rest as it is.

    x is (B, heads, L, D), cos and sin (B or 1, L, R). Source: Su et al. (arXiv:2104.09864), with halves for pairs.
    """
    size = cos.shape[-1]
    turned, rest = _wide(x[..., :size]), x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * _wide(cos)[:, None] + torch.cat((-second, first), dim=-1) * _wide(sin)[:, None]
    return torch.cat((turned.to(x.dtype), rest), dim=-1)

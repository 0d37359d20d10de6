"""LoRA layers as PEFT keeps them, computed in the dtype of what passes through.

PEFT widens the activations of every layer to the adapter's fp32, keeps that copy for the backward pass, and scales and
adds in passes of their own over the output. Here the small matrices are rounded instead, activations are shared by the
layers that read them, and scale and sum are part of the second product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.ops.matmul import is_row_invariant


def find_layer(module: Any) -> partial[Tensor] | None:
    """Return what computes a PEFT LoRA layer on a linear one in the place of its `forward`, or None for any other."""
    is_layer = hasattr(module, "lora_A") and hasattr(module, "get_base_layer") and len(module.lora_embedding_A) == 0
    if not is_layer or not isinstance(module.get_base_layer(), nn.Linear) or hasattr(module, "parameter_name"):
        return None
    return partial(run, module)


def run(module: Any, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Return (..., N) of x (..., K): the base layer's output plus scale·B(A x) of every adapter in use."""
    # PEFT's parts are row-invariant where they must be; the products here are not.
    names = None if rest or named or is_row_invariant() else plain_adapters(module)
    if names is None:
        result: Tensor = type(module).forward(module, x, *rest, **named)
        return result
    out = module.base_layer(x)
    shape, out, rows = out.shape, out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
    for name in names:
        down, up = (part[name].weight.to(x.dtype) for part in (module.lora_A, module.lora_B))
        out = torch.addmm(out, rows @ down.t(), up.t(), alpha=module.scaling[name])
    return out.view(shape)  # type: ignore[no-any-return]


def plain_adapters(module: Any) -> list[str] | None:
    """Return the adapters of a layer that are on, or None if one of them is merged or more than B·A."""
    names = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    return names if not module.merged and all(_is_plain(module, name) for name in names) else None


def _is_plain(module: Any, name: str) -> bool:
    """Whether the adapter adds B·A and nothing else, without dropout."""
    dropout = module.lora_dropout[name]
    is_dropping = module.training and not isinstance(dropout, nn.Identity)
    return not (name in module.lora_variant or module.lora_B[name].bias is not None or is_dropping)

"""Row operations on a chunk of raw logits (C, V), each on the backend that serves the tensor.

`statistics` reads the logits, `gradient` turns them into dLoss/d(logits) in place, `ppo` does both for PPO's loss while
a row is in the cache. reference_rows.py has the formulas; native_rows.py and triton_rows.py call the kernels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastppo.ops import native_rows, reference_rows, triton_rows
from fastppo.ops.backends import backend, on_device
from fastppo.ops.row_types import Reference, Scaling, Statistics, Upstream


def statistics(u: Tensor, labels: Tensor, scaling: Scaling, ref: Reference | None = None) -> Statistics:
    """Return log-prob of the label, entropy, log-sum-exp and, with a reference, the exact KL of each row."""
    with on_device(u):
        result: Statistics = _module(u).statistics(u, labels, scaling, ref)
    return result


def gradient(
    u: Tensor,
    labels: Tensor,
    stats: Statistics,
    upstream: Upstream,
    scaling: Scaling,
    *,
    out: Tensor,
    ref: Reference | None = None,
) -> Tensor:
    """Write dLoss/du into `out` (C, V), which may be `u` itself, and return it."""
    with on_device(u):
        _module(u).gradient(u, labels, stats, upstream, scaling, out, ref)
    return out


def ppo(u: Tensor, labels: Tensor, terms: Any, scaling: Scaling, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses, logprobs, entropies), (C,), of PPO's loss with dLoss/du in `out`, in one pass over each row.

    `terms` is this chunk's part of a `PPOLoss`, in fp32. Only where `has_fused_ppo`.
    """
    with on_device(u):
        result: tuple[Tensor, Tensor, Tensor] = _module(u).ppo(u, labels, terms, scaling, out)
    return result


def has_fused_ppo(u: Tensor) -> bool:
    """Whether `ppo` serves these logits; without it, the loss goes between `statistics` and `gradient`."""
    return _module(u) is not reference_rows


def _module(u: Tensor) -> ModuleType:
    """Return what serves these logits; the C++ kernels know fp32 and bf16."""
    kind = backend(u.device)
    if kind == "triton":
        return triton_rows
    return native_rows if kind == "native" and u.dtype in (torch.float32, torch.bfloat16) else reference_rows

"""The operations of `reference.py` under the same names, each on the fastest backend for its tensors.

The head never materialises [rows x vocabulary]: it goes chunk by chunk over the rows, and `linear_loss` forms the
gradients in the same pass, since a loss on log-probs and entropies enters them only as two numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastppo import reference
from fastppo.reference import (
    RowLoss,
    allowed_tokens,
    clipped_policy_loss,
    clipped_value_loss,
    kl_penalty,
    sample_tokens,
    scaled_logits,
    uniforms,
    whiten,
)

try:
    import fastppo._native as _native
except ImportError:  # built without a compiler: everything still runs, in Python
    _native = None  # type: ignore[assignment]

__all__ = [
    "allowed_tokens",
    "backend",
    "clipped_policy_loss",
    "clipped_value_loss",
    "gae",
    "kl_penalty",
    "linear_kl",
    "linear_logprobs",
    "linear_loss",
    "pack",
    "sample_tokens",
    "scaled_logits",
    "uniforms",
    "use_backend",
    "whiten",
]

BACKENDS = ("auto", "reference", "native")
_choice = "auto"
# Rows of a chunk: fixed by the vocabulary alone, so that a result does not depend on how many rows there are.
_CHUNK_BYTES = 64 * 2**20
_MIN_CHUNK_ROWS = 64


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every operation inside: auto, reference or native. Raises if it cannot be had."""
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    if name == "native" and _native is None:
        raise RuntimeError("backend 'native' was asked for, but fastppo was installed without its C++ extension")
    previous, _choice = _choice, name
    try:
        yield
    finally:
        _choice = previous


def backend(device: torch.device) -> str:
    """Return the name of the backend that serves tensors of this device: native or reference."""
    if _choice == "native" and device.type != "cpu":
        raise RuntimeError(f"backend 'native' serves tensors in host memory, got one on {device}")
    if _choice == "reference" or _native is None or device.type != "cpu":
        return "reference"
    return "native"


def gae(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> Tensor:
    """Return the generalised advantages (T,); see `reference.gae`. Computed on the host, on any device."""
    if backend(torch.device("cpu")) == "reference":
        return reference.gae(rewards, values, offsets, gamma, lam)
    flat = _native.gae(rewards.cpu().numpy(), values.cpu().numpy(), offsets.cpu().numpy(), gamma, lam)
    return torch.from_numpy(flat).to(rewards.device)


def pack(lengths: list[int], num_bins: int, max_per_bin: int) -> Tensor:
    """Return the bin (N,) int64 of each sequence; see `reference.pack`."""
    if backend(torch.device("cpu")) == "reference":
        return reference.pack(lengths, num_bins, max_per_bin)
    sizes = torch.tensor(lengths, dtype=torch.int64).numpy()
    return torch.from_numpy(_native.pack(sizes, num_bins, max_per_bin))


def chunk_rows(vocabulary: int) -> int:
    """Return how many rows of the head are computed at a time for this vocabulary."""
    return max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // (4 * vocabulary))


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = chunk_rows(vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _Head:
    """The map from a chunk of hidden states to scaled logits z, and back from dL/dz to the gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None, scale: float):
        self.weight, self.bias = weight, bias
        self.temperature, self.softcap, self.scale = temperature, softcap, scale

    def logits(self, hidden: Tensor) -> Tensor:
        return reference.scaled_logits(hidden, self.weight, self.bias, self.temperature, self.softcap, self.scale)

    def to_raw(self, dz: Tensor, z: Tensor) -> Tensor:
        """Chain dL/dz to the output of the linear layer, in place: d(raw)/dz = scale/τ · (1 - (zτ/cap)²)."""
        if self.softcap:
            dz *= 1 - (z * (self.temperature / self.softcap)).square()
        return dz.mul_(self.scale / self.temperature) if self.scale != self.temperature else dz

    def add_gradients(self, du: Tensor, hidden: Tensor, grads: list[Tensor | None], rows: slice) -> None:
        """Add this chunk's part to the gradients [hidden, weight, bias] that are wanted."""
        d_hidden, d_weight, d_bias = grads
        du_low = du.to(self.weight.dtype)
        if d_hidden is not None:
            d_hidden[rows] = du_low @ self.weight
        if d_weight is not None:
            d_weight.addmm_(du_low.t(), hidden) if d_weight.dtype == hidden.dtype else d_weight.add_(
                du_low.t() @ hidden
            )
        if d_bias is not None:
            d_bias += du.sum(0)


def _logit_gradient(
    z: Tensor, labels: Tensor, stats: tuple[Tensor, ...], g: Tensor, e: Tensor | None, d_lse: Tensor | None = None
) -> Tensor:
    """Return dL/dz = g (1[v = y] - p) - e p (log p + H) + d_lse p; g, e, d_lse = dL/d(logprob, entropy, logsumexp)."""
    _, entropy, logsumexp = stats
    log_p = z - logsumexp[:, None]
    p = log_p.exp()
    dz = p * (-g if d_lse is None else d_lse - g)[:, None]
    if e is not None:
        dz -= e[:, None] * torch.where(p > 0, p * (log_p + entropy[:, None]), torch.zeros_like(p))
    return dz.scatter_add_(1, labels[:, None], g[:, None])


def _wanted(needs: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Allocate the gradients of hidden, weight and bias that are needed; those summed over chunks are fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return [
        torch.empty_like(hidden) if needs[0] else None,
        torch.zeros_like(weight, dtype=wide) if needs[1] else None,
        torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None,
    ]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *shape: Any) -> Any:
        head = _Head(weight, bias, *shape)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        stats = hidden.new_empty(3, len(labels), dtype=wide)
        for rows in _chunks(len(labels), len(weight)):
            stats[:, rows] = torch.stack(reference.row_statistics(head.logits(hidden[rows]), labels[rows]))
        ctx.save_for_backward(hidden, weight, bias, labels, stats)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone(), stats[2].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, e: Tensor | None, d_lse: Tensor | None) -> Any:
        hidden, weight, bias, labels, stats = ctx.saved_tensors
        g = torch.zeros_like(stats[0]) if g is None else g
        head, grads = _Head(weight, bias, *ctx.shape), _wanted(ctx.needs_input_grad[:3], hidden, weight, bias)
        for rows in _chunks(len(labels), len(weight)):
            z = head.logits(hidden[rows])
            upstream = (None if grad is None else grad[rows] for grad in (e, d_lse))
            dz = _logit_gradient(z, labels[rows], tuple(stats[:, rows]), g[rows], *upstream)
            head.add_gradients(head.to_raw(dz, z), hidden[rows], grads, rows)
        d_hidden, d_weight, d_bias = grads
        d_weight = d_weight.to(weight.dtype) if d_weight is not None else None
        d_bias = d_bias.to(bias.dtype) if d_bias is not None else None
        return d_hidden, d_weight, d_bias, None, *(None for _ in ctx.shape)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), (T,) fp32 each, of labels (T,) under hidden (T, H) and weight (V, H).

    Differentiable in hidden, weight and bias; chunks of rows are recomputed in the backward pass.
    See `reference.linear_logprobs` for the formulas.
    """
    result: tuple[Tensor, Tensor, Tensor] = _LinearLogprobs.apply(
        hidden, weight, bias, labels, temperature, softcap, logit_scale
    )
    return result


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> Tensor:
        loss, head = rest[0], _Head(weight, bias, *rest[1:])
        grads = _wanted(ctx.needs_input_grad[:3], hidden, weight, bias)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows in _chunks(len(labels), len(weight)):
            z = head.logits(hidden[rows])
            stats = reference.row_statistics(z, labels[rows])
            value, g, e = _loss_and_gradient(loss, stats, torch.arange(rows.start, rows.stop, device=hidden.device))
            total += value
            if any(grad is not None for grad in grads):
                dz = _logit_gradient(z, labels[rows], stats, g, e)
                head.add_gradients(head.to_raw(dz, z), hidden[rows], grads, rows)
        ctx.grads, ctx.num_rest = grads, len(rest)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grads = [grad if grad is None else grad.mul_(upstream.to(grad.dtype)) for grad in ctx.grads]
        del ctx.grads
        return *grads, None, *(None for _ in range(ctx.num_rest))


def _loss_and_gradient(loss: RowLoss, stats: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the summed loss of a chunk with its derivatives by log-prob and, if it is read, entropy, (C,) each."""
    with torch.enable_grad():
        logprobs, entropy = stats[0].detach().requires_grad_(), stats[1].detach().requires_grad_()
        value = loss(logprobs, entropy, rows).sum()
        g, e = torch.autograd.grad(value, (logprobs, entropy), allow_unused=True)
    return value.detach(), torch.zeros_like(logprobs) if g is None else g, e


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: RowLoss,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return Σ loss(logprobs (C,), entropies (C,), rows (C,)), a scalar, over chunks of the T rows.

    `loss` gives weighted per-row losses and is differentiated by its first two arguments; the gradients of hidden
    (T, H), weight (V, H) and bias are formed in the forward pass: 2 matmuls a row with a frozen head, 3 with a
    trained one. The result can be differentiated once.
    """
    if not torch.is_grad_enabled():  # autograd tells a Function what requires a gradient, not that none is wanted
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    result: Tensor = _LinearLoss.apply(hidden, weight, bias, labels, loss, temperature, softcap, logit_scale)
    return result


@torch.no_grad()
def linear_kl(
    head: tuple[Tensor, Tensor],
    ref_head: tuple[Tensor, Tensor],
    *,
    ref_shape: dict[str, Any] | None = None,
    **shape: Any,
) -> Tensor:
    """Return KL(π || π_ref), (T,) fp32, from two (hidden (T, H), weight (V, H)) pairs, chunk by chunk; no gradient.

    Keywords are those of `linear_logprobs`: bias, temperature, softcap, logit_scale; `ref_shape` holds those of the
    second where they differ.
    """
    (hidden, weight), (ref_hidden, ref_weight) = head, ref_head
    parts = [
        reference.exact_kl(
            reference.scaled_logits(hidden[rows], weight, **shape),
            reference.scaled_logits(ref_hidden[rows], ref_weight, **(shape if ref_shape is None else ref_shape)),
        )
        for rows in _chunks(len(hidden), len(weight))
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0)

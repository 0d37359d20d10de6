"""PPO's clipped loss: as the loss of `linear_loss`, and on log-probs that are already gathered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo import reference
from fastppo.ops.backends import backend, native, on_device


@dataclass(eq=False)
class PPOLoss:
    """PPO's clipped policy loss with a k1 penalty and an entropy bonus, as a row loss for `ops.linear_loss`.

    Weighted losses w (max(-ρA, -clip(ρ) A) + kl_coef (log π - log π_ref) - entropy_coef H) of each row, with
    ρ = exp(log π - log π_old). Called with a chunk's log-probs and entropies (C,) it returns theirs; `linear_loss`
    knows it and uses one fused kernel instead. Either way `logprobs` and `entropies` (T,) are filled, row by row, for
    statistics. With `old_logprobs` None the ratio is that of the first step: 1, with the gradient of the log-prob.
    Source: Schulman et al. (arXiv:1707.06347) eq. 7 and 9.
    """

    old_logprobs: Tensor | None  # (T,)
    advantages: Tensor  # (T,)
    weights: Tensor  # (T,); rows of weight 0 are never computed, their log-probs stay NaN
    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_coef: float = 0.0
    ref_logprobs: Tensor | None = None  # (T,)
    kl_coef: float = 0.0
    logprobs: Tensor = field(init=False)
    entropies: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.kl_coef and self.ref_logprobs is None:
            raise ValueError(f"kl_coef={self.kl_coef} weighs a penalty from ref_logprobs, which are None; pass them")
        wide = torch.promote_types(self.advantages.dtype, torch.float32)
        self.logprobs = torch.full_like(self.advantages, torch.nan, dtype=wide)
        self.entropies = self.logprobs.clone()

    def __call__(self, logprobs: Tensor, entropies: Tensor, rows: Tensor) -> Tensor:
        """Return the weighted losses (C,) of the rows numbered `rows` (C,)."""
        self.record(logprobs.detach(), entropies.detach(), rows)
        terms = self.take(rows)
        old = logprobs.detach() if terms.old_logprobs is None else terms.old_logprobs
        loss = reference.clipped_policy_loss(logprobs, old, terms.advantages, self.clip_low, self.clip_high)
        if terms.ref_logprobs is not None and self.kl_coef:
            loss = loss + self.kl_coef * (logprobs - terms.ref_logprobs)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropies
        return loss * terms.weights

    def record(self, logprobs: Tensor, entropies: Tensor, rows: Tensor) -> None:
        """Keep the log-probs and entropies (C,) of the rows numbered `rows`."""
        self.logprobs[rows], self.entropies[rows] = logprobs.to(self.logprobs), entropies.to(self.entropies)

    def take(self, rows: Tensor) -> Terms:
        """Return what the loss reads of the rows numbered `rows`."""
        old = None if self.old_logprobs is None else self.old_logprobs[rows]
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows]
        coefs = (self.clip_low, self.clip_high, self.kl_coef, self.entropy_coef)
        return Terms(old, ref, self.advantages[rows], self.weights[rows], *coefs)

    def has_gradient(self, logprobs: Tensor, rows: Tensor) -> Tensor | None:
        """Return whether each of the rows has a gradient, (C,) bool: clipped ones have none.

        None where that is not worth asking: on CUDA, and with an entropy bonus, which every row's gradient has.
        """
        if self.entropy_coef or backend(logprobs.device) != "native":
            return None
        return _native_loss(logprobs, self.take(rows))[1] != 0

    def check(self, rows: Tensor) -> None:
        """Raise ValueError unless every tensor has the shape (T,) and the device of `rows`."""
        for name in ("old_logprobs", "advantages", "weights", "ref_logprobs"):
            part = getattr(self, name)
            if part is not None and (part.shape != rows.shape or part.device != rows.device):
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)} on {part.device}, expected {tuple(rows.shape)} on "
                    f"{rows.device}: one number a row"
                )

    @property
    def is_fp32(self) -> bool:
        """Whether every tensor is fp32, which the fused kernels ask for."""
        parts = (self.old_logprobs, self.ref_logprobs, self.advantages, self.weights)
        return all(part is None or part.dtype == torch.float32 for part in parts)


@dataclass(frozen=True, eq=False)
class Terms:
    """A chunk of a `PPOLoss`: (C,) tensors and the coefficients."""

    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor
    clip_low: float
    clip_high: float
    kl_coef: float
    entropy_coef: float


class _GatheredLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, terms: Terms) -> Tensor:
        kernel = _native_loss if backend(logprobs.device) == "native" else _triton_loss
        with on_device(logprobs):
            losses, gradients = kernel(logprobs, terms)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream * ctx.saved_tensors[0], None


def _native_loss(logprobs: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    losses, gradients = torch.empty_like(logprobs), torch.empty_like(logprobs)
    parts = (terms.old_logprobs, terms.ref_logprobs, terms.advantages, terms.weights, losses)
    addresses = tuple(0 if part is None else part.data_ptr() for part in parts)
    coefs = (terms.clip_low, terms.clip_high, terms.kl_coef)
    native().ppo_loss(len(logprobs), logprobs.data_ptr(), addresses, coefs, gradients.data_ptr())
    return losses, gradients


def _triton_loss(logprobs: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    from fastppo.kernels.ppo import ppo_loss as kernel

    result: tuple[Tensor, Tensor] = kernel(
        logprobs,
        terms.old_logprobs,
        terms.advantages,
        terms.weights,
        clip_low=terms.clip_low,
        clip_high=terms.clip_high,
        ref_logprobs=terms.ref_logprobs,
        kl_coef=terms.kl_coef,
    )
    return result


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """Return the weighted losses (T,) of `PPOLoss`, without the bonus, from gathered log-probs (T,); once
    differentiable in them.

    All tensors are (T,); `old_logprobs` None stands for the detached log-probs themselves. Raises ValueError for
    shapes that differ.
    """
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs have shape {tuple(logprobs.shape)}, expected one axis (T,): flatten them")
    loss = PPOLoss(old_logprobs, advantages, weights, clip_low, clip_high, 0.0, ref_logprobs, kl_coef)
    loss.check(logprobs)
    if backend(logprobs.device) == "reference" or logprobs.dtype != torch.float32 or not loss.is_fp32:
        return loss(logprobs, torch.zeros_like(logprobs), torch.arange(len(logprobs), device=logprobs.device))
    terms = loss.take(torch.arange(len(logprobs), device=logprobs.device))
    result: Tensor = _GatheredLoss.apply(logprobs.contiguous(), terms)
    return result

"""Operations on flat ragged tensors: advantages and packing."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import reference
from fastppo.ops.backends import backend, native


def gae(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> Tensor:
    """Return the generalised advantages (T,); see `reference.gae`. On the device of the rewards, without a wait."""
    kind = backend(rewards.device)
    if rewards.device.type != "cpu":
        return _gae_by_doubling(rewards, values, offsets, gamma, lam)
    if kind != "native":
        return reference.gae(rewards, values, offsets, gamma, lam)
    return torch.from_numpy(native().gae(rewards.numpy(), values.numpy(), offsets.numpy(), gamma, lam))


def _gae_by_doubling(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> Tensor:
    """The recurrence A_t = δ_t + c_t A_{t+1}, c_t = γλ inside a sample and 0 at its end, in log₂ T steps.

    A step of span s replaces (c_t, A_t) by (c_t c_{t+s}, A_t + c_t A_{t+s}): the sum of twice as many terms.
    """
    num_tokens = len(rewards)
    ends = torch.zeros(num_tokens + 1, dtype=torch.bool, device=rewards.device)
    ends[offsets.to(rewards.device)] = True
    inside = (~ends[1:]).to(rewards.dtype)
    next_values = torch.cat([values[1:], values.new_zeros(1)]) * inside
    advantages = rewards + gamma * next_values - values
    decay = gamma * lam * inside
    span = 1
    while span < num_tokens:
        advantages = torch.cat([advantages[:-span] + decay[:-span] * advantages[span:], advantages[-span:]])
        decay = torch.cat([decay[:-span] * decay[span:], decay.new_zeros(span)])
        span *= 2
    return advantages


def pack(lengths: list[int], num_bins: int, max_per_bin: int) -> Tensor:
    """Return the bin (N,) int64 of each sequence; see `reference.pack`."""
    if backend(torch.device("cpu")) != "native":
        return reference.pack(lengths, num_bins, max_per_bin)
    sizes = torch.tensor(lengths, dtype=torch.int64).numpy()
    return torch.from_numpy(native().pack(sizes, num_bins, max_per_bin))


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd (Knuth's, 2^32 / golden ratio), so that different weights stay different modulo 2^64.
_MULTIPLIER = 2654435761


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """Return the sum of the bits of a tensor, () int64, weighted by row and by column: moving either one shows."""
    words = x.detach().contiguous().view(_WORDS[x.element_size()])
    words = words.reshape(len(words) if words.dim() else 1, -1)
    if backend(x.device) == "native":
        return torch.tensor(native().checksum(words.data_ptr(), *words.shape, x.element_size(), _MULTIPLIER))
    return _weighted(words.sum(0, dtype=torch.int64)) + _weighted(words.sum(1, dtype=torch.int64))


def _weighted(sums: Tensor) -> Tensor:
    return (sums * (torch.arange(1, len(sums) + 1, device=sums.device) * _MULTIPLIER)).sum()

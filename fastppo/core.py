"""What scripts import from `trl.core`, with the same meaning."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.reference import row_statistics

__all__ = [
    "WANDB_PADDING",
    "LengthSampler",
    "add_suffix",
    "average_torch_dicts",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "listify_batch",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "pad_to_size",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "stats_to_np",
    "whiten",
]

WANDB_PADDING = -1


class LengthSampler:
    """Draws lengths uniformly from range(min_value, max_value): the maximum itself is never drawn, as in TRL."""

    def __init__(self, min_value: int, max_value: int):
        self.values = list(range(min_value, max_value))
        if not self.values:
            raise ValueError(f"max_value ({max_value}) must be greater than min_value ({min_value}); it is exclusive")

    def __call__(self) -> int:
        """Draw one length."""
        return int(np.random.choice(self.values))


def set_seed(seed: int) -> None:
    """Seed the global generators of random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Return a nested dictionary as a flat one, keys joined by `sep`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}{sep}{name}": item for name, item in flatten_dict(value, sep).items()})
        else:
            flat[key] = value
    return flat


def stack_dicts(dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the values of dictionaries with equal keys, flattened and padded with WANDB_PADDING."""
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [d[key].flatten() for d in dicts], batch_first=True, padding_value=WANDB_PADDING
        )
        for key in dicts[0]
    }


def average_torch_dicts(dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each key's values."""
    return {key: torch.mean(torch.stack([d[key] for d in dicts]), dim=0) for key in dicts[0]}


def add_suffix(values: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """Return the dictionary with `suffix` added to every key."""
    return {key + suffix: value for key, value in values.items()}


def pad_to_size(tensor: Tensor, size: int, dim: int = 1, padding: int = 50256) -> Tensor:
    """Return the tensor padded at the end of `dim` to `size` with the token `padding`."""
    missing = size - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, padding)], dim=dim)


def logprobs_from_logits(logits: Tensor, labels: Tensor, gather: bool = True) -> Tensor:
    """Return log-softmax of (..., V) logits at the labels (...), or all of it."""
    logp = torch.log_softmax(logits, dim=-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1) if gather else logp


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropies (...), in nats, of (..., V) logits."""
    rows = logits.flatten(0, -2)
    return row_statistics(rows, rows.new_zeros(len(rows), dtype=torch.int64))[1].view(logits.shape[:-1])


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Return the mean of the values where the mask is not 0."""
    if axis is None:
        return (values * mask).sum() / mask.sum()
    return (values * mask).sum(dim=axis) / mask.sum(dim=axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Return the variance of the values where the mask is not 0; ValueError if there are too few of them."""
    count = float(mask.sum())
    if count < (2 if unbiased else 1):
        raise ValueError(f"the mask leaves {count:.0f} values, too few for a variance; enlarge the batch")
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return variance * count / (count - 1) if unbiased else variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return the values scaled to unit variance, and shifted to mean 0, as measured where the mask is not 0."""
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return whitened if shift_mean else whitened + mean


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Return the values scaled to unit (unbiased) variance and, unless told otherwise, mean 0."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


def clip_by_value(x: Tensor, tensor_min: Tensor, tensor_max: Tensor) -> Tensor:
    """Clamp elementwise between two tensors."""
    return torch.max(torch.min(x, tensor_max), tensor_min)


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statistics with one-element arrays and tensors turned into numbers."""
    single = {k: isinstance(v, (np.ndarray, Tensor)) and np.prod(v.shape) == 1 for k, v in stats.items()}
    return {key: value.item() if single[key] else value for key, value in stats.items()}


def stats_to_np(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statistics with tensors turned into fp32 numpy arrays and one-element ones into floats."""
    arrays = {k: v.detach().float().cpu().numpy() if isinstance(v, Tensor) else v for k, v in stats.items()}
    return {k: float(v.item()) if isinstance(v, np.ndarray) and v.size == 1 else v for k, v in arrays.items()}


def listify_batch(tensor: Tensor) -> list[Tensor]:
    """Return the rows of a tensor as a list of (1, ...) tensors."""
    return [tensor[i : i + 1] for i in range(tensor.shape[0])]


def respond_to_batch(
    model: Any, queries: Iterable[Tensor] | Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Sample txt_len tokens after each query of a (B, L) tensor, never stopping early: (B, txt_len)."""
    from fastppo.config import SamplingConfig
    from fastppo.engine.engine import Engine

    sampling = SamplingConfig(max_new_tokens=txt_len, top_k=top_k, top_p=top_p, stop_ids=())
    seed = int(torch.randint(2**31, ()))  # follows the global seed, as in TRL
    return torch.stack(list(Engine(model, seed=seed).generate(list(queries), sampling)))

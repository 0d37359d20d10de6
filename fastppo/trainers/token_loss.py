"""The cross entropy of documents under a causal language model, straight from hidden states: no logits are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.models.attach import is_attached
from fastppo.models.network import causal_lm, language_head
from fastppo.models.passes import sequence_hidden
from fastppo.trainers.documents import IGNORED, Documents


def token_loss(model: nn.Module, documents: Documents, count: Tensor, noise_alpha: float | None = None) -> Tensor:
    """Return Σ -log p(token | its document before it) / count over the tokens to learn, a scalar, fp32 or wider.

    Runs inside `models.passes.passing`. `noise_alpha` is NEFTune's, for a model in training mode. The head sees only
    the tokens to learn; under autocast it computes in bf16, or in fp32 where that is fp16, and its losses are fp32.
    """
    with noisy_embeddings(model, documents.tokens, noise_alpha):
        hidden, _ = sequence_hidden(model, documents.tokens)
    targets = documents.targets()
    if is_attached(model):
        labels = torch.cat(targets)
    else:
        labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED).flatten()
    head = language_head(model)
    dtype = _computed_dtype(head.weight)
    arguments = head.arguments(1.0) | {"bias": None if head.bias is None else head.bias.to(dtype)}
    scale = -1.0 / count  # inside, so that no gradient has to be multiplied afterwards

    def losses(logprobs: Tensor, entropies: Tensor, rows: Tensor) -> Tensor:
        return logprobs * scale

    return ops.linear_loss(
        hidden.to(dtype), head.weight.to(dtype), labels.to(hidden.device), losses, ignore_index=IGNORED, **arguments
    )


def _computed_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return weight.dtype
    # Gradients are formed before a scaler multiplies the loss, and are too small for fp16 until then.
    dtype = torch.get_autocast_dtype(device)
    return torch.float32 if dtype == torch.float16 else dtype


@contextmanager
def noisy_embeddings(model: nn.Module, sequences: Sequence[Tensor], alpha: float | None) -> Iterator[None]:
    """Add uniform noise of ±alpha / √(L·H) to the embeddings of a sequence of L tokens inside, in training mode.

    Source: Jain et al. 2023 (arXiv:2310.05914). L is a sequence's own length, however the batch is laid out.
    """
    if not alpha or not model.training:
        yield
        return
    lengths = torch.tensor([len(tokens) for tokens in sequences])

    def add_noise(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
        sizes = alpha / (lengths * embedded.shape[-1]).sqrt()
        per_token = sizes.repeat_interleave(lengths)[None] if is_attached(model) else sizes[:, None]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * per_token[..., None].to(embedded)

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()

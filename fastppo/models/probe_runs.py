"""What the probe runs: random sequences, and a model's own forward of each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.models.network import (
    body,
    causal_lm,
    context_length,
    is_encoder_decoder,
    last_hidden,
    own_outputs,
    prompt_length,
)
from fastppo.models.seq2seq import decoder_prefix

# Three sequences that begin and end in different blocks of the cache, and are longer than its window.
_LENGTHS = (13, 22, 37)


def random_sequences(model: nn.Module) -> list[Tensor]:
    """Return three sequences of random token ids, which fit the model's context."""
    inner = causal_lm(model)
    context = min(context_length(model) or max(_LENGTHS), prompt_length(model) or max(_LENGTHS))
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(len(table.weight) for table in embeddings(model))
    lengths = [max(2, min(length, length * context // max(_LENGTHS))) for length in _LENGTHS]
    # Not from the ends of the vocabulary, where padding is, of which transformers warns.
    middle = vocabulary // 4, max(vocabulary // 2, vocabulary // 4 + 1)
    sequences = [torch.randint(*middle, (n,), generator=generator) for n in lengths]
    prefix = decoder_prefix(model)
    if prefix is not None:  # the engine's decoders begin with it
        sequences = [torch.cat([prefix, ids[len(prefix) :]]) for ids in sequences]
    return [ids.to(inner.device) for ids in sequences]


def own_hidden(model: nn.Module, ids: Tensor, source: Tensor) -> Tensor:
    """Return the last hidden states (B, T, H) of the model's own forward; only an encoder looks at the source."""
    if is_encoder_decoder(model):
        return own_outputs(model, ids, source)[0]
    return last_hidden(model, input_ids=ids, use_cache=False)


def alone(model: nn.Module, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Return the last hidden states (L, H) of each sequence, run by itself."""
    pairs = zip(sequences, sources_of(sequences), strict=True)
    return [own_hidden(model, ids[None], source[None])[0] for ids, source in pairs]


def sources_of(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Return what an encoder reads for each of the decoder's sequences: another one of them, of another length."""
    return [*sequences[1:], sequences[0]]


def embeddings(model: nn.Module) -> list[Any]:
    """Return the modules that embed tokens: the decoder's, and the encoder's if it has its own."""
    inner = causal_lm(model)
    if not inner.config.is_encoder_decoder:
        return [inner.get_input_embeddings()]
    tables = [network.get_input_embeddings() for network in (inner.get_encoder(), body(inner))]
    return tables[:1] if tables[0] is tables[1] else tables

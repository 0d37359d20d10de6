"""Encoder-decoders: what the encoder makes of the queries, and the decoder's passes over the responses.

Queries and responses are padded on the right, each for itself, and masked by their lengths: a padding id may be a
token like any other, as it is T5's first one. The decoder starts with tokens of its own, so that the first token of a
response is predicted, and trained, like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastppo.models.network import causal_lm, is_encoder_decoder, last_hidden


def decoder_prefix(model: nn.Module) -> Tensor | None:
    """Return the tokens (P,), int64 on the CPU, that the decoder begins with; None for a model without an encoder.

    They are the start token and the language that is forced upon it, as mBART's. Raises ValueError if the model says
    of no token that it is the first.
    """
    if not is_encoder_decoder(model):
        return None
    inner = causal_lm(model)
    places = [getattr(inner, "generation_config", None), inner.config]
    first = _token("decoder_start_token_id", places) or _token("bos_token_id", places)
    if first is None:
        raise ValueError(
            f"{type(inner).__name__} does not say with which token its decoder begins; set "
            "model.config.decoder_start_token_id"
        )
    return torch.tensor(first + (_token("forced_bos_token_id", places) or []), dtype=torch.int64)


def _token(name: str, places: Sequence[Any]) -> list[int] | None:
    """Return the first token that one of the configurations gives under this name."""
    found = next((value for place in places if (value := getattr(place, name, None)) is not None), None)
    if found is not None and not isinstance(found, int):
        raise ValueError(f"{name} is {found!r}, expected one token; set it to that in model.generation_config")
    return None if found is None else [found]


class Encoded(NamedTuple):
    """What the encoder made of some queries."""

    hidden: Tensor  # (B, L, H)
    mask: Tensor  # (B, L) int64, 1 on a query's own tokens

    def take(self, index: Sequence[int]) -> Encoded:
        """Return the rows `index`, in that order."""
        return self if list(index) == list(range(len(self.mask))) else Encoded(*(part[list(index)] for part in self))


def encode(model: nn.Module, queries: Sequence[Tensor]) -> Encoded:
    """Run the encoder over queries, 1-D each, padded on the right."""
    inner = causal_lm(model)
    ids = nn.utils.rnn.pad_sequence(list(queries), batch_first=True).to(inner.device)
    lengths = torch.tensor([len(query) for query in queries])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(inner.device)
    return Encoded(inner.get_encoder()(input_ids=ids, attention_mask=mask)[0], mask)


def decode(model: nn.Module, ids: Tensor, encoded: Encoded, **cache: Any) -> Tensor:
    """Return the decoder's last hidden states (B, T, H) of ids (B, T), of which a row reads the query of its row."""
    hidden, mask = encoded
    return last_hidden(
        model,
        input_ids=ids,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        **({"use_cache": False} | cache),
    )


def decoded(model: nn.Module, queries: Sequence[Tensor], sequences: Sequence[Tensor]) -> Tensor:
    """Return the decoder's last hidden states (B, T, H) of 1-D sequences, padded on the right, one to each query.

    A query that several sequences share, the same tensor each time, is encoded once; its gradients are summed.
    """
    places: dict[tuple[int, int], int] = {}
    index = [places.setdefault((query.data_ptr(), len(query)), len(places)) for query in queries]
    distinct = [queries[index.index(place)] for place in range(len(places))]
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(causal_lm(model).device)
    # Under the causal mask padding on the right is behind every token, so the decoder needs no mask of its own.
    return decode(model, ids, encode(model, distinct).take(index))

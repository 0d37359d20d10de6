"""Scores of a sequence-classification model for texts of different lengths, without padding where that can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.models.network import causal_lm, evaluating, last_hidden
from fastppo.models.passes import sequence_hidden
from fastppo.models.probe_runs import random_sequences


def last_tokens(model: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """Return the place in each sequence that transformers reads the score from: the last that is not the pad id."""
    pad_id = causal_lm(model).config.get_text_config().pad_token_id
    places = []
    for ids in sequences:
        real = (ids != pad_id).nonzero() if pad_id is not None else ids[:0]
        places.append(int(real[-1]) if len(real) else len(ids) - 1)
    return torch.tensor(places)


@torch.no_grad()
def reads_last_token(model: nn.Module) -> bool:
    """Whether a linear head `score` on the hidden state of the last token is all that the model adds to its body."""
    inner = causal_lm(model)
    if not isinstance(getattr(inner, "score", None), nn.Module):
        return False
    with evaluating(model):
        for ids in random_sequences(model):
            own = inner(input_ids=ids[None]).logits[0].float()
            place = int(last_tokens(model, [ids]))
            ours = _head(inner, last_hidden(model, input_ids=ids[None], use_cache=False)[0, place]).float()
            if ours.shape != own.shape or not torch.allclose(ours, own, rtol=1e-2, atol=1e-2):
                return False
    return True


def scores(model: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """Return the scores (N, labels), fp32 or wider, of 1-D token sequences, for a model that reads the last token.

    Runs inside `models.passes.passing`.
    """
    hidden, starts = sequence_hidden(model, sequences)
    ends = starts + last_tokens(model, sequences)
    return _widened(_head(causal_lm(model), hidden[ends.to(hidden.device)]))


def padded_scores(model: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """Return the scores (N, labels), fp32 or wider, by the model's own forward on sequences padded on the right."""
    inner = causal_lm(model)
    fill = inner.config.get_text_config().pad_token_id or 0
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=fill)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in sequences], batch_first=True)
    return _widened(inner(input_ids=ids.to(inner.device), attention_mask=mask.to(inner.device)).logits)


def _head(inner: Any, hidden: Tensor) -> Tensor:
    result: Tensor = inner.score(hidden)
    return result


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

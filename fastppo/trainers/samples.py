"""The door of `step`: what a user hands in is checked here, before any work, and becomes `Samples`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.models.network import causal_lm, context_length, language_head, prompt_length
from fastppo.models.seq2seq import decoder_prefix
from fastppo.rewards import is_listed
from fastppo.types import Rollout, Samples, offsets_of

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_counts(batch_size: int, **lists: Any) -> None:
    """Raise ValueError, naming the list, unless each has `batch_size` entries."""
    for name, given in lists.items():
        count = len(given) if is_listed(given) else type(given).__name__
        if count != batch_size:
            raise ValueError(f"got {count} {name}, but PPOConfig.batch_size is {batch_size}; pass a whole batch")


def limits(model: Any) -> dict[str, Any]:
    """Return what `check_samples` must know of a model: its vocabularies, its context and its decoder's prefix."""
    return {
        "vocabulary": len(language_head(model).weight),
        "prompt_vocabulary": len(causal_lm(model).get_input_embeddings().weight),
        # The larger one where an encoder reads more than its decoder writes: generation has kept to both.
        "context": max(context_length(model) or 0, prompt_length(model) or 0) or None,
        "prefix": decoder_prefix(model),
    }


def check_samples(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor] | Rollout,
    scores: Tensor,
    masks: Sequence[Tensor] | None,
    *,
    vocabulary: int,
    context: int | None,
    end_ids: Collection[int],
    temperature: float,
    device: torch.device,
    prompt_vocabulary: int | None = None,
    prefix: Tensor | None = None,
) -> Samples:
    """Return the samples that take part in the update, on `device`.

    Of an encoder-decoder `prefix` is what its decoder begins with; its prompts may have a vocabulary of their own.

    Left out, with a warning that counts them: responses without a score, empty ones, and those whose mask is all
    zero. A `Rollout` knows which of its responses ended by themselves; in any other list it is those that end in one of
    `end_ids`. Raises ValueError for anything that cannot be meant, and if nothing is left.
    """
    _check_pairs(queries, responses, (prompt_vocabulary or vocabulary, vocabulary), context, prefix)
    masks = _check_masks(responses, masks)
    rows = [i for i in range(len(queries)) if bool(masks[i].any()) and not bool(scores[i].isnan())]
    _warn_of_dropped(scores, masks)
    positions = [masks[i].nonzero().flatten().cpu() for i in rows]
    kept = [responses[i].to(device, torch.int64) for i in rows]
    return Samples(
        queries=tuple(queries[i].to(device, torch.int64) for i in rows),
        responses=tuple(kept),
        rows=tuple(rows),
        num_given=len(queries),
        positions=torch.cat(positions),
        offsets=offsets_of([len(p) for p in positions]),
        labels=torch.cat([response[p.to(device)] for response, p in zip(kept, positions, strict=True)]),
        ended=_ended(responses, rows, end_ids),
        temperature=temperature,
        prefix=prefix,
    )


def _ended(responses: Sequence[Tensor] | Rollout, rows: Sequence[int], end_ids: Collection[int]) -> Tensor:
    # Stop strings and a call's own stop ids leave no mark on the last token.
    if isinstance(responses, Rollout) and responses.is_untouched:
        return responses.finished[list(rows)].cpu()
    return torch.tensor([int(responses[i][-1]) in end_ids for i in rows])


def _check_masks(responses: Any, masks: Any) -> list[Tensor]:
    """Return the masks, boolean and on the host; all true where none were given."""
    if masks is None:
        return [torch.ones(len(response), dtype=torch.bool) for response in responses]
    if not is_listed(masks) or len(masks) != len(responses):
        count = len(masks) if is_listed(masks) else type(masks).__name__
        raise ValueError(f"got {count} response masks for {len(responses)} responses; give one per response")
    for i, (mask, response) in enumerate(zip(masks, responses, strict=True)):
        if not isinstance(mask, Tensor) or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"response mask {i} is {mask!r}; expected a tensor of 0 and 1, 1 where it is trained on")
        if tuple(mask.shape) != tuple(response.shape):
            raise ValueError(
                f"response mask {i} has shape {tuple(mask.shape)}, its response {tuple(response.shape)}; "
                "a mask has one entry per response token, 1 where it is trained on"
            )
    return [mask.bool().cpu() for mask in masks]


def _check_pairs(
    queries: Sequence[Any],
    responses: Sequence[Any],
    vocabularies: tuple[int, int],
    context: int | None,
    prefix: Tensor | None,
) -> None:
    if len(queries) != len(responses):
        raise ValueError(f"got {len(queries)} queries and {len(responses)} responses; give one response per query")
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        _check_tokens(f"query {i}", query, vocabularies[0])
        _check_tokens(f"response {i}", response, vocabularies[1])
        _check_room(i, query, response, prefix, context)
    if prefix is not None and not isinstance(responses, Rollout):
        _check_starts(responses, int(prefix[0]))


def _check_starts(responses: Any, start: int) -> None:
    """Refuse responses as transformers' `generate` returns them: all with the decoder's start token in front."""
    if all(len(response) > 1 and int(response[0]) == start for response in responses):
        raise ValueError(
            f"every response begins with {start}, the decoder's start token, which the model did not choose; pass "
            "response[1:], or what PPOTrainer.generate returns"
        )


def _check_room(i: int, query: Tensor, response: Tensor, prefix: Tensor | None, context: int | None) -> None:
    if not len(query):
        raise ValueError(f"query {i} is empty; it needs at least one token, such as the BOS token")
    if context is None:
        return
    if prefix is not None:
        longest = max(len(query), len(prefix) + len(response))
        if longest > context:
            raise ValueError(
                f"query {i} and its response have {len(query)} and {len(prefix)} + {len(response)} tokens, but encoder "
                f"and decoder have room for {context} each; drop the sample, or shorten the query or the response"
            )
    elif len(query) + len(response) > context:
        raise ValueError(
            f"query {i} and its response have {len(query)} + {len(response)} tokens, but the model's context is "
            f"{context}; drop the sample, or shorten the query or the response"
        )


def _check_tokens(name: str, tokens: Any, vocabulary: int) -> None:
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{name} must be a tensor of token ids, got {type(tokens).__name__}")
    if tokens.dim() != 1 or tokens.dtype not in _INTEGERS:
        raise ValueError(
            f"{name} must be a 1-D tensor of integers, got shape {tuple(tokens.shape)} of {tokens.dtype}; "
            "squeeze() removes the batch dimension that a single generate returns"
        )
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(f"{name} has token ids {int(tokens.min())}..{int(tokens.max())}, outside 0..{vocabulary - 1}")


def _warn_of_dropped(scores: Tensor, masks: list[Tensor]) -> None:
    unscored = int(scores.isnan().sum())
    untrained = sum(not bool(mask.any()) for mask in masks)
    dropped = sum(bool(s.isnan()) or not bool(m.any()) for s, m in zip(scores, masks, strict=True))
    counts = f"{unscored} without a score (None or NaN), {untrained} empty or masked out entirely"
    if dropped == len(masks):
        raise ValueError(f"none of {len(masks)} responses can be trained on: {counts}")
    if dropped:
        warnings.warn(f"left {dropped} of {len(masks)} responses out of this update: {counts}", stacklevel=4)

"""Prompts on their way in: texts, chats and ids become tensors, and what cannot be served is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.models.network import causal_lm, context_length, prompt_length
from fastppo.models.seq2seq import decoder_prefix
from fastppo.rules import holds, is_count


def settings(
    sampling: SamplingConfig | None, n: int, limits: int | Sequence[int] | None, generation_kwargs: dict[str, Any]
) -> tuple[SamplingConfig, int, Sequence[int] | None]:
    """Return how to draw, the responses to each prompt, and the prompts' own limits, if any. Raises ValueError."""
    if sampling is not None and not isinstance(sampling, SamplingConfig):
        raise ValueError(
            f"sampling is a {type(sampling).__name__}, expected a SamplingConfig; transformers' names are taken as "
            "keyword arguments, such as temperature=0.7"
        )
    given = generation_kwargs.pop("num_return_sequences", None)
    n = n if given is None else given
    if not holds(is_count, n):
        raise ValueError(f"n (num_return_sequences) is {n!r}; expected a whole number of responses to a prompt, from 1")
    own = None if isinstance(limits, Real) else cast("Sequence[int] | None", limits)
    if limits is not None and own is None:
        generation_kwargs["max_new_tokens"] = limits
    if sampling is not None and generation_kwargs:
        raise ValueError(f"got sampling and also {sorted(generation_kwargs)}; put all of it into the SamplingConfig")
    if sampling is None and own is not None:
        _check_limits(own)
        # The smallest number of tokens is held against the largest that a prompt may get.
        generation_kwargs["max_new_tokens"] = max([SamplingConfig.max_new_tokens, *map(int, own)])
    return sampling or SamplingConfig.from_generation_kwargs(**generation_kwargs), n, own


def encode(prompts: Sequence[Any], model: Any, tokenizer: Any, is_continued: bool = False) -> list[Tensor]:
    """Return prompts as 1-D int64 tensors on the model's device. Raises ValueError for what is no list of prompts.

    Texts that continue others are encoded without the special tokens that a tokenizer puts around a whole text.
    """
    if isinstance(prompts, (str, Tensor)):
        raise ValueError(f"prompts must be a list of prompts, got one {type(prompts).__name__}; wrap it in a list")
    if isinstance(prompts, Mapping):
        raise ValueError(
            f"prompts must be a list of prompts, got a {type(prompts).__name__} with {list(prompts)}; pass the lists "
            "of token ids in it, without padding"
        )
    inner = causal_lm(model)
    ids = [_encode(prompt, tokenizer, is_continued).to(inner.device) for prompt in prompts]
    _check_vocabulary(ids, len(inner.get_input_embeddings().weight))
    return ids


def _encode(prompt: Any, tokenizer: Any, is_continued: bool) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.is_floating_point():
            raise ValueError(
                f"a prompt must be a 1-D tensor of token ids, got shape {tuple(prompt.shape)} of {prompt.dtype}; "
                "pass one tensor per prompt"
            )
        return prompt.long()
    is_text = isinstance(prompt, str)
    if isinstance(prompt, Mapping) or not hasattr(prompt, "__len__"):
        raise ValueError(
            f"a prompt is {prompt!r} of type {type(prompt).__name__}; expected a text, a chat or token ids"
        )
    if is_text or (len(prompt) > 0 and isinstance(prompt[0], dict)):
        if tokenizer is None:
            raise ValueError("text and chat prompts need a tokenizer; pass one to the engine, or pass token ids")
        if is_text:
            options = {"add_special_tokens": False} if is_continued else {}
            return torch.tensor(tokenizer(prompt, **options)["input_ids"], dtype=torch.int64)
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    try:
        given = torch.tensor(list(prompt)) if len(prompt) else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a prompt is {prompt!r}; expected a text, a chat or token ids") from error
    return _encode(given, tokenizer, is_continued)  # which refuses fractions and lists of lists


def _check_vocabulary(ids: list[Tensor], vocabulary: int) -> None:
    if not any(len(prompt) for prompt in ids):
        return
    outside = ((together := torch.cat(ids)) < 0) | (together >= vocabulary)
    if bool(outside.any()):  # one question to the device for all prompts
        number = next(i for i, part in enumerate(outside.split([len(prompt) for prompt in ids])) if bool(part.any()))
        raise ValueError(
            f"prompt {number} has the token ids {ids[number].tolist()}, outside 0..{vocabulary - 1}; "
            "use the tokenizer that belongs to the model"
        )


def check(ids: Sequence[Tensor], limits: Sequence[int], model: Any) -> None:
    """Raise ValueError for no prompts, empty ones, and those that do not fit the context with their limits."""
    if not ids:
        raise ValueError("there is nothing to generate from: the list of prompts is empty")
    if len(limits) != len(ids):
        raise ValueError(f"max_new_tokens must give a positive limit for each of {len(ids)} prompts, got {limits}")
    _check_limits(limits)
    context = prompt_length(model)
    for number, (prompt, limit) in enumerate(zip(ids, limits, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; it needs at least one token, such as the BOS token")
        room = room_for_prompt(model, limit)
        if room is not None and len(prompt) > room:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens and may get {limit} new ones, but the model's context "
                f"is {context}; shorten or drop the prompt, or lower max_new_tokens"
            )


def _check_limits(limits: Sequence[int]) -> None:
    wrong = [limit for limit in limits if not holds(is_count, limit)]
    if wrong:
        raise ValueError(f"max_new_tokens must give each prompt a positive limit, a whole number, got {wrong[0]!r}")


def room_for_prompt(model: Any, new_tokens: int) -> int | None:
    """Return how many tokens a prompt may have that gets so many new ones, or None for no limit.

    The new ones of an encoder-decoder are its decoder's alone. Raises ValueError if they do not fit that.
    """
    context, prefix = context_length(model), decoder_prefix(model)
    if context is None or prefix is None:
        return None if context is None else context - new_tokens
    if len(prefix) + new_tokens > context:
        raise ValueError(
            f"max_new_tokens={new_tokens}, but the decoder has room for {context - len(prefix)}; lower max_new_tokens"
        )
    return prompt_length(model)

"""Prompts on their way in: texts, chats and ids become tensors, and what cannot be served is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.models.network import causal_lm
from fastppo.models.seq2seq import decoder_prefix


def encode(prompts: Sequence[Any], model: Any, tokenizer: Any) -> list[Tensor]:
    """Return prompts as 1-D int64 tensors on the model's device. Raises ValueError for what is no list of prompts."""
    if isinstance(prompts, (str, Tensor)):
        raise ValueError(f"prompts must be a list of prompts, got one {type(prompts).__name__}; wrap it in a list")
    inner = causal_lm(model)
    ids = [_encode(prompt, tokenizer).to(inner.device) for prompt in prompts]
    _check_vocabulary(ids, len(inner.get_input_embeddings().weight))
    return ids


def _encode(prompt: Any, tokenizer: Any) -> Tensor:
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
            return torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.int64)
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    return torch.tensor(list(prompt), dtype=torch.int64)


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
    if len(limits) != len(ids) or min(limits) < 1:
        raise ValueError(f"max_new_tokens must give a positive limit for each of {len(ids)} prompts, got {limits}")
    context = context_length(model)
    for number, (prompt, limit) in enumerate(zip(ids, limits, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; it needs at least one token, such as the BOS token")
        room = room_for_prompt(model, limit)
        if room is not None and len(prompt) > room:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens and may get {limit} new ones, but the model's context "
                f"is {context}; shorten or drop the prompt, or lower max_new_tokens"
            )


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
    return context


def context_length(model: Any) -> int | None:
    """Return the number of positions that the model was made for, or None if it sets no limit."""
    config = causal_lm(model).config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length is not None and length > 0 else None

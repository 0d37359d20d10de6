"""Continuous batching over a transformers model: a fixed number of rows, refilled as responses end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fastppo import ops
from fastppo.config import SamplingConfig
from fastppo.engine.cache import WindowCache, check_kind
from fastppo.engine.requests import Draw, Requests, Rows
from fastppo.engine.stopping import Stopping, end_ids
from fastppo.models.network import LanguageHead, causal_lm, evaluating, language_head, last_hidden, weight_version
from fastppo.types import Rollout


class Engine:
    """Generates from a model in memory, value head included if it has one, and records what it drew.

    Args:
        model: a causal language model, plain, wrapped with a value head, or with a PEFT adapter.
        tokenizer: needed for text prompts, chats and stop strings.
        max_rows: responses generated at the same time; more prompts wait for a free row.
        seed: of the random numbers; each is a function of the seed, the request's number and the token's position.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, max_rows: int = 128, seed: int = 0):
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.seed = max_rows, seed
        self.num_requests = 0  # requests served so far: the number of the next one

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Any],
        sampling: SamplingConfig | None = None,
        n: int = 1,
        *,
        max_new_tokens: Sequence[int] | None = None,
    ) -> Rollout:
        """Generate `n` responses to each prompt.

        Args:
            prompts: texts, chats (lists of messages), lists of token ids, or 1-D int64 tensors.
            sampling: how to draw; by default `SamplingConfig()`.
            max_new_tokens: a limit for each prompt, in place of the one in `sampling`.

        Returns:
            A `Rollout` of len(prompts) * n responses, the n of a prompt side by side.

        Raises:
            ValueError: an empty prompt, or one that does not fit the model's context together with its response.
            FloatingPointError: the model's logits are not finite.
            NotImplementedError: the model keeps a recurrent state between tokens.
        """
        sampling = sampling or SamplingConfig()
        ids = [prompt for prompt in self.encode(prompts) for _ in range(n)]
        limits = list(max_new_tokens) if max_new_tokens is not None else [sampling.max_new_tokens] * len(prompts)
        limits = [limit for limit in limits for _ in range(n)]
        self._check(ids, limits)
        requests = Requests(ids, limits, self.seed if sampling.seed is None else sampling.seed, self.num_requests)
        self.num_requests += len(ids)
        inner = causal_lm(self.model)
        check_kind(inner)
        stopping = Stopping(sampling, end_ids(inner, self.tokenizer), self.tokenizer)
        with evaluating(self.model):
            _Decoder(self.model, requests, sampling, stopping, self.max_rows).run()
        return requests.rollout(sampling.temperature if sampling.do_sample else 1.0, weight_version(self.model))

    def encode(self, prompts: Sequence[Any]) -> list[Tensor]:
        """Return the prompts as 1-D int64 tensors on the model's device."""
        if isinstance(prompts, (str, Tensor)):
            raise ValueError(f"prompts must be a list of prompts, got one {type(prompts).__name__}; wrap it in a list")
        inner = causal_lm(self.model)
        ids = [self._encode(prompt).to(inner.device) for prompt in prompts]
        _check_vocabulary(ids, len(inner.get_input_embeddings().weight))
        return ids

    def _encode(self, prompt: Any) -> Tensor:
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
            if self.tokenizer is None:
                raise ValueError("text and chat prompts need a tokenizer; pass one to the engine, or pass token ids")
            if is_text:
                return torch.tensor(self.tokenizer(prompt)["input_ids"], dtype=torch.int64)
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        return torch.tensor(list(prompt), dtype=torch.int64)

    def _check(self, ids: list[Tensor], limits: list[int]) -> None:
        if not ids:
            raise ValueError("there is nothing to generate from: the list of prompts is empty")
        if len(limits) != len(ids) or min(limits) < 1:
            raise ValueError(f"max_new_tokens must give a positive limit for each of {len(ids)} prompts, got {limits}")
        context = context_length(self.model)
        for number, (prompt, limit) in enumerate(zip(ids, limits, strict=True)):
            if not len(prompt):
                raise ValueError(f"prompt {number} is empty; it needs at least one token, such as the BOS token")
            if context is not None and len(prompt) + limit > context:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens and may get {limit} new ones, but the model's context "
                    f"is {context}; shorten or drop the prompt, or lower max_new_tokens"
                )


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


def context_length(model: Any) -> int | None:
    """Return the number of positions that the model was made for, or None if it sets no limit."""
    config = causal_lm(model).config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length is not None and length > 0 else None


class _Decoder:
    """One generate call: admit, decode, draw, until nobody is left."""

    def __init__(self, model: Any, requests: Requests, sampling: SamplingConfig, stopping: Stopping, max_rows: int):
        self.model, self.requests, self.sampling, self.stopping = model, requests, sampling, stopping
        self.rows = Rows(len(requests.prompts), max_rows)
        self.cache = WindowCache()
        self.last_tokens = [0] * len(requests.prompts)
        self.head: LanguageHead = language_head(model)
        # Computed as the update will compute them, for recorded log-probs to be the update's.
        self.logits = ops.LogitBuffer(self.head.weight, self.head.bias, min(len(requests.prompts), max_rows))
        self.value_head = getattr(model, "v_head", None)
        self.device = causal_lm(model).device
        possible = sorted(end for end in stopping.ids if 0 <= end < len(self.head.weight))
        self.end_ids = torch.tensor(possible, dtype=torch.int64, device=self.device)

    def run(self) -> None:
        while self.rows.waiting or self.rows.active:
            while self.rows.has_room:
                self._admit()
            if self.rows.active:
                self._decode()
            stay = self.rows.compact()
            if stay is not None:
                self.cache.keep(stay)

    def _admit(self) -> None:
        """Prefill waiting prompts, seat them in free rows, and draw their first tokens."""
        requests, rows = self.rows.admit()
        prompts = [self.requests.prompts[request] for request in requests]
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        cache = DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        hidden = self._forward(ids, mask, positions, cache)
        check_kind(causal_lm(self.model), cache)
        self.cache.admit(cache, lengths, rows)
        self._draw(hidden, requests, rows)

    def _decode(self) -> None:
        """Run one step of all rows, free ones included, and draw a token for each active one."""
        self.cache.make_room()
        last = [0 if request is None else self.last_tokens[request] for request in self.rows.occupants]
        ids = torch.tensor(last, device=self.device)[:, None]
        positions = torch.tensor(self.cache.lengths, device=self.device)[:, None]
        mask = self.cache.mask(self.device)
        hidden = self._forward(ids, mask, positions, self.cache)
        self.cache.advance()
        active = self.rows.active
        if len(active) < len(last):
            hidden = hidden[torch.tensor(active, device=self.device)]
        self._draw(hidden, self.rows.requests, active)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return last_hidden(self.model, **inputs, use_cache=True)[:, -1]

    def _draw(self, hidden: Tensor, requests: list[int], rows: list[int]) -> None:
        draw = self._sample(hidden, requests)
        self.requests.record(requests, draw)
        for request, row, token in zip(requests, rows, draw.tokens.tolist(), strict=True):
            self.last_tokens[request] = token
            self.requests.finished[request] = self.stopping.has_ended(token, self.requests.response(request))
            if self.requests.finished[request] or self.requests.drawn[request] >= self.requests.limits[request]:
                self.rows.leave(row)
                self.cache.release(row)

    def _sample(self, hidden: Tensor, requests: list[int]) -> Draw:
        sampling, head = self.sampling, self.head
        result = ops.sample_tokens(
            self.logits.fill(hidden),
            self.requests.seed,
            *self.requests.places(requests),
            temperature=sampling.temperature if sampling.do_sample else 1.0,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            greedy=not sampling.do_sample,
            **self._forbidden(requests),
        )
        values = None if self.value_head is None else self.value_head(hidden).squeeze(-1)
        return Draw(*result, values)

    def _forbidden(self, requests: list[int]) -> dict[str, Tensor]:
        """Name the rows that are too short to end, and the ids that would end them."""
        is_early = [self.requests.drawn[request] < self.sampling.min_new_tokens for request in requests]
        if not any(is_early) or not len(self.end_ids):
            return {}
        return {"forbidden_ids": self.end_ids, "is_forbidden": torch.tensor(is_early, device=self.device)}

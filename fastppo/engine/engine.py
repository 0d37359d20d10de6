"""Generation from a model in memory: batches, streams, episodes of several turns, and scores of given responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.engine import prompts as incoming
from fastppo.engine.call import Call, OnResponse, Stream
from fastppo.engine.graphs import GraphStep
from fastppo.engine.kv import PagedCache
from fastppo.engine.loop import loop_of
from fastppo.engine.paged import PagedDecoder
from fastppo.engine.requests import Places, Requests
from fastppo.engine.sampler import Sampler
from fastppo.engine.score import Scores, score
from fastppo.engine.steps import DecodeStep, exact_program_step, program_step
from fastppo.engine.stopping import Stopping, end_ids
from fastppo.engine.tiers import slower_decoder
from fastppo.engine.windowed import WindowDecoder
from fastppo.models import probe
from fastppo.models.exact import NOT_EXACT, exact_linears
from fastppo.models.loading import adopt_quantised
from fastppo.models.network import causal_lm, is_encoder_decoder, weight_version
from fastppo.ops.attention import has_paged_kernels
from fastppo.rules import holds, is_count
from fastppo.types import Rollout

# Tokens drawn before the host looks at them: it waits for the device, and after a token that ends its response, half
# of them are for nothing. On the CPU there is nobody to wait for.
STEPS_PER_CHECK = {"cuda": 8}


class Engine:
    """Generates from a model in memory, value head included if it has one, and records what it drew.

    Args:
        model: a causal language model or an encoder-decoder, plain, wrapped with a value head, or with a PEFT adapter.
        tokenizer: needed for text prompts, chats and stop strings.
        max_rows: responses generated at the same time; more prompts wait for a free row.
        seed: of the random numbers; each is a function of the seed, the request's number and the token's position.
        kv_memory: bytes that keys and values may take during a call; None for a quarter of the free memory.
        prefill_tokens: prompt tokens in a forward pass, at most; longer prompts are cut into chunks.
        consistency: "bounded", as fast as it goes, or "exact": recorded log-probs are those that the update computes,
            to the last bit; on the CPU.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_rows: int = 128,
        seed: int = 0,
        kv_memory: int | None = None,
        prefill_tokens: int = 2048,
        consistency: str = "bounded",
    ):
        if consistency not in ("bounded", "exact"):
            raise ValueError(f"consistency must be 'bounded' or 'exact', got {consistency!r}")
        self.is_exact = consistency == "exact"
        bounds = {"max_rows": max_rows, "prefill_tokens": prefill_tokens, "kv_memory": kv_memory}
        for name, value in bounds.items():
            if not holds(is_count, value) and (name, value) != ("kv_memory", None):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        adopt_quantised(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.seed = max_rows, seed
        self.kv_memory, self.prefill_tokens = kv_memory, prefill_tokens
        self.num_requests = 0  # requests served so far: the number of the next one
        self._cache: PagedCache | None = None
        self._program: DecodeStep | None = None
        self._built_for: list[Any] = []  # what the program was built for
        self._call: Call | None = None
        self._metrics: dict[str, Any] = {}

    def generate(
        self,
        prompts: Sequence[Any],
        sampling: SamplingConfig | None = None,
        n: int = 1,
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        keep: bool = False,
        on_response: OnResponse | None = None,
        **generation_kwargs: Any,
    ) -> Rollout:
        """Generate `n` responses to each prompt; the prompt itself is computed once.

        Args:
            prompts: texts, chats (lists of messages), lists of token ids, or 1-D int64 tensors.
            sampling: how to draw; by default `SamplingConfig()`.
            n: responses to each prompt.
            max_new_tokens: a limit for each prompt, in place of the one in `sampling`.
            keep: hold keys and values for `continue_`, until `release` or until the weights change; where the model
                cannot use the paged cache, turns are computed from their beginning.
            on_response: called with the place and the token ids of each response that has ended, while others go on;
                it must leave model and engine alone.
            generation_kwargs: transformers' generation arguments, in place of `sampling`.

        Returns:
            A `Rollout` of len(prompts) * n responses, the n of a prompt side by side.

        Raises:
            ValueError: an empty prompt, or one that does not fit the model's context together with its response, or
                `kv_memory`.
            FloatingPointError: the model's logits are not finite.
        """
        call = self._start(prompts, sampling, n, max_new_tokens, keep, generation_kwargs)
        call.run(on_response=on_response)
        return call.rollout()

    def stream(
        self,
        prompts: Sequence[Any],
        sampling: SamplingConfig | None = None,
        n: int = 1,
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        keep: bool = False,
        **generation_kwargs: Any,
    ) -> Stream:
        """Return an iterator over tokens as they are drawn; see `generate` for the arguments.

        No other call may be made, and no weight changed, until it has ended or is closed.
        """
        call = self._start(prompts, sampling, n, max_new_tokens, keep, generation_kwargs)
        return Stream(call, self.tokenizer)

    def continue_(
        self,
        rollout: Rollout,
        new_tokens: Sequence[Any],
        sampling: SamplingConfig | None = None,
        n: int = 1,
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        keep: bool = False,
        **generation_kwargs: Any,
    ) -> Rollout:
        """Generate the next turn after each response and the tokens that follow it, such as a tool's output.

        Args:
            rollout: of an earlier call. What was kept of it is not computed again while the weights are the same; a
                response may have been edited or cut.
            new_tokens: for each response, 1-D token ids or a text, which gets no special tokens; may be empty.
            n: turns after each response; with several, each gets a request number of its own.

        Returns:
            A `Rollout` whose queries are the episodes so far. It draws what one long call would have drawn after these
            tokens. For the other arguments and errors see `generate`.
        """
        if is_encoder_decoder(self.model):
            raise ValueError(
                f"{type(causal_lm(self.model)).__name__} is an encoder-decoder, whose response is not part of what the "
                "next one follows; put the episode so far into the prompt and call generate"
            )
        if not isinstance(rollout, Rollout):  # a slice of one is a list
            raise ValueError(f"rollout is a {type(rollout).__name__}, expected a whole Rollout as generate returns it")
        if len(new_tokens) != len(rollout):
            raise ValueError(f"got new tokens for {len(new_tokens)} responses, but the rollout has {len(rollout)}")
        added = incoming.encode(new_tokens, self.model, self.tokenizer, is_continued=True)
        parts = list(zip(rollout.queries, rollout, added, strict=True))
        starts = [start + len(part[1]) + len(part[2]) for start, part in zip(rollout.starts, parts, strict=True)]
        places = Places(rollout.requests, tuple(starts), rollout.requests)
        prompts = [torch.cat(part) for part in parts]
        call = self._start(prompts, sampling, n, max_new_tokens, keep, generation_kwargs, places)
        call.run()
        return call.rollout()

    def open(
        self, prompts: Sequence[Any], sampling: SamplingConfig, limits: Sequence[int], places: Places | None = None
    ) -> Call:
        """Return a call of which no step has been run, which may be extended, and keeps keys and values.

        With `places` it goes on with requests of earlier calls; `limits` are each prompt's new tokens, at most.
        """
        return self._start(prompts, sampling, 1, limits, True, {}, places)

    def score(self, queries: Sequence[Any], responses: Sequence[Any], *, temperature: float = 1.0) -> Scores:
        """Return log-probs, entropies and values of given responses, one to each query, at a temperature.

        Queries are given as prompts are to `generate`, responses as texts, without special tokens where they go on with
        the query, or token ids. Raises ValueError.
        """
        is_continued = not is_encoder_decoder(self.model)  # where decoders begin anew, so do texts
        answers = incoming.encode(responses, self.model, self.tokenizer, is_continued)
        return score(self.model, self.encode(queries), answers, temperature, self.prefill_tokens)

    def cancel(self, requests: Iterable[int] | None = None) -> None:
        """End responses of the call under way, all if None, by their places in its list: from a stream's consumer or
        another thread. They are returned as far as they got, up to 16 tokens later, with the reason "cancelled".
        """
        call = self._call
        if call is not None:
            call.requests.ask_to_cancel(requests)

    @property
    def kv_tensors(self) -> list[Tensor]:
        """Keys and values that the paged cache holds now: those of a call under way, and those that are kept."""
        return [] if self._cache is None else [part for pool in self._cache.pools.values() for part in pool]

    def release(self, requests: Iterable[int] | None = None) -> None:
        """Give back the memory of what was kept: of everything, or of the requests of these numbers."""
        if self._cache is not None and self._call is None:
            self._cache.drop(list(self._cache.kept) if requests is None else requests)

    def metrics(self) -> dict[str, Any]:
        """Return what the last call cost: tokens, steps, blocks, bytes, preemptions and seconds."""
        return self._metrics if self._call is None else self._call.decoder.metrics()

    def encode(self, prompts: Sequence[Any]) -> list[Tensor]:
        """Return the prompts as 1-D int64 tensors on the model's device."""
        return incoming.encode(prompts, self.model, self.tokenizer)

    def _start(
        self,
        prompts: Sequence[Any],
        sampling: SamplingConfig | None,
        n: int,
        max_new_tokens: int | Sequence[int] | None,
        keep: bool,
        generation_kwargs: dict[str, Any],
        places: Places | None = None,
    ) -> Call:
        """Check everything and return the call, of which no step has been run."""
        if self._call is not None:
            raise RuntimeError("a stream of this engine is open; read it to its end or close it first")
        sampling, n, max_new_tokens = incoming.settings(sampling, n, max_new_tokens, generation_kwargs)
        ids = self.encode(prompts)
        limits = [sampling.max_new_tokens] * len(ids) if max_new_tokens is None else list(max_new_tokens)
        ids, limits = [one for one in ids for _ in range(n)], [limit for limit in limits for _ in range(n)]
        incoming.check(ids, limits, self.model)
        first, inner = self.num_requests, causal_lm(self.model)
        if places is None or n > 1:
            starts, sources = ([0] * len(prompts), []) if places is None else (places.starts, places.sources)
            numbers = range(first, first + len(ids))
            first = first + len(ids)
            starts = [start for start in starts for _ in range(n)]
            places = Places(tuple(numbers), tuple(starts), tuple([s for s in sources for _ in range(n)] or numbers))
        seed = self.seed if sampling.seed is None else sampling.seed
        stopping = Stopping(sampling, end_ids(inner, self.tokenizer), self.tokenizer)
        requests = Requests(ids, limits, seed, places, stopping)
        with exact_linears(self.model) if self.is_exact else nullcontext():
            sampler = Sampler(self.model, requests, sampling, min(len(ids), self.max_rows))
            decoder = self._decoder(requests, sampler, keep)
        self.num_requests = first
        temperature = sampling.temperature if sampling.do_sample else 1.0
        self._call = Call(self.model, requests, decoder, temperature, self._finish, self.is_exact)
        return self._call

    def _decoder(self, requests: Requests, sampler: Sampler, keep: bool) -> PagedDecoder | WindowDecoder:
        """Return the fastest decoder that is right for the model."""
        inner = causal_lm(self.model)
        if not has_paged_kernels(inner.device) or not probe.paged(self.model):
            if self.is_exact:
                raise NotImplementedError(f"{type(inner).__name__} cannot be decoded row by row: {NOT_EXACT}")
            decoder = slower_decoder(self.model, self.prefill_tokens)
            return decoder(self.model, requests, sampler, self.max_rows)
        like = inner.get_input_embeddings().weight
        cache = self._cache
        if cache is None or (cache.like.dtype, cache.like.device) != (like.dtype, like.device):
            cache = PagedCache(probe.layer_shapes(self.model), like, self.kv_memory)
        self._cache = cache
        if keep or cache.kept:
            version = weight_version(self.model)
            if version != cache.version:
                cache.release()  # computed with other weights
            cache.version = version
        program = self._decode_step(cache)
        return PagedDecoder(
            self.model,
            requests,
            sampler,
            cache,
            max_rows=self.max_rows,
            prefill_tokens=self.prefill_tokens,
            keep=keep,
            program=program,
            steps_per_check=STEPS_PER_CHECK.get(like.device.type, 1),
            loop=loop_of(program, sampler),
        )

    def _decode_step(self, cache: PagedCache) -> DecodeStep | None:
        """Return CUDA graphs, or the C++ program if the model has one, with the weights and adapters of this moment."""
        parts = [cache, *self.model.modules()]  # PEFT puts layers of its own in the places of others
        if parts != self._built_for:
            step = exact_program_step if self.is_exact else GraphStep if cache.like.is_cuda else program_step
            self._built_for, self._program = parts, step(self.model, cache)
        return self._program if self._program is not None and self._program.refresh() else None

    def _finish(self) -> None:
        if self._call is not None:
            self._metrics, self._call = self._call.decoder.metrics(), None

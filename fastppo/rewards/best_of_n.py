"""Best of n: generate several candidates for each prompt and keep those that score best."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.engine.engine import Engine
from fastppo.reward_models import is_pipeline
from fastppo.rewards.policy import Guarded
from fastppo.rewards.reward import Reward
from fastppo.types import Rollout

# GenerationConfig entries that say nothing about how to sample.
_NOT_SAMPLING = ("transformers_version", "_from_model_config", "max_length", "max_new_tokens")


class BestOfNSampler:
    """Generates `sample_size` candidates for each prompt, whose keys and values they share, and returns the best.

    Args:
        model: a causal language model, with or without a value head.
        tokenizer: its tokenizer.
        queries_to_scores: a function of one argument, called with the list of whole texts (prompt and completion) as in
            TRL; or any reward that `PPOTrainer.train` takes, or a list of rewards.
        length_sampler: draws max_new_tokens for each prompt.
        sample_size: candidates for each prompt.
        seed: of the random numbers; None draws one from torch's global generator.
        n_candidates: texts returned for each prompt.
        generation_config: a transformers GenerationConfig; without one all of the distribution is sampled from.

    Raises ValueError for arguments that cannot work.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        queries_to_scores: Any,
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: Any = None,
    ):
        if tokenizer is None or not hasattr(tokenizer, "batch_decode"):
            raise ValueError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(
                f"n_candidates must be from 1 to sample_size ({sample_size}), got {n_candidates}; raise sample_size"
            )
        if not callable(length_sampler):
            raise ValueError(f"length_sampler must be a function without arguments, got {length_sampler!r}")
        self.sample_size, self.n_candidates, self.length_sampler = sample_size, n_candidates, length_sampler
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer, seed=int(torch.randint(2**31, ())) if seed is None else seed)
        self._takes_texts = _takes_texts(queries_to_scores)
        reward = _of_texts(queries_to_scores) if self._takes_texts else queries_to_scores
        self._reward = Reward(reward, tokenizer=tokenizer)
        given = {} if generation_config is None else generation_config.to_diff_dict()
        self.generation_kwargs = {name: value for name, value in given.items() if name not in _NOT_SAMPLING}

    def generate(
        self,
        tokenized_query: Any,
        skip_special_tokens: bool = True,
        device: Any = None,
        *,
        return_scores: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Return the `n_candidates` best texts, prompt included, for each query, the best first.

        Args:
            tokenized_query: token ids or a text, or a list of these; one query is answered as a list of one.
            skip_special_tokens: leave special tokens out of the texts.
            device: accepted and not needed: the engine runs where the model is.
            return_scores: return (texts, scores), lists of the same shape.
            generation_kwargs: transformers' generation arguments; they override `generation_config`.

        A query has fewer texts where the reward gave no score. Raises ValueError if it gave none at all.
        """
        del device
        queries = _as_list(tokenized_query)
        kwargs = {"do_sample": True} | self.generation_kwargs | generation_kwargs
        for name, owner in (("max_new_tokens", "length_sampler"), ("num_return_sequences", "sample_size")):
            if name in kwargs:
                raise ValueError(f"{name}={kwargs[name]!r} is for the sampler's {owner} to say; set that instead")
        if not kwargs["do_sample"] and self.sample_size > 1:
            raise ValueError(
                f"do_sample=False draws the same text {self.sample_size} times; leave it out, or set sample_size=1"
            )
        limits = [int(self.length_sampler()) for _ in queries]
        rollout = self.engine.generate(queries, n=self.sample_size, max_new_tokens=limits, **kwargs)
        texts = self._decode(
            [torch.cat(pair) for pair in zip(rollout.queries, rollout, strict=True)], skip_special_tokens
        )
        chosen = self._choose(self._score(rollout, texts))
        best = [[texts[i] for i, _ in group] for group in chosen]
        return (best, [[score for _, score in group] for group in chosen]) if return_scores else best

    def _score(self, rollout: Rollout, texts: list[str]) -> Tensor:
        """Return the candidates' scores, (queries * sample_size,) fp32, NaN for those without one."""
        if self._takes_texts:
            return self._reward([""] * len(texts), texts, {})
        ids = {"prompt_ids": rollout.queries, "completion_ids": rollout}
        columns = {name: [part.tolist() for part in parts] for name, parts in ids.items()}
        return self._reward(self._decode(rollout.queries), self._decode(rollout), columns)

    def _decode(self, sequences: Sequence[Tensor], skip_special_tokens: bool = True) -> list[str]:
        ids = [sequence.tolist() for sequence in sequences]
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)
        return texts

    def _choose(self, scores: Tensor) -> list[list[tuple[int, float]]]:
        """Return the places and scores of each query's best candidates; of equals the first drawn comes first."""
        chosen = []
        for query, group in enumerate(scores.view(-1, self.sample_size).tolist()):
            known = [(query * self.sample_size + i, score) for i, score in enumerate(group) if not math.isnan(score)]
            if not known:
                raise ValueError(f"none of the {self.sample_size} candidates of query {query} has a score")
            chosen.append(sorted(known, key=lambda pair: -pair[1])[: self.n_candidates])
        return chosen


def _as_list(given: Any) -> list[Any]:
    """Return queries as a list of them: a single one is a text, a 1-D tensor, or a list of token ids."""
    if isinstance(given, Tensor):
        return [given] if given.dim() == 1 else list(given)
    is_single = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    return [given] if is_single else list(given)


def _takes_texts(reward: Any) -> bool:
    """Whether something is a function of whole texts, TRL's kind: one parameter, which is not named otherwise."""
    function = reward.function if isinstance(reward, Guarded) else reward
    if isinstance(function, (list, tuple, torch.nn.Module)) or is_pipeline(function):
        return False
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1 and needed[0].name not in ("prompts", "completions", "prompt_ids", "completion_ids")


def _of_texts(reward: Any) -> Any:
    """Return a function of whole texts as a reward whose completions are the whole texts, under the same policy."""
    function = reward.function if isinstance(reward, Guarded) else reward

    def queries_to_scores(completions: list[str]) -> Any:
        return function(completions)

    queries_to_scores.__name__ = getattr(function, "__name__", type(function).__name__)
    return Guarded(queries_to_scores, reward.reward_policy) if isinstance(reward, Guarded) else queries_to_scores

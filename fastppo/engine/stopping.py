"""When a response ends: end-of-sequence tokens and stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastppo.config import SamplingConfig

# Tokens decoded in addition to one per character of the stop string: a token may be empty or a part of a character.
_SPARE_TOKENS = 8


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a response: the generation config's, the model's and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found.update(ids if isinstance(ids, Iterable) else [ids])
    return frozenset(found)


class Stopping:
    """Decides after each token whether its response has ended."""

    def __init__(self, sampling: SamplingConfig, default_ids: frozenset[int], tokenizer: Any):
        self.ids = default_ids if sampling.stop_ids is None else frozenset(sampling.stop_ids)
        self.strings, self.tokenizer = sampling.stop_strings, tokenizer
        if self.strings and tokenizer is None:
            raise ValueError(f"stop_strings={list(self.strings)} need a tokenizer; pass one to the engine")

    def has_ended(self, token: int, response: Sequence[int]) -> bool:
        """Whether the response, which ends in `token`, is complete."""
        if token in self.ids:
            return True
        if not self.strings:
            return False
        longest = max(len(string) for string in self.strings)
        text = self.tokenizer.decode(list(response[-(longest + _SPARE_TOKENS) :]))
        return any(string in text for string in self.strings)

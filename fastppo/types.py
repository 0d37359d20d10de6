"""The nouns that the stages of a PPO iteration hand to each other.

Axis letters: B samples, T trainable response tokens of all samples together, V vocabulary, H hidden size.
Everything per token is flat, (T,), in the order of the samples; `offsets` (B + 1,) says where each sample starts.
A token that is not trained on (masked out by the user) is not in the index at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Return the (B + 1,) int64 starts of B consecutive segments of the given lengths, and their end."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def segment_ids(offsets: Tensor) -> Tensor:
    """Return, for each of the T tokens, the number of the segment it lies in: (T,) int64."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


def edits_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to in place, or None where torch does not count (inference mode)."""
    return None if tensor.is_inference() else tensor._version


@dataclass(frozen=True, eq=False, repr=False)
class Rollout(list[Tensor]):
    """What the engine generated, and what it knew about every token when it drew it.

    It is also the list of the B responses, 1-D int64 tensors. Its records are believed by `PPOTrainer.step` only
    while neither the weights nor the tokens have changed since.
    """

    queries: tuple[Tensor, ...]  # B prompts, 1-D int64
    responses: tuple[Tensor, ...]  # B responses, 1-D int64: views of `tokens`
    tokens: Tensor  # (T,) int64, all responses one after the other
    logprobs: Tensor  # (T,) fp32, log-softmax over the full vocabulary at the sampling temperature
    entropies: Tensor  # (T,) fp32, of the same distribution, in nats
    kept_mass: Tensor  # (T,) fp32, probability that top-k, top-p and the minimum length left to choose from
    values: Tensor | None  # (T,) fp32, the value head's estimate before each token; None without a value head
    finished: Tensor  # (B,) bool, ended by an end-of-sequence token or a stop string rather than by its length
    reasons: tuple[str, ...]  # B, why each response ended: "stop", "length" or "cancelled"
    requests: tuple[int, ...]  # B numbers, of which the random numbers are functions
    starts: tuple[int, ...]  # B positions of the first tokens in their requests; above 0 after `Engine.continue_`
    temperature: float  # of the sampling distribution; 1.0 for greedy decoding
    weight_version: tuple[int, ...]  # fingerprint of the weights that drew it
    token_edits: int | None  # in-place writes that `tokens` had seen when the rollout was made; None if not counted

    def __post_init__(self) -> None:
        self.extend(self.responses)

    @property
    def offsets(self) -> Tensor:
        """Start of each response in the flat tensors, (B + 1,) int64."""
        return offsets_of([len(response) for response in self.responses])

    @property
    def is_untouched(self) -> bool:
        """Whether the responses are still those that were generated, and no token of theirs was written to."""
        are_same = len(self) == len(self.responses) and all(a is b for a, b in zip(self, self.responses, strict=True))
        return are_same and edits_of(self.tokens) == self.token_edits is not None

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat (T, ...) tensor into one view per response."""
        if len(flat) != len(self.tokens):
            raise ValueError(
                f"expected one entry per response token, {len(self.tokens)}, got {len(flat)}; "
                "pass one of the rollout's own flat tensors, or one of the same length"
            )
        return list(flat.split([len(response) for response in self.responses]))


@dataclass(frozen=True, eq=False)
class Samples:
    """The checked samples of one step: those that take part in the update."""

    queries: tuple[Tensor, ...]  # B prompts, 1-D int64, at least one token each
    responses: tuple[Tensor, ...]  # B responses, 1-D int64, at least one trainable token each
    rows: tuple[int, ...]  # position of each sample in the list that the user handed in
    num_given: int  # length of that list
    positions: Tensor  # (T,) int64, index of each trainable token within its response
    offsets: Tensor  # (B + 1,) int64 into the trainable tokens
    labels: Tensor  # (T,) int64, the trainable tokens
    ended: Tensor  # (B,) bool, the response ends in an end-of-sequence token
    temperature: float
    prefix: Tensor | None = None  # (P,) int64, the decoder's first tokens; None where the response follows its query

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def lengths(self) -> list[int]:
        """Tokens of query and response together, per sample."""
        return [len(q) + len(r) for q, r in zip(self.queries, self.responses, strict=True)]

    def start(self, row: int) -> int:
        """Return the number of tokens before a sample's response in the sequence that it is predicted in."""
        return len(self.queries[row] if self.prefix is None else self.prefix)

    def extents(self, row: int) -> tuple[int, ...]:
        """Return the tokens of a sample in each network that it passes through: one, or encoder and decoder."""
        if self.prefix is None:
            return (len(self.queries[row]) + len(self.responses[row]),)
        return len(self.queries[row]), len(self.prefix) + len(self.responses[row]) - 1

    def take(self, rows: Sequence[int]) -> Tensor:
        """Return the flat indices, (T',) int64, of the trainable tokens of the samples `rows`, in that order."""
        parts = [torch.arange(int(self.offsets[row]), int(self.offsets[row + 1])) for row in rows]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the policy, the critic and the reference say of the samples before the update."""

    logprobs: Tensor  # (T,) fp32, log π_old(token)
    ref_logprobs: Tensor  # (T,) fp32, log π_ref(token)
    values: Tensor  # (T,) fp32, V_old before each token
    exact_kl: Tensor | None  # (T,) fp32, KL(π_old || π_ref) over the vocabulary, for kl_penalty="full"
    is_recorded: bool  # log-probs and values were recorded while sampling
    importance: Tensor | None = None  # (T,) fp32, π_old over the recorded probability, where the records are refused


@dataclass(frozen=True, eq=False)
class Experience:
    """Everything that the update sees, frozen for all its epochs."""

    samples: Samples
    evaluation: Evaluation
    scores: Tensor  # (B,) fp32, after scaling, normalising and clipping
    rewards: Tensor  # (T,) fp32, KL penalty and, on the last token, the score
    penalties: Tensor  # (T,) fp32, the KL penalty alone
    advantages: Tensor  # (T,) fp32, whitened
    returns: Tensor  # (T,) fp32


@dataclass(frozen=True, eq=False)
class Minibatch:
    """The samples of one optimiser step, cut into forwards of similar length."""

    groups: tuple[tuple[int, ...], ...]  # sample numbers, one tuple per forward pass
    weights: Tensor  # (T,) fp32, weight of each token in the losses; sums to 1 over the minibatch
    is_first: bool  # no optimiser step has been taken since the old log-probs were recorded


@dataclass(frozen=True, eq=False)
class LossTerms:
    """The losses of one minibatch and their statistics: device scalars, TRL's names without the `ppo/` prefix."""

    stats: dict[str, Tensor]
    ratio: Tensor  # (T,) fp32, NaN where the minibatch has no token
    skipped: Tensor  # () bool, the optimiser step was not taken
    nonfinite: Tensor  # () bool, because a loss or a gradient was not finite

"""The loss-head benchmark's problem: shapes, inputs, the loss in plain torch, and the truth in fp64.

T tokens in B sequences, H hidden size, V vocabulary. Everybody minimises the same number: PPO's clipped loss with an
entropy bonus, or, where a library has no entropy or no PPO, as much of it as the library has.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 0.2
# Large for PPO: the entropy's share of the gradient must show above bf16's rounding when somebody loses it.
ENTROPY_COEF = 0.1
# Each is compared with the truth of its own objective.
PPO, PPO_ALONE, CROSS_ENTROPY = OBJECTIVES = ("ppo with entropy", "ppo", "cross-entropy")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The logits of the rows that the truth is computed from at a time, in fp64.
TRUTH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Case:
    """One problem to time: the sizes, the dtype, whether the head is trained, and where."""

    vocabulary: int
    tokens: int
    hidden: int
    sequences: int
    dtype: str = "fp32"
    is_trained: bool = True
    device: str = "cpu"

    def __str__(self) -> str:
        head = "trained" if self.is_trained else "frozen"
        return f"V {self.vocabulary}, T {self.tokens}, H {self.hidden}, {self.dtype}, {head}"

    def with_twice_the_tokens(self) -> "Case":
        """Return the same case with twice as many sequences."""
        return replace(self, tokens=2 * self.tokens, sequences=2 * self.sequences)


@dataclass(frozen=True)
class Problem:
    """The tensors of a case: hidden (T, H), weight (V, H); labels, old_logprobs, advantages and weights (T,)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    sequences: int

    def clear_gradients(self) -> None:
        """Drop the gradients of the run before."""
        self.hidden.grad = self.weight.grad = None

    def rows(self, rows: slice, hidden: Tensor, weight: Tensor) -> "Problem":
        """Return the problem of some rows with other leaves for hidden and weight."""
        vectors = (self.labels[rows], self.old_logprobs[rows], self.advantages[rows], self.weights[rows])
        return Problem(hidden[rows], weight, *vectors, sequences=1)


@dataclass(frozen=True)
class Outputs:
    """What a contender gives besides the gradients, all detached; None for what it does not give."""

    loss: Tensor
    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    row_losses: Tensor | None = None


def row_losses(problem: Problem, objective: str, logprobs: Tensor, entropies: Tensor | None) -> Tensor:
    """Return the weighted losses (T,) whose sum is minimised."""
    if objective == CROSS_ENTROPY:
        return -problem.weights * logprobs
    ratio = torch.exp(logprobs - problem.old_logprobs)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    policy = -torch.minimum(ratio * problem.advantages, clipped * problem.advantages)
    return problem.weights * (policy if entropies is None else policy - ENTROPY_COEF * entropies)


def logprobs_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels' log-probs (T,) and all of them (T, V), from all the logits at once."""
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.log_softmax(-1, dtype=wide)  # one pass for the cast and the softmax
    return logp.gather(-1, labels[:, None]).squeeze(-1), logp


def logprobs_and_entropies(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels' log-probs and the entropies, (T,) each."""
    logprobs, logp = logprobs_of(hidden, weight, labels)
    return logprobs, -(logp.exp() * logp).sum(-1)


def plain(problem: Problem, objective: str = PPO) -> Outputs:
    """Run plain torch forward and backward: the specification, and a contender."""
    inputs = (problem.hidden, problem.weight, problem.labels)
    if objective == PPO:
        return descend(problem, objective, *logprobs_and_entropies(*inputs))
    return descend(problem, objective, logprobs_of(*inputs)[0], None)


def descend(problem: Problem, objective: str, logprobs: Tensor, entropies: Tensor | None) -> Outputs:
    """Form the loss of log-probs and entropies (T,) and go backward."""
    losses = row_losses(problem, objective, logprobs, entropies)
    loss = losses.sum()
    loss.backward()
    parts = (loss, logprobs, entropies, losses)
    return Outputs(*(None if part is None else part.detach() for part in parts))  # type: ignore[arg-type]


def truth(problem: Problem, objective: str) -> tuple[Outputs, Tensor, Tensor]:
    """Return the outputs in fp64 with the gradients of hidden and weight, from the very inputs of the problem."""
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    step = _truth_rows(len(weight))
    starts = range(0, len(hidden), step)
    parts = [plain(problem.rows(slice(start, start + step), hidden, weight), objective) for start in starts]
    joined: list[Any] = []
    for name in ("logprobs", "entropies", "row_losses"):
        pieces = [getattr(part, name) for part in parts]
        joined.append(None if pieces[0] is None else torch.cat(pieces))
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outputs(joined[2].sum(), *joined), hidden.grad, weight.grad


def _truth_rows(vocabulary: int) -> int:
    return max(16, TRUTH_BYTES // (8 * vocabulary))


def _log_ratios(count: int, device: str) -> Tensor:
    """Draw log-ratios of which a quarter clip, all far enough from the edges that rounding moves none across."""
    inside = 0.08 * (2 * torch.rand(count, device=device) - 1)
    outside = (0.35 + 0.25 * torch.rand(count, device=device)) * (1 - 2 * torch.randint(2, (count,), device=device))
    return torch.where(torch.rand(count, device=device) < 0.5, inside, outside)


@torch.no_grad()
def make_problem(case: Case) -> Problem:
    """Draw the inputs of a case, seed 0: logits of spread 2.5, every fourth label a likely one."""
    torch.manual_seed(0)
    device, dtype = case.device, DTYPES[case.dtype]
    weight = torch.randn(case.vocabulary, case.hidden, device=device).mul_(2.5 / case.hidden**0.5)
    hidden = torch.randn(case.tokens, case.hidden, device=device)
    labels = torch.randint(case.vocabulary, (case.tokens,), device=device)
    # Confident rows are where gradients lose their digits: there p - 1 is small.
    hidden[::4] += 2.4 * weight[labels[::4]]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    advantages = torch.randn(case.sequences, device=device).repeat_interleave(case.tokens // case.sequences)
    weights = torch.full((case.tokens,), 1 / case.tokens, device=device)
    problem = Problem(hidden, weight, labels, labels, advantages, weights, case.sequences)
    step = _truth_rows(case.vocabulary)
    chunks = zip(hidden.split(step), labels.split(step), strict=True)
    logprobs = torch.cat([logprobs_of(part, weight, part_labels)[0] for part, part_labels in chunks])
    old_logprobs = logprobs - _log_ratios(case.tokens, device)
    hidden.requires_grad_()
    weight.requires_grad_(case.is_trained)
    return replace(problem, old_logprobs=old_logprobs)

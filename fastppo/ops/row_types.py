"""What the row operations take and give, each a number a row of a chunk of logits (C, V)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scaling(NamedTuple):
    """From raw logits u to z = softcap·tanh(logit_scale·u / softcap) / temperature; without softcap, no tanh."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Statistics(NamedTuple):
    """One number a row, (C,) fp32 (fp64 for fp64 logits); the last two where there are reference logits.

    A log-sum-exp may have more digits than that, since the gradient takes it from logits of its own size.
    """

    logprobs: Tensor
    entropies: Tensor
    logsumexp: Tensor
    kl: Tensor | None = None
    ref_logsumexp: Tensor | None = None


class Upstream(NamedTuple):
    """dLoss by each statistic, (C,); None is zero."""

    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    logsumexp: Tensor | None = None
    kl: Tensor | None = None


class Reference(NamedTuple):
    """The raw logits (C, V) of the model that the exact KL is measured from, and their scaling."""

    logits: Tensor
    scaling: Scaling

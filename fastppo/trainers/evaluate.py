"""The stage before the update: log-probs and values of the policy, log-probs of the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo import ops
from fastppo.models.attach import is_attached
from fastppo.models.critic import critic_pass, critic_values
from fastppo.models.network import evaluating, language_head
from fastppo.models.passes import pass_tokens, passing, response_hidden, sample_groups
from fastppo.models.reference import Reference
from fastppo.types import Evaluation, Rollout, Samples


@torch.no_grad()
def evaluate(
    model: Any,
    reference: Reference,
    samples: Samples,
    rollout: Rollout | None,
    *,
    max_size: int,
    exact_kl: bool,
    critic: str = "head",
) -> Evaluation:
    """Evaluate the samples under policy, critic and reference, `max_size` of them to a forward pass.

    With a rollout the policy's log-probs and the values are its records, and only the reference is run, and for
    the exact KL the policy. A `critic` of its own (adapter or full) always is: the rollout's values are not its.
    """
    count, device = len(samples.labels), samples.labels.device
    logprobs, ref_logprobs, values, kl = torch.zeros(4, count, device=device).unbind()
    if rollout is not None and rollout.values is not None:
        index = recorded_tokens(samples, rollout).to(device)
        logprobs, values = rollout.logprobs[index], rollout.values[index]
    with evaluating(model), passing(model):
        for group in sample_groups(samples, range(len(samples)), max_size, is_attached(model), pass_tokens(device)):
            tokens = samples.take(group).to(device)
            hidden = response_hidden(model, samples, group) if rollout is None or exact_kl else None
            if rollout is None and hidden is not None:
                logprobs[tokens] = token_logprobs(model, hidden, samples, tokens)
                values[tokens] = model.v_head(hidden).squeeze(-1)
            if critic != "head":
                with critic_pass(model, critic) as network:
                    values[tokens] = critic_values(model, network, samples, group)
            with reference.active() as network, evaluating(network), passing(network):
                ref_hidden = response_hidden(network, samples, group)
                ref_logprobs[tokens] = token_logprobs(network, ref_hidden, samples, tokens)
                ref_head = language_head(network)
            if exact_kl and hidden is not None:
                head = language_head(model)
                pairs = (hidden, head.weight), (ref_hidden, ref_head.weight)
                shapes = (one.arguments(samples.temperature) for one in (head, ref_head))
                kl[tokens] = ops.linear_kl(*pairs, **next(shapes), ref_shape=next(shapes))
    return Evaluation(logprobs, ref_logprobs, values, kl if exact_kl else None, rollout is not None)


def token_logprobs(model: Any, hidden: Tensor, samples: Samples, tokens: Tensor) -> Tensor:
    """Return log π (T',) of the samples' tokens numbered `tokens`, from the hidden states (T', H) before them."""
    head = language_head(model)
    labels, shape = samples.labels[tokens], head.arguments(samples.temperature)
    return ops.linear_logprobs(hidden, head.weight, labels, ignore_index=None, **shape)[0]


def recorded_tokens(samples: Samples, rollout: Rollout) -> Tensor:
    """Return the places of the trainable tokens among the rollout's records, (T,)."""
    starts = rollout.offsets[list(samples.rows)]
    return samples.positions + torch.repeat_interleave(starts, samples.offsets.diff())

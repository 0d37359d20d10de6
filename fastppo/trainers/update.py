"""The update: epochs of minibatches over a frozen `Experience`, one optimiser step a minibatch.

Nothing is read back from the device inside a minibatch. Whether a step is taken at all (its mean ratio may exceed
the threshold, its loss or gradient may not be finite) is decided there too, and leaves weights and optimiser as they
were if not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastppo import ops, ppo
from fastppo.config import PPOConfig
from fastppo.models.attach import is_attached
from fastppo.models.critic import critic_pass, critic_values
from fastppo.models.in_place import GradientMemory, embeddings_in_place, place_of_gradient
from fastppo.models.network import evaluating, language_head
from fastppo.models.offload import offloading
from fastppo.models.passes import pass_tokens, passing, response_hidden, sample_groups
from fastppo.models.recompute import checkpointing
from fastppo.types import Experience, LossTerms, Minibatch, Samples


def optimise(model: Any, optimizer: Any, experience: Experience, config: PPOConfig, step: int) -> list[LossTerms]:
    """Run the PPO epochs over an experience; return the losses of every minibatch, in order.

    In the first `critic_warmup_steps` steps only the critic is updated.
    """
    is_warmup = step < config.critic_warmup_steps
    losses: list[LossTerms] = []
    memory = None if is_warmup else GradientMemory(_trained(optimizer))
    offload = offloading(model) if config.activation_offload else nullcontext()
    with evaluating(model), checkpointing(model), passing(model), embeddings_in_place(model), offload:
        is_packed = is_attached(model)
        for epoch in range(config.ppo_epochs):
            for minibatch in minibatches(experience.samples, config, step, epoch, is_packed):
                losses.append(train_minibatch(model, optimizer, experience, minibatch, config, is_warmup, memory))
                if not config.is_compat and _drifted(losses[-1], config):
                    return losses
            if _drifted(losses[-1], config):
                break
    return losses


def _drifted(terms: LossTerms, config: PPOConfig) -> bool:
    """Whether early stopping is on and the minibatch's KL from the old policy is too large."""
    return config.early_stopping and float(terms.stats["policy/policykl"]) > 1.5 * config.target_kl


def minibatches(
    samples: Samples, config: PPOConfig, step: int, epoch: int, is_packed: bool = False
) -> Iterator[Minibatch]:
    """Cut the samples, in an order drawn from (seed, step, epoch), into the optimiser steps of one epoch.

    Each has mini_batch_size * gradient_accumulation_steps samples (fewer if samples were dropped), and as even a
    number of tokens as a random assignment in that order allows; TRL cuts the order into pieces.
    """
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + epoch)
    order = torch.randperm(len(samples), generator=generator).tolist()
    size = config.micro_batch_size * config.gradient_accumulation_steps
    number = math.ceil(len(order) / size)
    if config.is_compat:
        steps = [order[i * size : (i + 1) * size] for i in range(number)]
    else:
        lengths = samples.lengths  # computed at every call
        bins = ops.pack([lengths[i] for i in order], number, size).tolist()
        steps = [[row for row, place in zip(order, bins, strict=True) if place == i] for i in range(number)]
    for i, rows in enumerate(steps):
        yield _minibatch(samples, rows, config, is_packed, is_first=epoch == 0 and i == 0)


def _minibatch(samples: Samples, rows: list[int], config: PPOConfig, is_packed: bool, is_first: bool) -> Minibatch:
    """Group a step's samples into forwards; TRL averages the means of its micro-batches instead of over all tokens."""
    size = config.micro_batch_size
    micro = [rows[i : i + size] for i in range(0, len(rows), size)] if config.is_compat else [rows]
    weights = torch.zeros(len(samples.labels))
    groups: list[tuple[int, ...]] = []
    for part in micro:
        weights[samples.take(part)] = ppo.token_weights(samples.offsets, part, config.loss_aggregation) / len(micro)
        found = sample_groups(samples, part, size, is_packed, pass_tokens(samples.labels.device))
        groups += [tuple(group) for group in found]
    return Minibatch(tuple(groups), weights.to(samples.labels.device), is_first)


def train_minibatch(
    model: Any,
    optimizer: Any,
    experience: Experience,
    minibatch: Minibatch,
    config: PPOConfig,
    is_warmup: bool = False,
    memory: GradientMemory | None = None,
) -> LossTerms:
    """Accumulate the gradients of one minibatch, group by group, and take the optimiser step if it is sound.

    In a warm-up only the critic has gradients; what has none is no part of an optimiser's step.
    """
    optimizer.zero_grad(set_to_none=True)  # whatever an interrupted step left behind
    if memory is not None:
        memory.hand_out()
    logprobs, entropies, values = torch.full((3, len(minibatch.weights)), torch.nan).to(minibatch.weights).unbind()
    for group in minibatch.groups:
        tokens = experience.samples.take(group).to(minibatch.weights.device)
        parts = _accumulate(model, experience, minibatch, group, tokens, config, is_warmup)
        logprobs[tokens], entropies[tokens], values[tokens] = parts
    if memory is not None:
        memory.settle()
    rows = [row for group in minibatch.groups for row in group]
    tokens = experience.samples.take(rows).to(minibatch.weights.device)
    stats, ratio = _statistics(experience, minibatch, tokens, (logprobs, entropies, values), config)
    skipped, nonfinite = _step(optimizer, stats, config)
    return LossTerms(stats, torch.full_like(logprobs, torch.nan).index_copy(0, tokens, ratio), skipped, nonfinite)


def _accumulate(
    model: Any,
    experience: Experience,
    minibatch: Minibatch,
    group: tuple[int, ...],
    tokens: Tensor,
    config: PPOConfig,
    is_warmup: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a group's gradients; return its new log-probs, entropies and values (T',), without gradient."""
    with torch.no_grad() if is_warmup else nullcontext():
        hidden = response_hidden(model, experience.samples, group)
        head, policy_loss = language_head(model), _policy_loss(experience, minibatch, tokens, config)
        # Detached, for the operation forms the gradient of a head that may have one.
        weight = head.weight.detach() if is_warmup else head.weight
        labels, shape = experience.samples.labels[tokens], head.arguments(experience.samples.temperature)
        shape["weight_grad"] = place_of_gradient(weight)  # the loss below is differentiated as it is
        total = ops.linear_loss(hidden, weight, labels, policy_loss, ignore_index=None, **shape)
    if config.critic == "head":
        values = model.v_head(hidden.detach() if config.critic_detach else hidden).squeeze(-1)
        (total + _value_loss(values, experience, minibatch, tokens, config)).backward()
    else:
        if not is_warmup:
            total.backward()  # before the critic's pass: one network's activations at a time
        with critic_pass(model, config.critic) as network:
            values = critic_values(model, network, experience.samples, group)
            _value_loss(values, experience, minibatch, tokens, config).backward()
    return policy_loss.logprobs, policy_loss.entropies, values.detach()


def _policy_loss(experience: Experience, minibatch: Minibatch, tokens: Tensor, config: PPOConfig) -> ops.PPOLoss:
    weights, importance = minibatch.weights[tokens], experience.evaluation.importance
    return ops.PPOLoss(
        old_logprobs=None if minibatch.is_first else experience.evaluation.logprobs[tokens],
        advantages=experience.advantages[tokens],
        weights=weights if importance is None else weights * importance[tokens],
        clip_low=config.cliprange,
        clip_high=config.cliprange if config.cliprange_high is None else config.cliprange_high,
        entropy_coef=config.entropy_coef,
    )


def _value_loss(
    values: Tensor, experience: Experience, minibatch: Minibatch, tokens: Tensor, config: PPOConfig
) -> Tensor:
    """Return a group's part of the weighted value loss, a scalar."""
    old_values, returns = experience.evaluation.values[tokens], experience.returns[tokens]
    losses = ops.clipped_value_loss(values, old_values, returns, config.cliprange_value)
    return config.vf_coef * (losses * minibatch.weights[tokens]).sum()


@torch.no_grad()
def _statistics(
    experience: Experience, minibatch: Minibatch, tokens: Tensor, new: tuple[Tensor, ...], config: PPOConfig
) -> tuple[dict[str, Tensor], Tensor]:
    logprobs, entropies, values = (x[tokens] for x in new)
    weights, recorded = minibatch.weights[tokens], experience.evaluation.logprobs[tokens]
    old = logprobs if minibatch.is_first else recorded
    importance, advantages = experience.evaluation.importance, experience.advantages[tokens]
    policy_weights = weights if importance is None else weights * importance[tokens]
    stats, ratio = ppo.policy_statistics(logprobs, old, entropies, advantages, policy_weights, config)
    old_values, returns = experience.evaluation.values[tokens], experience.returns[tokens]
    stats |= ppo.value_statistics(values, old_values, returns, weights, config)
    stats["loss/total"] = stats["loss/policy"] + config.vf_coef * stats["loss/value"]
    if config.entropy_coef:
        stats["loss/total"] = stats["loss/total"] - config.entropy_coef * (entropies * weights).sum()
    if minibatch.is_first:  # the only ones whose records can be compared: later steps have other weights
        stats["policy/logprob_gap_max"] = (logprobs - recorded).abs().max()
    stats["policy/ratio_mean"] = ratio.mean()
    return stats, ratio


def _trained(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _step(optimizer: Any, stats: dict[str, Tensor], config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Take the optimiser step unless the minibatch is unsound; return (skipped, nonfinite), () bool."""
    parameters = [parameter for parameter in _trained(optimizer) if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    stats["policy/grad_norm"] = norm
    nonfinite = ~(torch.isfinite(norm) & torch.isfinite(stats["loss/total"]))
    skipped = nonfinite | (stats["policy/ratio_mean"] > config.ratio_threshold)
    if config.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    if optimizer.defaults.get("fused"):  # decides on the device: gradient scalers use the same door
        optimizer.found_inf = skipped.float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
    elif not bool(skipped):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped, nonfinite

"""What would fit, and what would help: plans of other sizes and other settings, tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from fastppo.planner import Plan, Work
from fastppo.planner.network import Weights

MOST_SAMPLES = 4096  # larger batches are not looked for
_RESERVE = 1.03  # what a prediction may be short of


class Setting(NamedTuple):
    """A change, under the names of its flags, and the settings with it."""

    flags: str
    weights: Weights
    work: Work


def needed(plan: Plan) -> int:
    """Return the bytes with which a step is sure to run: the peak, and 3% in reserve."""
    return math.ceil(plan.peak * _RESERVE)


def largest(needed_at: Callable[[int], int], memory: int, most: int) -> int:
    """Return the largest number from 1 to `most`, 0 if there is none, for which so many bytes are enough.

    What is needed must not shrink as the number grows. It is found to 1%, by straight lines between what is known.
    """
    bounds = {}
    for number in (1, most):
        bounds[number] = needed_at(number)
        if bounds[number] > memory and number == 1:
            return 0
    if bounds[most] <= memory:
        return most
    low, high = 1, most
    while high - low > max(1, low // 100):
        share = (memory - bounds[low]) / (bounds[high] - bounds[low])
        guess = low + int(share * (high - low)) if len(bounds) % 3 else (low + high) // 2  # where no line leads on
        guess = min(max(guess, low + 1), high - 1)
        bounds[guess] = needed_at(guess)
        low, high = (guess, high) if bounds[guess] <= memory else (low, guess)
    return low


def with_batch(work: Work, batch: int) -> Work:
    """Return the work of about so many samples: fewer, if the minibatches would not come out even."""
    config = work.config
    unit = config.mini_batch_size * config.gradient_accumulation_steps
    unit = unit if batch >= unit else config.gradient_accumulation_steps
    return replace(work, config=replace(config, batch_size=max(unit, batch // unit * unit)))


def settings(weights: Weights, work: Work) -> Iterator[Setting]:
    """Yield the single changes of the settings that may take less memory."""
    is_whole = work.config.critic == "full"  # a network of its own, which is not trained in 8 or 4 bits
    if weights.lora_r is None:
        yield Setting("--lora_r 16", replace(weights, lora_r=16), work)
    elif is_whole:
        yield Setting("--critic adapter", weights, replace(work, config=replace(work.config, critic="adapter")))
    elif weights.bits is None:
        yield Setting("--load_in_8bit", replace(weights, bits=8), work)
    if weights.lora_r is not None and weights.bits != 4 and not is_whole:
        yield Setting("--load_in_4bit", replace(weights, bits=4), work)
    if not weights.bf16:
        yield Setting("--bf16", replace(weights, bf16=True), work)
    if not weights.gradient_checkpointing:
        yield Setting("--gradient_checkpointing", replace(weights, gradient_checkpointing=True), work)
    smaller = work.config.micro_batch_size // 2
    if smaller and not work.config.batch_size % (smaller * work.config.gradient_accumulation_steps):
        config = replace(work.config, mini_batch_size=smaller)
        yield Setting(f"--mini_batch_size {smaller}", weights, replace(work, config=config))

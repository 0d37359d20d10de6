"""Forward passes over samples of different lengths: grouped by length, padded on the right, no mask.

Right padding under a causal mask never reaches a real token, so every model's own forward is exact, and the rows
that no loss reads never reach the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastppo.models.network import last_hidden
from fastppo.types import Samples

# Padding that a group may contain: a forward of its own costs about as much as 256 tokens on a small model.
_FREE_PADDING_TOKENS = 256
_PADDING_SHARE = 0.15


def length_groups(lengths: Sequence[int], max_size: int) -> list[list[int]]:
    """Return the samples' numbers in groups of similar length, longest first, at most `max_size` to a group."""
    groups: list[list[int]] = []
    real = 0
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups:
            group = groups[-1]
            tokens = real + lengths[number]
            padding = lengths[group[0]] * (len(group) + 1) - tokens
            if len(group) < max_size and padding <= max(_FREE_PADDING_TOKENS, _PADDING_SHARE * tokens):
                group.append(number)
                real = tokens
                continue
        groups.append([number])
        real = lengths[number]
    return groups


def response_hidden(model: nn.Module, samples: Samples, group: Sequence[int]) -> Tensor:
    """Return the hidden states (T', H) from which the trainable tokens of the samples `group` are predicted.

    The order is that of `samples.take(group)`.
    """
    device = next(model.parameters()).device
    sequences = [torch.cat([samples.queries[i], samples.responses[i]]) for i in group]
    length = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(group), length, dtype=torch.int64, device=device)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    starts = torch.tensor([row * length + len(samples.queries[i]) - 1 for row, i in enumerate(group)])
    counts = samples.offsets.diff()[list(group)]
    rows = samples.positions[samples.take(group)] + torch.repeat_interleave(starts, counts)
    hidden = last_hidden(model, input_ids=ids, use_cache=False)
    return hidden.flatten(0, 1)[rows.to(device)]

"""Forward passes over samples of different lengths: packed into one row, or grouped by length and padded on the right.

Packed, there is no padding at all, and attention knows where each sample begins. Right padding under a causal mask
never reaches a real token. The rows that no loss reads never reach the head. Encoder and decoder of a model that has
both are padded each for itself, and a group has samples that are alike in both lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastppo.models import probe
from fastppo.models.attach import attached, is_attached, packed_hidden, pinned_rope
from fastppo.models.exact import NOT_EXACT, exact_linears
from fastppo.models.heap import heap_kept
from fastppo.models.network import causal_lm, last_hidden
from fastppo.models.seq2seq import decoded
from fastppo.ops.attention import has_kernels
from fastppo.ops.backends import kind_of
from fastppo.ops.logit_memory import keeping_logits
from fastppo.ops.matmul import is_row_invariant
from fastppo.ops.recipes import keeping_recipes
from fastppo.types import Samples, offsets_of

# Padding that a group may contain: a forward of its own costs about as much as 256 tokens on a small model.
_FREE_PADDING_TOKENS = 256
_PADDING_SHARE = 0.15
# On a CPU more tokens in a pass are no faster; they only keep more activations.
_CPU_TOKENS = 640


def pass_tokens(device: torch.device) -> int | None:
    """Return how many tokens a forward pass should have at most: what keeps a CPU's matmuls busy; None for no limit."""
    return _CPU_TOKENS if kind_of(device) == "cpu" else None


def length_groups(
    lengths: Sequence[int], max_size: int, is_packed: bool = False, max_tokens: int | None = None
) -> list[list[int]]:
    """Return the samples' numbers in groups of at most `max_size`, of similar length, longest first, if padded.

    A group has at most `max_tokens` tokens, padding included, unless one sample alone has more.
    """
    return _grouped([(length,) for length in lengths], max_size, is_packed, max_tokens)


def sample_groups(
    samples: Samples, rows: Sequence[int], max_size: int, is_packed: bool, max_tokens: int | None
) -> list[list[int]]:
    """Return the samples `rows` in groups for one forward pass each; see `length_groups`."""
    found = _grouped([samples.extents(row) for row in rows], max_size, is_packed, max_tokens)
    return [[rows[i] for i in group] for group in found]


def _grouped(
    extents: Sequence[tuple[int, ...]], max_size: int, is_packed: bool, max_tokens: int | None
) -> list[list[int]]:
    """Group samples by their tokens in each network that they pass through, to whose longest they are padded there.

    Neighbours in the order of the first network's tokens, the encoder's, come together.
    """
    groups: list[list[int]] = []
    real, longest = 0, extents[0] if extents else ()
    sizes = [sum(extent) for extent in extents]

    def descending(number: int) -> tuple[int, ...]:
        return (*(-tokens for tokens in extents[number]), number)

    for number in range(len(sizes)) if is_packed else sorted(range(len(sizes)), key=descending):
        if groups:
            group = groups[-1]
            tokens, widest = real + sizes[number], tuple(map(max, longest, extents[number]))
            padding = 0 if is_packed else sum(widest) * (len(group) + 1) - tokens
            fits = len(group) < max_size and (max_tokens is None or tokens + padding <= max_tokens)
            if fits and padding <= max(_FREE_PADDING_TOKENS, _PADDING_SHARE * tokens):
                group.append(number)
                real, longest = tokens, widest
                continue
        groups.append([number])
        real, longest = sizes[number], extents[number]
    return groups


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """Lay the samples of `response_hidden` out in the fastest right way inside, backward passes included.

    A model in training mode whose attention drops scores is padded, for that is its own attention's to do. Raises
    NotImplementedError for a model that neither packing nor padding leaves unharmed.
    """
    with heap_kept(causal_lm(model).device), keeping_logits(), keeping_recipes(), _laid_out(model):
        yield


@contextmanager
def _laid_out(model: nn.Module) -> Iterator[None]:
    is_packed = has_kernels(causal_lm(model).device) and bool(probe.trains_packed(model))
    is_packed = is_packed and not (model.training and _drops_scores(model))
    if is_row_invariant():
        if not is_packed:
            raise NotImplementedError(f"{type(causal_lm(model)).__name__} cannot be computed row by row: {NOT_EXACT}")
        with exact_linears(model), attached(model):
            yield
        return
    if is_packed:
        with attached(model):
            yield
        return
    harmless = probe.padded(model)
    if not harmless:
        raise NotImplementedError(
            f"{type(causal_lm(model)).__name__} cannot be run on padded batches: {harmless.reason}"
        )
    with pinned_rope(model):
        yield


_dropping: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _drops_scores(model: nn.Module) -> bool:
    """Whether the attention of a model in training mode drops scores, which fastppo's does not."""
    inner = causal_lm(model)
    if inner not in _dropping:
        devices = [inner.device] if inner.device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), attached(model):
                packed_hidden(model, [torch.zeros(2, dtype=torch.int64)])
            _dropping[inner] = False
        except NotImplementedError:
            _dropping[inner] = True
    return _dropping[inner]


def response_hidden(model: nn.Module, samples: Samples, group: Sequence[int]) -> Tensor:
    """Return the hidden states (T', H) from which the trainable tokens of the samples `group` are predicted.

    The order is that of `samples.take(group)`.
    """
    if samples.prefix is None:
        hidden, starts = sequence_hidden(model, [torch.cat([samples.queries[i], samples.responses[i]]) for i in group])
    else:  # the last token of a response predicts nothing
        prefix = samples.prefix.to(next(model.parameters()).device)
        sequences = [torch.cat([prefix, samples.responses[i][:-1]]) for i in group]
        hidden = decoded(model, [samples.queries[i] for i in group], sequences).flatten(0, 1)
        starts = torch.arange(len(group)) * max(map(len, sequences))
    starts = starts + torch.tensor([samples.start(i) - 1 for i in group])
    counts = samples.offsets.diff()[list(group)]
    rows = samples.positions[samples.take(group)] + torch.repeat_interleave(starts, counts)
    return hidden[rows.to(hidden.device)]


def sequence_hidden(model: nn.Module, sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return hidden states (N, H) of 1-D token sequences, padding among them, and the row where each begins, (B,)."""
    lengths = [len(sequence) for sequence in sequences]
    if is_attached(model):
        return packed_hidden(model, sequences), offsets_of(lengths)[:-1]
    device = next(model.parameters()).device
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(device)
    hidden = last_hidden(model, input_ids=ids, use_cache=False).flatten(0, 1)
    return hidden, torch.arange(len(sequences)) * max(lengths)

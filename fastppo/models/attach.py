"""Putting a model on fastppo's attention for a while; `fastppo.models.probe` says for which models it is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from fastppo.attention import NAME, LayerShape, Packed, attend, attending
from fastppo.models.network import causal_lm, last_hidden

AttentionInterface.register(NAME, attend)
_DYNAMIC = ("dynamic", "longrope")


def _configs(model: nn.Module) -> list[Any]:
    """Return every configuration that a module of the model may ask for its attention implementation."""
    result: list[Any] = []
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not any(config is other for other in result):
            result.append(config)
    for config in result:  # grows as parts of parts are found
        parts: list[Any] = [getattr(config, name, None) for name in config.sub_configs]
        result += [part for part in parts if part is not None and not any(part is other for other in result)]
    return result


@contextmanager
def attached(model: nn.Module) -> Iterator[None]:
    """Let the model's attention be `fastppo.attention.attend` inside, under `attending(context)`; pins RoPE too."""
    # Not by set_attn_implementation, which reads source files and warns; the name has no mask function, so that
    # transformers makes no mask.
    before = [(config, config._attn_implementation) for config in _configs(causal_lm(model))]
    with pinned_rope(model):
        try:
            for config, _ in before:
                config._attn_implementation_internal = NAME
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation


def is_attached(model: nn.Module) -> bool:
    """Whether the model's attention is fastppo's at the moment."""
    return bool(causal_lm(model).config._attn_implementation == NAME)


def packed_hidden(model: nn.Module, sequences: Sequence[Tensor], seen: dict[int, LayerShape] | None = None) -> Tensor:
    """Return the last hidden states (T, H) of an attached model for 1-D token sequences, run side by side."""
    device = causal_lm(model).device
    offsets = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device)
    ids = torch.cat(list(sequences)).to(device)
    with attending(Packed(offsets.to(device, torch.int32), seen)):
        return last_hidden(model, input_ids=ids[None], position_ids=positions[None], use_cache=False)[0]


@contextmanager
def pinned_rope(model: nn.Module) -> Iterator[None]:
    """Give every position the frequencies of the model's maximal length inside.

    Dynamic NTK and longrope choose them by the longest sequence of a batch: a long neighbour would change a short
    sequence, and keys in a cache would have been rotated otherwise than later ones.
    """
    with ExitStack() as stack:
        for module in batch_dependent_rotaries(model):
            stack.enter_context(_pinned(module))
        yield


def batch_dependent_rotaries(model: nn.Module) -> list[Any]:
    """Return the rotary embeddings of the model whose frequencies depend on the batch."""
    return [
        module for module in causal_lm(model).modules() if any(kind in _DYNAMIC for kind in _kinds(module).values())
    ]


def _kinds(module: Any) -> dict[str | None, str]:
    """Return the rope type of each of a rotary embedding's layer types, None being all layers."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {None: kinds}
    return dict(kinds) if isinstance(kinds, Mapping) else {}


@contextmanager
def _pinned(rotary: Any) -> Iterator[None]:
    attributes = {name: value for name, value in vars(rotary).items() if not isinstance(value, dict)}
    kinds, buffers = rotary.rope_type, {name: buffer.clone() for name, buffer in rotary._buffers.items()}
    device = next(iter(rotary._buffers.values())).device
    longest = rotary.config.max_position_embeddings
    try:
        with torch.no_grad():
            for layer_type in _kinds(rotary):
                which = {} if layer_type is None else {"layer_type": layer_type}
                for length in (1, longest):  # a short sequence first: it undoes what an earlier long one left behind
                    places = torch.tensor([[length - 1]], device=device)
                    rotary(torch.zeros(1, device=device), position_ids=places, **which)
        rotary.rope_type = "default" if isinstance(kinds, str) else dict.fromkeys(kinds, "default")
        yield
    finally:
        vars(rotary).update(attributes, rope_type=kinds)
        rotary._buffers.update(buffers)

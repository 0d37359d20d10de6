"""Gradient checkpointing where dropout is off, and on fastppo's own layouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from fastppo.attention import attending, current


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Let gradient checkpointing work inside although dropout is off, and recompute on the layout of the forward.

    It asks for `training` on its own layers.
    """
    layers = _checkpointed_layers(model)
    dropouts = [
        (layer, name, value)
        for layer in layers
        for name, value in vars(layer).items()
        if "drop" in name and isinstance(value, float)  # also BART's layerdrop, which leaves out whole layers
    ]
    try:
        for layer in layers:
            layer.training = True
        for layer, name, _ in dropouts:
            setattr(layer, name, 0.0)
        with recomputing(model):
            yield
    finally:
        for layer in layers:
            layer.training = False
        for layer, name, value in dropouts:
            setattr(layer, name, value)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Let what gradient checkpointing runs again inside work on the layout of the forward pass."""
    functions = [(layer, layer._gradient_checkpointing_func) for layer in _checkpointed_layers(model)]
    try:
        for layer, function in functions:
            layer._gradient_checkpointing_func = partial(_checkpointed, function)
        yield
    finally:
        for layer, function in functions:
            layer._gradient_checkpointing_func = function


def _checkpointed_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def _checkpointed(checkpoint: Any, function: Any, *args: Any) -> Any:
    """Checkpoint a function; when it is run again, on another thread perhaps, attention works on the same layout."""
    layout = current()

    def run(*inputs: Any) -> Any:
        with nullcontext() if layout is None else attending(layout):
            return function(*inputs)

    return checkpoint(run, *args)

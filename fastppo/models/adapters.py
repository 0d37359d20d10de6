"""Adding adapters to a PEFT model and switching between them, without changing anything else about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastppo.models.loading import find_file


@contextmanager
def preserving_flags(module: nn.Module) -> Iterator[None]:
    """PEFT changes `requires_grad` as it adds and switches adapters; put it back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def using_adapter(peft_model: Any, name: str) -> Iterator[None]:
    """Compute with this adapter, trainable, inside; which ones are on and every flag are then as they were before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuner = peft_model.base_model
    before = peft_model.active_adapter, tuner.active_adapter
    is_off = any(module.disable_adapters for module in tuner.modules() if isinstance(module, BaseTunerLayer))
    with preserving_flags(peft_model):
        try:
            if is_off:
                tuner.enable_adapter_layers()
            peft_model.set_adapter(name)
            yield
        finally:
            tuner.set_adapter(before[1])
            peft_model.active_adapter = before[0]
            if is_off:
                tuner.disable_adapter_layers()


@contextmanager
def without_adapters(peft_model: Any) -> Iterator[None]:
    """Compute with the base alone inside; PEFT itself freezes every adapter but the one that is on afterwards."""
    with preserving_flags(peft_model), peft_model.disable_adapter():
        yield


def adapter_parameters(peft_model: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter."""
    return [parameter for key, parameter in peft_model.named_parameters() if f".{name}." in f"{key}."]


def add_adapter(peft_model: Any, name: str, config: Any) -> None:
    """Add a new adapter, which is not on; every flag of the others stays as it is."""
    with preserving_flags(peft_model):
        peft_model.add_adapter(name, config)


@torch.no_grad()
def copy_adapter(peft_model: nn.Module, source: str, target: str) -> None:
    """Copy the weights of one adapter into another of the same shapes."""
    parameters = dict(peft_model.named_parameters())
    for key, parameter in parameters.items():
        if f".{target}." in f"{key}.":
            parameter.copy_(parameters[f"{key}.".replace(f".{target}.", f".{source}.")[:-1]])


def add_saved_adapter(peft_model: Any, name: str, source: str, **hub: Any) -> dict[str, Tensor]:
    """Add the adapter in a directory or hub repository under `name`; return those of its tensors that are no adapter's.

    What it trained whole, such as a score head, is among them. Raises ValueError if the adapter is not there as
    safetensors or does not fit the model.
    """
    from peft import PeftConfig, set_peft_model_state_dict

    path = find_file(source, "adapter_model.safetensors", **hub)
    if path is None:
        raise ValueError(
            f"{source} has no adapter_model.safetensors; pass what PEFT's save_pretrained wrote (pickles, .bin, are "
            "never opened: load the adapter in PEFT and save it again)"
        )
    config = PeftConfig.from_pretrained(source, **hub)
    config.modules_to_save, config.inference_mode = None, True
    tensors = load_file(path)
    try:
        add_adapter(peft_model, name, config)
        result = set_peft_model_state_dict(peft_model, tensors, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the adapter in {source} does not fit {_base_name(peft_model)}: {error}") from error
    missing = [key for key in result.missing_keys if f".{name}." in f"{key}."]
    if missing:
        raise ValueError(
            f"the adapter in {source} does not fit {_base_name(peft_model)}: it has no {missing[:2]} ({len(missing)} "
            "such tensors); load the base model that it was trained on"
        )
    for parameter in adapter_parameters(peft_model, name):
        parameter.requires_grad_(False)
    return {key: tensors[key] for key in result.unexpected_keys}


def _base_name(peft_model: Any) -> str:
    return type(peft_model.get_base_model()).__name__

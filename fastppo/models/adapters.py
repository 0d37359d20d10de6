"""Adding adapters to a PEFT model and switching between them, without changing anything else about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastppo.models.loading import find_file


@contextmanager
def preserving_flags(module: nn.Module) -> Iterator[None]:
    """PEFT changes `requires_grad` as it adds adapters; put it back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True, eq=False)
class _Tuned:
    """The layers of a PEFT model that its adapters change."""

    configs: Mapping[str, Any]  # of the adapters that there were when it was looked through
    layers: tuple[Any, ...]
    wrappers: tuple[Any, ...]  # of modules that adapters replace by their own
    parameters: Mapping[str, list[nn.Parameter]]  # by adapter

    def switch(self, name: str) -> None:
        """Let every layer compute with one adapter, as PEFT's `set_adapter` does, but leave every flag."""
        # Not by setattr, for which a module looks through its parameters, buffers and parts.
        for layer in self.layers:
            vars(layer).update(_disable_adapters=False, _active_adapter=[name])
        for wrapper in self.wrappers:
            vars(wrapper).update(_disable_adapters=False, _active_adapter=name if name in wrapper._adapters else [])


_TUNED: WeakKeyDictionary[nn.Module, _Tuned] = WeakKeyDictionary()


def _tuned(peft_model: Any) -> _Tuned:
    """Look through a PEFT model, once for as long as its adapters are the same: the walk takes longer than a switch."""
    configs, known = peft_model.peft_config, _TUNED.get(peft_model)
    if known is not None and list(map(id, known.configs.values())) == list(map(id, configs.values())):
        return known
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = list(peft_model.modules())
    _TUNED[peft_model] = _Tuned(
        dict(configs),
        tuple(module for module in modules if isinstance(module, BaseTunerLayer)),
        tuple(module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)),
        {name: adapter_parameters(peft_model, name) for name in configs},
    )
    return _TUNED[peft_model]


@contextmanager
def _restoring(tuned: _Tuned) -> Iterator[None]:
    parts = (*tuned.layers, *tuned.wrappers)
    before = [(part._disable_adapters, part._active_adapter) for part in parts]
    try:
        yield
    finally:
        for part, (is_off, active) in zip(parts, before, strict=True):
            vars(part).update(_disable_adapters=is_off, _active_adapter=active)


@contextmanager
def using_adapter(peft_model: Any, name: str) -> Iterator[None]:
    """Compute with this adapter inside, trainable where gradients are made; all is then as it was before."""
    tuned, tuner = _tuned(peft_model), peft_model.base_model
    before = peft_model.active_adapter, tuner.active_adapter
    frozen = [p for p in tuned.parameters[name] if not p.requires_grad] if torch.is_grad_enabled() else []
    with _restoring(tuned):
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            tuned.switch(name)
            peft_model.active_adapter = tuner.active_adapter = name
            yield
        finally:
            peft_model.active_adapter, tuner.active_adapter = before
            for parameter in frozen:
                parameter.requires_grad_(False)


@contextmanager
def without_adapters(peft_model: Any) -> Iterator[None]:
    """Compute with the base alone inside."""
    tuned = _tuned(peft_model)
    with _restoring(tuned):
        for part in (*tuned.layers, *tuned.wrappers):
            vars(part)["_disable_adapters"] = True
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

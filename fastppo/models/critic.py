"""The critic: the value head on the policy's own trunk, on a second adapter of the same base, or on a second network.

A critic of its own is part of the model: the adapter CRITIC of `model.pretrained_model`, or the network `model.critic`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.config import PPOConfig
from fastppo.models import loading
from fastppo.models.adapters import adapter_parameters, add_adapter, add_saved_adapter, copy_adapter, using_adapter
from fastppo.models.fusions import fused
from fastppo.models.network import causal_lm, to_bf16
from fastppo.models.passes import passing, response_hidden
from fastppo.types import Samples

CRITIC = "fastppo_critic"  # the adapter's name, and the folder of either critic in a checkpoint


def critic_kind(model: Any) -> str:
    """Return what the value head of a model reads: head, adapter or full, as in `PPOConfig.critic`."""
    if model.critic is not None:
        return "full"
    return "adapter" if model.is_peft_model and CRITIC in model.pretrained_model.peft_config else "head"


def attach_critic(model: Any, config: PPOConfig) -> None:
    """Give the model the critic that the settings name, unless it brings that one along.

    A critic of its own starts as the policy is now, or as the reward adapter; the network that it does not share is
    trained, all of it. Raises ValueError where the model cannot have that critic, or has another one.
    """
    kind = critic_kind(model)
    if model.critic is not None and config.bf16:
        to_bf16(model.critic)
    if kind == config.critic:
        return
    if kind != "head":
        raise ValueError(
            f"PPOConfig.critic={config.critic!r}, but the model's value head was trained with critic={kind!r}; set "
            "that, or load the model that the run is to start from"
        )
    start = _start(model, config)
    if config.critic == "adapter":
        _add_adapter(model.pretrained_model, start, config.critic_peft_config)
    else:
        model.critic = _second_network(model, start)
    if config.critic_init == "reward_adapter":
        with torch.no_grad():
            model.v_head.summary.weight.copy_(model.score.weight)
            model.v_head.summary.bias.zero_()


def _start(model: Any, config: PPOConfig) -> str | None:
    """Return the adapter that the critic starts from, None without adapters."""
    if config.critic == "adapter" and not model.is_peft_model:
        raise ValueError(
            "PPOConfig.critic='adapter' puts a second adapter beside the policy's, but the model has none; load it "
            "with peft_config=LoraConfig(...), or set critic='full'"
        )
    if config.critic == "full" and getattr(causal_lm(model), "is_quantized", False):
        raise ValueError(
            "PPOConfig.critic='full' trains a second network whole, which 8-bit and 4-bit weights cannot be; set "
            "critic='adapter'"
        )
    if config.critic_init == "reward_adapter":
        labels = None if model.score is None else model.score.out_features
        if labels != 1:
            found = "has no reward adapter" if labels is None else f"has one with {labels} scores"
            raise ValueError(
                f"PPOConfig.critic_init='reward_adapter' needs an adapter with one score, but the model {found}; load "
                "it with from_pretrained(..., reward_adapter=PATH)"
            )
        return str(model.reward_adapter_name)
    return next(iter(model.pretrained_model.active_adapters)) if model.is_peft_model else None


def _add_adapter(peft_model: Any, start: str | None, changes: dict[str, Any]) -> None:
    assert start is not None
    settings = copy.deepcopy(peft_model.peft_config[start])
    unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(settings)})
    if unknown:
        raise ValueError(
            f"PPOConfig.critic_peft_config has {unknown}, which are no fields of {type(settings).__name__}; give some "
            "of its fields, such as r and lora_alpha"
        )
    # Layers that are trained whole would be copied; initial values made from the base, as PiSSA's, would change it.
    settings.modules_to_save, settings.inference_mode, settings.init_lora_weights = None, False, True
    add_adapter(peft_model, CRITIC, dataclasses.replace(settings, **changes))
    if not changes:
        copy_adapter(peft_model, start, CRITIC)
    _train_adapter(peft_model)


def _train_adapter(peft_model: nn.Module) -> None:
    for parameter in adapter_parameters(peft_model, CRITIC):
        parameter.requires_grad_(True)


def _second_network(model: Any, start: str | None) -> Any:
    """Return a trainable copy of the network, with the adapter `start` merged into it."""
    network = copy.deepcopy(model.pretrained_model)
    if start is not None:
        network.set_adapter(start)
        network = network.merge_and_unload(adapter_names=[start])
    return _whole_critic(network, causal_lm(model))


def _whole_critic(network: Any, policy: Any) -> Any:
    """Make all of a second network trainable but its language-model head, for which it gets the policy's, unused."""
    network.requires_grad_(True)
    own, head = network.get_output_embeddings(), policy.get_output_embeddings()
    if own.weight is not network.get_input_embeddings().weight and type(own) is type(head):
        network.set_output_embeddings(head)
    return network.eval()


def critic_parameters(model: Any) -> list[nn.Parameter]:
    """Return the trainable parameters that only the critic has: the value head's, and its adapter's or network's."""
    own = [*model.v_head.parameters()]
    if critic_kind(model) == "adapter":
        own += adapter_parameters(model.pretrained_model, CRITIC)
    elif model.critic is not None:
        policy = {id(parameter) for parameter in model.pretrained_model.parameters()}
        own += [parameter for parameter in model.critic.parameters() if id(parameter) not in policy]
    return [parameter for parameter in own if parameter.requires_grad]


@contextmanager
def critic_pass(model: Any, kind: str) -> Iterator[Any]:
    """Yield the network whose hidden states a critic of its own reads, for passes forward and, inside, backward.

    To be used where `model` is evaluating and passing.
    """
    if kind == "adapter":
        with using_adapter(model.pretrained_model, CRITIC):
            yield model
    else:
        with fused(model.critic), passing(model.critic):
            yield model.critic


def critic_values(model: Any, network: Any, samples: Samples, group: Sequence[int]) -> Tensor:
    """Return the values (T',), fp32, before the trainable tokens of the samples `group`, read from `network`."""
    values: Tensor = model.v_head(response_hidden(network, samples, group)).squeeze(-1)
    return values


def save_critic(model: Any, directory: Path) -> None:
    """Write a critic of its own into the folder CRITIC of `directory`, as PEFT or transformers writes it."""
    kind = critic_kind(model)
    if kind == "adapter":  # PEFT makes a folder of the adapter's name
        model.pretrained_model.save_pretrained(directory, selected_adapters=[CRITIC])
    elif kind == "full":
        model.critic.save_pretrained(directory / CRITIC)


def load_critic(model: Any, source: str, **hub: Any) -> None:
    """Give the model the critic that was saved with it, if one was."""
    hub = {**hub, "subfolder": os.path.join(hub.get("subfolder") or "", CRITIC)}
    if loading.find_file(source, "adapter_config.json", **hub) is not None:
        add_saved_adapter(model.pretrained_model, CRITIC, source, **hub)
        _train_adapter(model.pretrained_model)
    elif loading.find_file(source, "config.json", **hub) is not None:
        options = {"dtype": torch.float32, "is_encoder_decoder": model.is_encoder_decoder, **hub}
        network = loading.load_transformers(source, **options)
        model.critic = _whole_critic(network.to(model.device), causal_lm(model))

"""The network of a run without its numbers: built from a configuration, or taken over from a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.config import PPOConfig
from fastppo.models import fusions, probe
from fastppo.models.adapters import without_adapters
from fastppo.models.attach import batch_dependent_rotaries
from fastppo.models.critic import CRITIC, attach_critic
from fastppo.models.network import causal_lm, is_encoder_decoder, to_bf16
from fastppo.models.probe import Verdict
from fastppo.models.reference import create_reference_model
from fastppo.models.value_head import AutoModelForCausalLMWithValueHead
from fastppo.ops.backends import rehearsing
from fastppo.planner.quantised import Quantised, quantise

_BITS = {"Int8Params": 8, "Params4bit": 4}  # by the weight: PEFT's wrappers have the layers' names


@dataclass(frozen=True)
class Weights:
    """How a model is loaded: the flags of `fastppo ppo` that say so."""

    dtype: torch.dtype | None = None  # None: float32 for what is trained, else the configuration's
    bits: int | None = None  # 8 or 4: the linear layers but for the head
    lora_r: int | None = None
    lora_targets: tuple[str, ...] | str | None = None  # None: the attention's, as peft knows them
    bf16: bool = False
    gradient_checkpointing: bool = False

    def check(self) -> None:
        """Raise ValueError for what cannot be together."""
        if self.bits not in (None, 8, 4):
            raise ValueError(f"bits must be 8, 4 or None, got {self.bits}")
        if self.bits is not None and self.lora_r is None:
            raise ValueError("8-bit and 4-bit weights are not trained themselves; set lora_r, for example to 16")


@dataclass(frozen=True, eq=False)
class Network:
    """Policy, critic and reference on the meta device."""

    model: Any
    reference: Any  # a second set of weights, or None where the adapter is switched off

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Yield the model that acts as the reference inside the block."""
        if self.reference is not None:
            yield self.reference
            return
        with without_adapters(self.model.pretrained_model):
            yield self.model

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return the tensors that stay for the whole run, by what they are; shared ones under the first name."""
        names = ("base weights", "adapters", "critic", "value head", "reference")
        owners: dict[str, list[Tensor]] = {name: [] for name in names}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            owners[_owner(name)].append(tensor)
        if self.reference is not None:
            owners["reference"] = [*self.reference.parameters(), *self.reference.buffers()]
        return owners

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that the optimiser updates."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def _owner(name: str) -> str:
    if name.startswith("critic.") or f".{CRITIC}." in f"{name}.":
        return "critic"
    if name.startswith("v_head"):
        return "value head"
    return "adapters" if "lora_" in name or "modules_to_save" in name else "base weights"


def build(config: Any, weights: Weights, settings: PPOConfig) -> Network:
    """Build a network from a transformers configuration, with the critic of a run's settings.

    Raises ValueError and NotImplementedError.
    """
    weights.check()
    if config.is_encoder_decoder:
        raise NotImplementedError(f"{config.model_type} has an encoder and a decoder, which cannot be planned yet")
    inner = _from_config(copy.deepcopy(config), weights)
    if weights.bits is not None:
        quantise(inner, weights.bits)
        inner.is_quantized = True
    if weights.lora_r is not None:
        inner = _with_lora(inner, weights)
    with torch.device("meta"):
        model = AutoModelForCausalLMWithValueHead(inner)
    if weights.bf16:
        to_bf16(model)
    reference = create_reference_model(model) if weights.lora_r is None else None
    with torch.device("meta"):
        attach_critic(model, settings)
    if weights.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return _ready(Network(model, reference), None)


def _from_config(config: Any, weights: Weights) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = weights.dtype
    if dtype is None:
        is_frozen = weights.lora_r is not None
        dtype = (getattr(config, "dtype", None) or torch.float32) if is_frozen else torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _with_lora(model: Any, weights: Weights) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = weights.lora_targets
    options = LoraConfig(r=weights.lora_r, target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"):
        return get_peft_model(model, options)


def twin(model: Any, reference: Any) -> Network:
    """Return a network like a policy and its reference (None: the same weights) in memory, sharing what they share.

    Raises NotImplementedError for an encoder-decoder.
    """
    if is_encoder_decoder(model):
        raise NotImplementedError("a model with an encoder and a decoder cannot be planned yet")
    memo: dict[int, Any] = {}
    for module in [*model.modules(), *(() if reference is None else reference.modules())]:
        bits = _BITS.get(type(module._parameters.get("weight")).__name__)
        if bits is not None:
            memo[id(module)] = Quantised(module, bits)
            memo[id(module)].bias = None if module.bias is None else _empty(module.bias)
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                memo.setdefault(id(tensor), _empty(tensor))
    policy, other = copy.deepcopy((model, reference), memo)
    asked = {"packed": probe.packed, "packed gradients": probe.trains_packed, "paged": probe.paged}
    return _ready(Network(policy, other), {name: ask(model) for name, ask in asked.items()})


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _ready(network: Network, verdicts: dict[str, Verdict] | None) -> Network:
    """Settle what cannot be asked of weights without numbers: what is fused, and in which layouts the model runs."""
    for model in (network.model, network.reference, network.model.critic):
        if model is not None:
            for rotary in batch_dependent_rotaries(model):
                rotary.rope_type = "default"  # others look at the positions
            causal_lm(model).config.pad_token_id = None  # transformers looks for it among the tokens, to warn
            fusions.find(model)
            found = _layouts(model) if verdicts is None else verdicts
            probe.assume(model, found | {"padded": Verdict()})
    return network


def _layouts(model: Any) -> dict[str, Verdict]:
    """Guess that layouts serve a model if every layer goes through fastppo's attention."""
    names = ("packed", "packed gradients", "paged")
    layers = causal_lm(model).config.get_text_config().num_hidden_layers
    try:
        with rehearsing("cpu", 0):
            seen = len(probe.layer_shapes(model))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return dict.fromkeys(names, Verdict(reason=f"{type(error).__name__}: {error}"))
    reason = "" if seen == layers else f"{layers - seen} of {layers} layers have an attention of their own"
    return dict.fromkeys(names, Verdict(reason=reason))

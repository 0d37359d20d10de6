"""A model as plain weights: adapters added to what they adapt, 8- and 4-bit layers written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.models.network import causal_lm


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of a model as it acts now, by the names that they have without adapters and quantisation.

    Adapters are added in fp32 and rounded once, to `dtype`; tied weights stay one tensor unless an adapter parts them.
    The model is left as it is. Raises NotImplementedError for adapters that do more than add B·A to a weight.
    """
    weights: dict[str, Tensor] = {}
    rounded: dict[int, Tensor] = {}
    for prefix, module in _plain_modules(causal_lm(model)):
        base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        own = [*base.named_parameters(recurse=False), *base.named_buffers(recurse=False)]
        for name, tensor in own:
            if name in base._non_persistent_buffers_set:
                continue
            plain = _plain_weight(module, base) if name == "weight" else tensor
            if plain is not tensor:
                weights[prefix + name] = _to(plain, dtype)
                continue
            # By identity, so that what is tied stays so.
            if id(tensor) not in rounded:
                rounded[id(tensor)] = _to(tensor, dtype)
            weights[prefix + name] = rounded[id(tensor)]
    return weights


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)


def _plain_modules(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the modules that the model would have without PEFT, under their names there, each before its parts.

    A layer with an adapter stands for the one below it.
    """
    if hasattr(module, "original_module"):
        if not hasattr(module, "modules_to_save"):
            raise NotImplementedError(f"{type(module).__name__} cannot be merged; use modules_to_save instead")
        names = module.active_adapters
        module = module.original_module if module.disable_adapters or not names else module.modules_to_save[names[0]]
    yield prefix, module
    if not hasattr(module, "get_base_layer"):
        for name, child in module.named_children():
            yield from _plain_modules(child, f"{prefix}{name}.")


def _plain_weight(module: Any, base: Any) -> Tensor:
    """Return the weight of a layer, in fp32 if it is quantised or adapted."""
    weight = _dequantised(base)
    if module is not base and not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name in module.lora_A or name in module.lora_embedding_A:
                _check(module, name)
                weight = weight.float() + module.get_delta_weight(name).float()
    # transformers keeps a transposed layer (GPT-2's) the usual way round in 8 and 4 bits.
    is_turned = _is_quantised(base) and getattr(base, "source_cls", nn.Linear) is not nn.Linear
    return weight.t() if is_turned else weight


def _check(module: Any, adapter: str) -> None:
    from peft.tuners.lora import LoraLayer

    is_plain = isinstance(module, LoraLayer) and not hasattr(module, "parameter_name")
    if not is_plain or adapter in module.lora_variant or module.lora_bias.get(adapter):
        raise NotImplementedError(
            f"the adapter {adapter!r} on {type(module).__name__} does more than add B·A to a weight (DoRA, a bias, an "
            "expert's parameter, another kind than LoRA); merge it with PEFT's merge_and_unload"
        )


def _dequantised(layer: Any) -> Tensor:
    """Return the weight that bitsandbytes' codes stand for, or that of any other layer as it is."""
    weight: Tensor = layer.weight
    if not _is_quantised(layer):
        return weight
    from bitsandbytes import functional

    if type(weight).__name__ == "Params4bit":
        from fastppo.models.bnb_linears import widened

        return widened(weight)
    scales = weight.SCB if layer.state.SCB is None else layer.state.SCB  # type: ignore[attr-defined]
    return functional.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]


def _is_quantised(layer: Any) -> bool:
    return type(layer.weight).__name__ in ("Int8Params", "Params4bit")

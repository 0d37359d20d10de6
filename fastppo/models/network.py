"""What the engine and the trainer need to know of a transformers model: its body, its head, its hidden states.

Nothing here knows a model by name. The head is taken apart into the numbers that `fastppo.ops` wants, and
`verify_head` checks once, numerically, that this is all the head does.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.models.fusions import fused


def causal_lm(model: nn.Module) -> Any:
    """Return the transformers model inside a value-head wrapper and/or a PEFT model."""
    inner: Any = getattr(model, "pretrained_model", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads a query with an encoder, and its decoder writes the response."""
    return bool(causal_lm(model).config.is_encoder_decoder)


def body(model: nn.Module) -> Any:
    """Return the decoder without its head: input ids to hidden states."""
    inner = causal_lm(model)
    if inner.config.is_encoder_decoder:
        return inner.get_decoder()
    # Some models do not name their body by the prefix of their weights.
    network = getattr(inner, "model", inner) if inner.base_model is inner else inner.base_model
    # The decoders of encoder-decoder models lie in a wrapper that takes anything.
    kind: Any = type(network)
    return network if "input_ids" in _parameters_of(kind) else getattr(network, "decoder", network)


@dataclass(frozen=True, eq=False)
class LanguageHead:
    """The last linear layer as it acts now, adapters included."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float

    def arguments(self, temperature: float) -> dict[str, Any]:
        """Return the keyword arguments that the operations on the head take."""
        return {
            "bias": self.bias,
            "temperature": temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """Return the scaled logits (N, V), fp32 or wider, of hidden states (N, H)."""
        return ops.scaled_logits(hidden, self.weight, **self.arguments(temperature))


def language_head(model: nn.Module) -> LanguageHead:
    """Take the head of a language model apart; call it anew after weights or adapters changed."""
    inner = causal_lm(model)
    module = inner.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(inner).__name__} has no language-model head; load an AutoModelForCausalLM")
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    weight, bias = _effective_linear(module)
    if inner.config.is_encoder_decoder:
        scale = _decoder_scale(inner)
        offset = getattr(inner, "final_logits_bias", None)  # a buffer (1, V) of BART and its descendants
        if offset is not None:
            bias = offset[0].to(weight.dtype) if bias is None else bias + offset[0].to(bias.dtype)
    return LanguageHead(weight, bias, getattr(config, "final_logit_softcapping", None), scale / divisor)


_decoder_scales: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def _decoder_scale(inner: Any) -> float:
    """Return what an encoder-decoder multiplies its last hidden states with before the head: 1 or H**-0.5.

    T5 and some of its descendants do the latter where the head is tied to the embeddings, each with another switch for
    it; so the model's own logits are asked, once.
    """
    if inner not in _decoder_scales:
        with torch.no_grad(), evaluating(inner):
            hidden, logits = own_outputs(inner, *_three_tokens(inner))
            weight, bias = _effective_linear(inner.get_output_embeddings())
            raw = torch.nn.functional.linear(hidden[0].to(weight.dtype), weight, bias).float()
            offset = getattr(inner, "final_logits_bias", None)
            known = 0.0 if offset is None else offset[0].float()
            candidates = 1.0, float(weight.shape[1]) ** -0.5
            errors = [float((logits[0].float() - known - scale * raw).abs().max()) for scale in candidates]
        _decoder_scales[inner] = candidates[errors.index(min(errors))]
    return _decoder_scales[inner]


def _three_tokens(inner: Any) -> tuple[Tensor, Tensor | None]:
    """Return three token ids (1, 3), and as many for the encoder if there is one."""
    vocabulary = len(inner.get_output_embeddings().weight)
    ids = torch.tensor([[1 % vocabulary, 2 % vocabulary, 3 % vocabulary]], device=inner.device)
    return ids, ids if inner.config.is_encoder_decoder else None


def own_outputs(model: nn.Module, ids: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the last hidden states (B, T, H) and logits (B, T, V) of the model's own forward of ids (B, T).

    `source` (B, L) is what an encoder reads; there is no padding.
    """
    inner = causal_lm(model)
    if source is None:
        return last_hidden(model, input_ids=ids, use_cache=False), inner(input_ids=ids, use_cache=False).logits
    seen: list[Tensor] = []
    handle = body(model).register_forward_hook(lambda _, __, output: seen.append(output[0]))
    try:
        logits = inner(input_ids=source, decoder_input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return seen[0], logits


def _effective_linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear layer, seen through PEFT's wrappers, differentiable in the adapter."""
    if hasattr(module, "modules_to_save"):  # a head that is trained as a whole
        names = module.active_adapters
        module = module.original_module if module.disable_adapters or not names else module.modules_to_save[names[0]]
    if not hasattr(module, "get_delta_weight"):
        return module.weight, getattr(module, "bias", None)
    base = module.get_base_layer()
    weight = base.weight
    if not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name in module.lora_A:
                _refuse_variants(module, name)
                weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight, getattr(base, "bias", None)


def _refuse_variants(module: Any, adapter: str) -> None:
    """Raise NotImplementedError for adapters of the head that do more than add B·A to its weight."""
    has_bias = module.lora_B[adapter].bias is not None
    if has_bias or adapter in getattr(module, "lora_variant", {}) or adapter in module.lora_magnitude_vector:
        raise NotImplementedError(
            "DoRA, a LoRA bias and other variants on the language-model head are not supported yet; leave the head out "
            "of target_modules, or train it whole with modules_to_save"
        )


@torch.no_grad()
def verify_head(model: nn.Module) -> None:
    """Raise NotImplementedError unless body and head, taken apart, give the model's own logits."""
    inner = causal_lm(model)
    with evaluating(model):
        hidden, logits = own_outputs(model, *_three_tokens(inner))
        expected, actual = logits[0].float(), language_head(model).logits(hidden[0], 1.0).float()
    error, size = float((expected - actual).abs().max()), float(expected.abs().max())
    if not error <= 1e-2 * max(1.0, size):
        raise NotImplementedError(
            f"the head of {type(inner).__name__} does more than a linear layer with scale and soft cap: logits differ "
            f"by {error:.3g}; this model cannot be trained with fastppo yet"
        )


def last_hidden(model: nn.Module, **inputs: Any) -> Tensor:
    """Run the body; return its last hidden states (B, L, H). Arguments that it does not take are left out."""
    network = body(model)
    kind: Any = type(network)
    taken = _parameters_of(kind)
    hidden: Tensor = network(**{name: value for name, value in inputs.items() if name in taken})[0]
    return hidden


@lru_cache
def _parameters_of(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and the fused kernels on inside, and restore every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with fused(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def short_windows(model: nn.Module, limit: int) -> Iterator[None]:
    """Shorten the model's windows and chunks inside, so that short sequences tell whether they are respected."""
    places: list[Any] = [(module, vars(module)) for module in model.modules()]
    places += [(module.config, vars(module.config)) for module, _ in places if hasattr(module, "config")]
    changed = [
        (place, name, own[name])
        for place, own in places
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(own.get(name), int) and own[name] > limit
    ]
    try:
        for place, name, _ in changed:
            setattr(place, name, limit)
        yield
    finally:
        for place, name, value in changed:
            setattr(place, name, value)


@torch.no_grad()
def to_bf16(model: nn.Module) -> None:
    """Round the weights of the network to bf16, in place; adapters and the value head, which are small, stay fp32.

    Buffers stay as well: the frequencies of a rotary embedding would lose positions.
    """
    inner = causal_lm(model)
    for name, parameter in inner.named_parameters():
        if parameter.dtype == torch.float32 and not ("lora_" in name or "modules_to_save" in name):
            parameter.data = parameter.data.bfloat16()
    inner.config.dtype = torch.bfloat16


def weight_version(model: nn.Module) -> tuple[int, ...]:
    """Return a fingerprint of all the weights and of which adapter is on, and how strongly.

    It is equal if and, but for freak coincidence, only if they are bitwise equal. It reads every weight.
    """
    parameters = list(model.parameters())
    sums = [checksum.to(parameters[0].device) for checksum in map(ops.checksum, parameters)]
    found: list[Any] = [getattr(module, "scaling", None) for module in model.modules()]
    scales = [sorted(scaling.items()) for scaling in found if isinstance(scaling, dict)]
    return (zlib.crc32(repr((active_adapters(model), scales)).encode()), *torch.stack(sums).tolist())


def active_adapters(model: nn.Module) -> list[tuple[bool, tuple[str, ...]]]:
    """Return, for each layer with adapters, whether they are off and which of them are in use."""
    # transformers' own models have methods of these names.
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    return [(layer.disable_adapters, tuple(layer.active_adapters)) for layer in layers]


def context_length(model: Any) -> int | None:
    """Return the number of positions that the model was made for, or None if it sets no limit."""
    return _positions(model, "max_position_embeddings", "max_decoder_position_embeddings", "max_seq_len")


def prompt_length(model: Any) -> int | None:
    """Return the same of what reads prompts, which may be an encoder with positions of its own."""
    return _positions(model, "max_encoder_position_embeddings") or context_length(model)


def _positions(model: Any, *names: str) -> int | None:
    config = causal_lm(model).config.get_text_config()
    length = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    return int(length) if length is not None and length > 0 else None

"""What a decoder does with a few tokens, recorded module by module.

Every module without children has its output replaced by noise of the same shape, so that where a tensor comes from can
be told by its values, whatever the weights are: a projection of zeros hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.models.attach import pinned_rope
from fastppo.models.network import body, causal_lm, evaluating

NUM_TOKENS = 7  # unlike the usual numbers of heads, so that transposed axes do not pass for each other


class UnsupportedModelError(NotImplementedError):
    """Why a model cannot be run as a decode program."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module without children."""

    module: Any
    layer: int  # -1 outside of the layers
    inputs: Tensor
    computed: Tensor
    passed: Tensor  # the noise that went on in its place


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a layer handed to the attention function, and what noise it got back."""

    layer: int
    queries: Tensor  # (NUM_TOKENS, heads, head_size)
    keys: Tensor  # (NUM_TOKENS, kv_heads, head_size)
    values: Tensor  # (NUM_TOKENS, kv_heads, value_size)
    passed: Tensor  # (1, NUM_TOKENS, heads, value_size)
    options: dict[str, Any]


@dataclass(frozen=True, eq=False)
class RotaryCall:
    """The call of a module that makes the cosines and sines of positions."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    angles: tuple[Tensor, Tensor]

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (positions, width), fp32 numbers of the precision that the module gives."""

        def moved(given: Any) -> Any:
            if not isinstance(given, Tensor):
                return given
            return given.new_zeros(1, 1, 1) if given.is_floating_point() else positions[None]

        with torch.no_grad():
            angles = self.module(*map(moved, self.args), **{name: moved(v) for name, v in self.kwargs.items()})
        cosines, sines = (part.reshape(len(positions), -1).float() for part in angles)
        return cosines, sines


@dataclass(eq=False)
class Trace:
    """All that happened in one forward of NUM_TOKENS tokens."""

    token_ids: Tensor  # (NUM_TOKENS,)
    layer_types: list[str]  # the configuration's words for each layer's attention; empty if it has none
    entered: list[Tensor] = field(default_factory=list)  # the hidden states that each layer was given
    left: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    rotaries: list[RotaryCall] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))  # what the body returned
    layer: int = -1
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def noise(self, like: Tensor) -> Tensor:
        """Return noise of the shape and dtype of a tensor."""
        # Of mean 1, so that taking the mean away shows.
        return (1 + torch.randn(like.shape, generator=self.generator)).to(like.dtype)

    def record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """Record a call and return noise in the place of its output; a forward hook."""
        if isinstance(output, tuple):
            if len(output) == 2 and all(isinstance(part, Tensor) and part.is_floating_point() for part in output):
                self.rotaries.append(RotaryCall(module, args, kwargs, output))
            return None
        given = next((part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)), None)
        if not isinstance(output, Tensor) or given is None or output is given or not output.is_floating_point():
            return None
        passed = self.noise(output)
        self.calls.append(Call(module, self.layer, given, output, passed))
        return passed

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Record a call of the attention function and return noise."""
        queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
        passed = self.noise(query.new_empty(1, *queries.shape[:2], values.shape[-1]))
        options["is_causal"] = options.get("is_causal") or getattr(module, "is_causal", True)
        self.attentions.append(AttentionCall(self.layer, queries, keys, values, passed, options))
        return passed, None

    def enter(self, index: int) -> Callable[..., None]:
        """Return the hook for the beginning of a layer."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.layer = index
            self.entered.append(args[0] if args else kwargs["hidden_states"])

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record the end of a layer; a forward hook."""
        self.layer = -1
        self.left.append(output[0] if isinstance(output, tuple) else output)


@torch.no_grad()
def trace(model: nn.Module) -> Trace:
    """Run the body of a causal language model on NUM_TOKENS tokens and return what its modules did.

    Raises UnsupportedModelError if it has no list of layers or does not run so.
    """
    network = body(model)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    kinds = getattr(causal_lm(model).config.get_text_config(), "layer_types", None) or []
    record = Trace(torch.arange(1, NUM_TOKENS + 1) % vocabulary, list(kinds))
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(pinned_rope(model))
        stack.enter_context(_unfused(network))
        stack.enter_context(_attention_is(network, record.attend))
        for index, layer in enumerate(decoder_layers(model)):
            stack.enter_context(layer.register_forward_pre_hook(record.enter(index), with_kwargs=True))
            stack.enter_context(layer.register_forward_hook(record.leave))
        for module in {id(leaf): leaf for leaf in _leaves(network)}.values():
            stack.enter_context(module.register_forward_hook(record.record, with_kwargs=True))
        try:
            record.hidden = network(input_ids=record.token_ids[None], use_cache=False)[0]
        except Exception as error:
            raise UnsupportedModelError(f"its forward does not bear being traced: {error}") from error
    return record


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of layers, the largest of as many modules as the configuration has layers."""
    count = causal_lm(model).config.get_text_config().num_hidden_layers
    lists = [m for m in body(model).modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UnsupportedModelError(f"it has no list of {count} layers")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules without children; those that PEFT has wrapped count as one."""
    if not any(module.children()) or hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
        yield module
        return
    for child in module.children():
        yield from _leaves(child)


@contextmanager
def _unfused(network: nn.Module) -> Iterator[None]:
    """Let every module compute by its class's own forward inside, which calls its parts one by one."""
    replaced = [(module, vars(module).pop("forward")) for module in network.modules() if "forward" in vars(module)]
    try:
        yield
    finally:
        for module, forward in replaced:
            vars(module)["forward"] = forward


_TRACED = "fastppo_traced"


@contextmanager
def _attention_is(network: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let every layer call `function` for attention inside."""
    from transformers import AttentionInterface

    AttentionInterface.register(_TRACED, function)
    configs = {id(m.config): m.config for m in network.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = _TRACED
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        AttentionInterface.register(_TRACED, Trace.attend)  # the trace itself would keep every activation alive

"""The reference policy: the same weights with the adapter off, a frozen adapter, or a second set of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastppo.models.adapters import adapter_parameters, add_adapter, copy_adapter, using_adapter, without_adapters
from fastppo.models.loading import adopt_quantised

_PATTERNS = (
    "transformer.h.{layer}",
    "model.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",
    "decoder.block.{layer}",  # T5's; of an encoder-decoder the whole encoder lies below it
)
REFERENCE_ADAPTER = "fastppo_reference"


def create_reference_model(model: Any, num_shared_layers: int | None = None, pattern: str | None = None) -> Any:
    """Return a frozen copy of a model; with `num_shared_layers` the layers below that one are the same tensors.

    Sharing freezes the embeddings and the first `num_shared_layers` layers of the policy too, so that the two cannot
    drift apart. `pattern` names a layer where the usual names do not fit, as in "transformer.h.{layer}".
    Raises ValueError if there is no layer with that number.
    """
    shared = _lower_parameters(model, num_shared_layers, pattern) if num_shared_layers else []
    for parameter in shared:
        parameter.requires_grad_(False)
    # Deep copying leaves alone what the memo already holds: the shared parameters stay the same objects, and a second
    # network that serves as critic is none of the reference's.
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    if getattr(model, "critic", None) is not None:
        memo[id(model.critic)] = None
    reference = copy.deepcopy(model, memo)
    return reference.requires_grad_(False).eval()


def _lower_parameters(model: nn.Module, num_shared_layers: int, pattern: str | None) -> list[nn.Parameter]:
    named = list(model.named_parameters())
    patterns = [pattern] if pattern is not None else list(_PATTERNS)
    for candidate in patterns:
        prefix = candidate.format(layer=num_shared_layers) + "."
        for index, (name, _) in enumerate(named):
            if prefix in name:
                return [parameter for _, parameter in named[:index]]
    raise ValueError(
        f"num_shared_layers={num_shared_layers}: no parameter belongs to a layer of that number (looked for "
        f"{', '.join(repr(p.format(layer=num_shared_layers)) for p in patterns)}); choose a smaller number or a pattern"
    )


class Reference:
    """Gives access to the reference policy of a trainer, whichever way it is kept."""

    def __init__(self, model: Any, ref_model: Any = None, num_shared_layers: int | None = None):
        self.model, self.ref_model = model, ref_model
        self._has_adapter = False
        if ref_model is None and not model.is_peft_model:
            self.ref_model = create_reference_model(model, num_shared_layers)
        elif ref_model is None:
            self._has_adapter = _keep_trained_adapter(model.pretrained_model)
        if self.ref_model is not None:
            adopt_quantised(self.ref_model)
            self.ref_model.requires_grad_(False).eval()

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Yield the model that acts as the reference inside the block."""
        if self.ref_model is not None:
            yield self.ref_model
        elif self._has_adapter:
            with using_adapter(self.model.pretrained_model, REFERENCE_ADAPTER):
                yield self.model
        else:
            with without_adapters(self.model.pretrained_model):
                yield self.model


def _is_fresh(peft_model: Any, adapter: str) -> bool:
    """Whether the adapter does nothing yet: LoRA whose B matrices are all zero."""
    matrices = [p for name, p in peft_model.named_parameters() if f"lora_B.{adapter}." in name]
    matrices += [p for name, p in peft_model.named_parameters() if name.endswith(f"lora_embedding_A.{adapter}")]
    trained_whole = any(f"modules_to_save.{adapter}." in name for name, _ in peft_model.named_parameters())
    return bool(matrices) and not any(bool(matrix.any()) for matrix in matrices) and not trained_whole


def _keep_trained_adapter(peft_model: Any) -> bool:
    """Freeze a copy of the adapter as the reference if the run starts from a trained one; return whether it did."""
    active = next(iter(peft_model.active_adapters))
    if _is_fresh(peft_model, active):
        return False
    if REFERENCE_ADAPTER not in peft_model.peft_config:
        add_adapter(peft_model, REFERENCE_ADAPTER, copy.deepcopy(peft_model.peft_config[active]))
        copy_adapter(peft_model, active, REFERENCE_ADAPTER)
    for parameter in adapter_parameters(peft_model, REFERENCE_ADAPTER):
        parameter.requires_grad_(False)
    return True

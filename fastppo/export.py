"""A trained model for others to use: one set of plain transformers weights, without adapter and quantisation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastppo.atomic import Pathlike, atomic_directory
from fastppo.engine import prompts as incoming
from fastppo.models.loading import Source, load_base
from fastppo.models.merge import merged_weights
from fastppo.models.network import causal_lm, is_encoder_decoder
from fastppo.models.value_head import VALUE_HEAD_FILE

# Without a tokenizer: this many prompts of this many random tokens.
_PROMPTS, _LENGTH = 4, 32
_TEXTS = ("Once upon a time", "The film was", "To compute the mean of a list of numbers,", "Why is the sky blue?")


@dataclass(frozen=True)
class LogitChange:
    """How the logits of an exported model, read back from disk, differ from those of its source."""

    largest: float
    mean: float
    spread: float
    """Standard deviation of the source's logits over the vocabulary, in the mean over positions."""
    same_choice: float
    """Share of the positions at which the most probable token is the same."""
    positions: int

    def __str__(self) -> str:
        return (
            f"logits changed by {self.mean:.3g} in the mean and by {self.largest:.3g} at most over {self.positions} "
            f"positions, where their standard deviation is {self.spread:.3g}; the most probable token is the same at "
            f"{self.same_choice:.1%}"
        )


def export(
    source: Pathlike,
    destination: Pathlike,
    *,
    merged: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    value_head: bool = False,
    tokenizer: Any = None,
    prompts: Sequence[Any] | None = None,
    **loading: Any,
) -> LogitChange:
    """Write a model as plain transformers safetensors, in one precision throughout; return what that changed.

    Args:
        source: directory or hub name of a model or of an adapter.
        destination: directory to make; it appears whole or not at all.
        merged: needed for an adapter: add it to its base.
        dtype: of the written weights; adapters are added in fp32 before.
        value_head: write the source's value head too, in fp32 as value_head.safetensors.
        tokenizer: saved beside the model; also reads prompts.
        prompts: texts or lists of token ids on which the logits are compared; by default a few.
        loading: transformers' `from_pretrained`; load_in_8bit=True for an adapter that was trained on an 8-bit base.

    An 8- or 4-bit base is dequantised. Raises ValueError if the destination exists, for an adapter without `merged`,
    and for a value head that is not there; NotImplementedError for adapters that cannot be merged.
    """
    destination = Path(destination)
    if destination.exists():
        raise ValueError(f"{destination} exists already; choose another destination, or remove it")
    # Not held here, so that there are never two models in memory.
    ids, before = _write(_load(source, merged, value_head, loading), destination, dtype, value_head, tokenizer, prompts)
    return _change(before, _logits(load_base(destination, dtype=dtype).model, ids))


def _load(name: Pathlike, merged: bool, value_head: bool, loading: dict[str, Any]) -> Source:
    source = load_base(name, **loading)
    if hasattr(source.model, "peft_config") and not merged:
        raise ValueError(
            f"{name} is an adapter, which PEFT opens as it is; pass merged (--merged) to write one model with its base"
        )
    if value_head and source.value_head is None:
        raise ValueError(f"{name} has no value head; leave value_head out")
    return source


def _write(
    source: Source, destination: Path, dtype: torch.dtype, value_head: bool, tokenizer: Any, prompts: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Write everything; return the prompts and the source's logits on them. The source is let go at the end."""
    inner = causal_lm(source.model)
    if prompts is None:
        vocabulary = len(inner.get_input_embeddings().weight)
        draw = torch.Generator().manual_seed(0)
        random = torch.randint(vocabulary, (_PROMPTS, _LENGTH), generator=draw)
        prompts = list(random) if tokenizer is None else _TEXTS
    ids = incoming.encode(prompts, source.model, tokenizer)
    weights = merged_weights(source.model, dtype)
    with atomic_directory(destination) as target:
        _skeleton(inner, dtype, weights).save_pretrained(target, state_dict=weights)
        if value_head and source.value_head is not None:
            head = {f"v_head.{name}": tensor.float() for name, tensor in source.value_head.items()}
            save_file(head, target / VALUE_HEAD_FILE, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        before = _logits(source.model, ids)
    return ids, before


def _skeleton(inner: Any, dtype: torch.dtype, weights: dict[str, Tensor]) -> Any:
    """Return the plain model without weights, to write them by."""
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = {id(module): name for name, module in inner.named_modules()}
    ends = [names[id(end)] for end in (inner.get_input_embeddings(), inner.get_output_embeddings())]
    first, last = (weights.get(f"{end}.weight") for end in ends)
    if first is not last:  # perhaps only now: an adapter on one of them parts what was tied
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    with torch.device("meta"):
        model = type(inner)(config).to(dtype)
    model.generation_config = inner.generation_config
    return model


@torch.no_grad()
def _logits(model: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits (L, V) of each prompt, fp32 on the CPU."""
    inner = causal_lm(model).eval()  # as others will run it, without fused kernels
    names = ("input_ids", "decoder_input_ids") if is_encoder_decoder(inner) else ("input_ids",)
    inputs = [dict.fromkeys(names, one[None].to(inner.device)) for one in ids]
    return [inner(**one, use_cache=False).logits[0].float().cpu() for one in inputs]


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> LogitChange:
    first, second = torch.cat(list(before)), torch.cat(list(after))
    differences = (first - second).abs()
    same = (first.argmax(-1) == second.argmax(-1)).float().mean()
    spread = first.std(-1).mean()
    return LogitChange(float(differences.max()), float(differences.mean()), float(spread), float(same), len(first))

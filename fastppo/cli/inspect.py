"""`fastppo inspect`: what fastppo makes of a model, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastppo.attention import LayerShape
from fastppo.cli.arguments import parse_dataclasses
from fastppo.cli.loading import check_directory, load_tokenizer

_TIERS = {
    "A": "paged cache on fastppo's attention",
    "B": "left-padded cache on the model's own attention",
    "C": "a slot for the states of each sequence",
    "D": "no cache: whole sequences anew at every token",
}
_SEQ2SEQ_TIERS = {
    "B": "the encoder once a prompt, a left-padded cache of the decoder",
    "C": "the encoder once a prompt, responses that start together",
}
_UNSERVED = ", for which there are no kernels here: by a slower tier"


@dataclass
class InspectArguments:
    """What `fastppo inspect` needs."""

    model_name_or_path: str
    """Directory or hub name of a language model or of an adapter."""
    load_in_8bit: bool = False
    """Load the base in 8 bits."""
    load_in_4bit: bool = False
    """Load the base in 4 bits."""
    int8_meaning: str | None = None
    """What 8-bit layers compute: weight_only, the default, or row_wise, which rounds activations to int8 as well."""
    texts: str | None = None
    """File or dataset of texts on which the 8-bit or 4-bit model is compared with the unquantised one."""
    text_column: str = "text"
    """The column of `texts`."""
    max_texts: int = 64
    """Texts to compare on, at most."""
    config: str | None = None
    """YAML file of flags; those on the command line override it."""


def inspect(arguments: list[str]) -> int:
    """Run `fastppo inspect` with these arguments; return the exit code."""
    (options,) = parse_dataclasses("fastppo inspect", (InspectArguments,), arguments)
    check_directory(options.model_name_or_path, "check model_name_or_path")
    from transformers.utils import logging as transformers_logging

    quantised: dict[str, Any] = {name: True for name in ("load_in_8bit", "load_in_4bit") if getattr(options, name)}
    quantised |= {} if options.int8_meaning is None else {"int8_meaning": options.int8_meaning}
    if options.texts is not None and not quantised:
        raise ValueError(f"texts={options.texts!r} compare a quantised model with its base: add load_in_8bit or _4bit")
    sequences = None if options.texts is None else _read_texts(options)
    # The probe runs the model in ways that it warns of; what comes of them is in the table.
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        rows = describe(_load(options, quantised))
        rows += [] if sequences is None else _accuracy(options, quantised, sequences)
    finally:
        transformers_logging.set_verbosity(level)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}".rstrip())
    return 0


def _load(options: InspectArguments, quantised: dict[str, Any]) -> Any:
    from fastppo.models.loading import load_base

    return load_base(options.model_name_or_path, **quantised).model


def _read_texts(options: InspectArguments) -> list[Tensor]:
    from fastppo.cli.data import read_rows

    rows = read_rows(str(options.texts), limit=options.max_texts)
    if options.text_column not in rows[0]:
        raise ValueError(f"{options.texts} has no column {options.text_column!r}, only {sorted(rows[0])}")
    tokenizer = load_tokenizer(options.model_name_or_path)
    return [tokenizer(row[options.text_column], return_tensors="pt").input_ids[0] for row in rows]


def _accuracy(options: InspectArguments, quantised: dict[str, Any], sequences: list[Tensor]) -> list[tuple[str, str]]:
    """Compare the quantised model with what it was made from."""
    from fastppo.models.accuracy import compare

    found = compare(_load(options, {}), _load(options, quantised), sequences)
    return [
        ("quantised", f"{found.tokens:,} tokens of {len(sequences)} texts, against the unquantised model"),
        ("  log-probs", f"off by {found.mean_gap:.3g} in the mean, {found.max_gap:.3g} at most"),
        ("  KL", f"{found.mean_kl:.3g} nats in the mean, {found.max_kl:.3g} at most"),
        ("  perplexity", f"{found.other_perplexity:.4g}, unquantised {found.perplexity:.4g}"),
    ]


def describe(model: Any) -> list[tuple[str, str]]:
    """Return names and values of what is known of a model, a probe by short random sequences included."""
    from fastppo.models.network import causal_lm, context_length

    inner = causal_lm(model)
    parameters = list(model.parameters())
    context = context_length(model)
    rows = [
        ("model type", f"{inner.config.model_type} ({type(inner).__name__})"),
        ("parameters", f"{sum(p.numel() for p in parameters):,}, {str(inner.dtype).removeprefix('torch.')}"),
        ("of these trained", f"{sum(p.numel() for p in parameters if p.requires_grad):,}"),
        ("context length", "no limit" if context is None else f"{context:,} tokens"),
    ]
    return rows + _layouts(model) + _features(model) + _parts(model)


def _layouts(model: Any) -> list[tuple[str, str]]:
    from fastppo.engine.tiers import capabilities
    from fastppo.models import probe
    from fastppo.models.network import causal_lm, is_encoder_decoder
    from fastppo.ops.attention import has_paged_kernels

    found = capabilities(model)
    tiers = _SEQ2SEQ_TIERS if is_encoder_decoder(model) else _TIERS
    is_served = found.tier != "A" or has_paged_kernels(causal_lm(model).device)
    rows = [
        ("generation", f"tier {found.tier}: {tiers[found.tier]}{'' if is_served else _UNSERVED}"),
        ("log-probs", f"within {found.verdict.error:.2g} of the model's own; the bound is {found.verdict.bound:.2g}"),
        *((f"not tier {tier}", reason) for tier, reason in found.refused.items()),
    ]
    packed, padded = probe.trains_packed(model), probe.padded(model)
    kind = "packed" if packed else "padded on the right" if padded else f"not possible: {padded.reason}"
    return [*rows, ("training", kind)]


def _features(model: Any) -> list[tuple[str, str]]:
    """Describe the attention: windows, caps, sinks, rope, and what a token costs in the cache."""
    from fastppo.models import probe
    from fastppo.models.attach import batch_dependent_rotaries
    from fastppo.models.network import causal_lm
    from fastppo.ops.attention import has_paged_kernels

    inner = causal_lm(model)
    pinned = sorted({str(rotary.rope_type) for rotary in batch_dependent_rotaries(model)})
    rows = [("rope pinned", ", ".join(pinned))] if pinned else []
    if not probe.packed(model):
        return rows
    layers = probe.layer_shapes(model)
    windows = Counter("everything" if shape.window is None else f"{shape.window} tokens" for shape in layers.values())
    size = sum(shape.kv_heads * (shape.head_size + shape.value_size) for shape in layers.values())
    features = sorted({name for shape in layers.values() for name in shape.features})
    rows.append(("attention layers", ", ".join(f"{count} that see {window}" for window, count in windows.items())))
    rows += [("with", ", ".join(features))] if features else []
    rows.append(("cache", f"{size * inner.dtype.itemsize:,} bytes a token"))
    if inner.device.type == "cuda":
        return [*rows, ("decode step", "the model's modules, captured as CUDA graphs where they can be")]
    has_program = inner.device.type == "cpu" and has_paged_kernels(inner.device) and probe.paged(model)
    return [*rows, ("decode step", _decode_step(model, layers))] if has_program else rows


def _decode_step(model: Any, layers: Mapping[int, LayerShape]) -> str:
    from fastppo.engine.kv import PagedCache
    from fastppo.engine.program import build_program
    from fastppo.engine.steps import program_step
    from fastppo.models.network import causal_lm

    cache = PagedCache(layers, causal_lm(model).get_input_embeddings().weight, None)
    if program_step(model, cache) is not None:
        return "one call of C++ for the body"
    program, reason = build_program(model)
    return f"the model's modules: {reason if program is None else 'the C++ program gives other log-probs'}"


def _parts(model: Any) -> list[tuple[str, str]]:
    """Describe what runs as C++ or as a fused operation."""
    from fastppo.models import fusions
    from fastppo.models.network import verify_head

    found = Counter(fusion.kind for fusion in fusions.find(model))
    rows = [("fused", ", ".join(f"{count} {kind}" for kind, count in found.items()) or "nothing")]
    try:
        verify_head(model)
    except NotImplementedError as error:
        rows.append(("head", str(error)))
    return rows

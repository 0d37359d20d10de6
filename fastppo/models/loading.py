"""Loading: which base, which adapter, which dtype, which value head."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_HEAD_PREFIX = "v_head."
_HEAD_FILE = "value_head.safetensors"


@dataclass(frozen=True)
class Source:
    """A loaded model and the value head that lay beside it, if any."""

    model: Any
    value_head: dict[str, Tensor] | None


def load_base(source: Any, *model_args: Any, **kwargs: Any) -> Source:
    """Load a model by name or path, or take a loaded one; add or continue an adapter. See `from_pretrained`.

    Whether it `is_encoder_decoder` is what its configuration says, where it is not given.
    """
    meaning = kwargs.pop("int8_meaning", None)
    found = _load(source, *model_args, **kwargs)
    if meaning is not None:
        from fastppo.models.bnb_linears import set_int8_meaning

        set_int8_meaning(found.model, meaning)
    return found


def _load(source: Any, *model_args: Any, **kwargs: Any) -> Source:
    peft_config = kwargs.pop("peft_config", None)
    is_trainable = kwargs.pop("is_trainable", True)
    _check_peft_config(peft_config)
    if not isinstance(source, (str, os.PathLike)):
        return Source(_with_adapter(source, peft_config), None)
    name = os.fspath(source)
    kwargs = translate_quantisation(kwargs)
    hub = hub_arguments(kwargs)
    head = read_value_head(name, **hub)
    if find_file(name, "adapter_config.json", **hub) is not None:
        if peft_config is not None:
            raise ValueError(
                f"{name} is an adapter already, so peft_config cannot add another; leave peft_config out to train it "
                "further, or load its base model"
            )
        return Source(_load_adapter(name, is_trainable, *model_args, **kwargs), head)
    if "dtype" not in kwargs:  # a frozen base may stay in the checkpoint's dtype; what is trained may not
        trains_base = peft_config is None or bool(getattr(peft_config, "modules_to_save", None))
        kwargs["dtype"] = torch.float32 if trains_base else "auto"
    return Source(_with_adapter(load_transformers(name, *model_args, **kwargs), peft_config), head)


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those of `from_pretrained`'s arguments that say where in a hub repository to look."""
    return {key: kwargs[key] for key in ("revision", "token", "subfolder", "cache_dir") if key in kwargs}


def translate_quantisation(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn load_in_8bit, load_in_4bit, bnb_* and torch_dtype, which transformers 5 refuses, into what it takes."""
    kwargs = dict(kwargs)
    if "torch_dtype" in kwargs:
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    names = [name for name in kwargs if name.startswith(("load_in_", "bnb_", "llm_int8_"))]
    options = {name: kwargs.pop(name) for name in names}
    if not (options.get("load_in_8bit") or options.get("load_in_4bit")):
        return kwargs
    if kwargs.get("quantization_config") is not None:
        raise ValueError(f"got both quantization_config and {sorted(options)}; pass only quantization_config")
    from transformers import BitsAndBytesConfig

    kwargs["quantization_config"] = BitsAndBytesConfig(**options)
    kwargs.setdefault("device_map", {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"})
    return kwargs


def _check_peft_config(peft_config: Any) -> None:
    if peft_config is None:
        return
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}")
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"prompt-learning adapters ({type(peft_config).__name__}) have no reference to fall back to; use LoraConfig"
        )


def reads_with_encoder(name: str, **hub: Any) -> bool:
    """Whether a model, or the base model of an adapter, is an encoder-decoder by its configuration."""
    from transformers import AutoConfig

    adapter = find_file(name, "adapter_config.json", **hub)
    if adapter is not None:
        with open(adapter, encoding="utf-8") as file:
            return reads_with_encoder(json.load(file)["base_model_name_or_path"])
    return bool(AutoConfig.from_pretrained(name, **hub).is_encoder_decoder)


def load_transformers(name: str, *model_args: Any, is_encoder_decoder: bool | None = None, **kwargs: Any) -> Any:
    """Load a language model, without a word on our own value head. Raises ValueError for one of the other kind."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if is_encoder_decoder is None:
        is_encoder_decoder = reads_with_encoder(name, **hub_arguments(kwargs))
    kind: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    # The logger's name is that of transformers' module that reports on loading.
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_news)
    try:
        return kind.from_pretrained(name, *model_args, **kwargs)
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        other = "Causal" if is_encoder_decoder else "Seq2Seq"
        raise ValueError(
            f"{name} is no model of the kind {kind.__name__}; load it with AutoModelFor{other}LMWithValueHead"
        ) from error
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a loading report names anything but our own value head, which plain transformers does not know."""
    rows = [line for line in record.getMessage().splitlines() if " | " in line and not line.startswith("Key")]
    return not rows or not all(row.startswith(_HEAD_PREFIX) for row in rows)


def _load_adapter(name: str, is_trainable: bool, *model_args: Any, **kwargs: Any) -> Any:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(name)
    _check_peft_config(config)
    dtype = torch.float32 if getattr(config, "modules_to_save", None) else "auto"
    base = load_transformers(str(config.base_model_name_or_path), *model_args, **{"dtype": dtype, **kwargs})
    adopt_quantised(base)
    return PeftModel.from_pretrained(base, name, is_trainable=is_trainable)


def _with_adapter(model: Any, peft_config: Any) -> Any:
    _check_peft_config(getattr(model, "active_peft_config", None))
    adopt_quantised(model)
    if peft_config is None:
        return model
    from peft import get_peft_model

    if hasattr(model, "peft_config"):
        raise ValueError("the model has an adapter already; pass it without peft_config, or pass its base model")
    return get_peft_model(model, peft_config)


def adopt_quantised(model: Any) -> None:
    """Let bitsandbytes' quantised layers compute with one meaning from here on; see `models.bnb_linears`."""
    if any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
        from fastppo.models.bnb_linears import adopt

        adopt(model)


def find_file(name: str, file: str, **hub: Any) -> str | None:
    """Return the path of a file of a directory or hub repository, None where there is no such file."""
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **hub,
    )
    return found


def read_value_head(name: str, **hub: Any) -> dict[str, Tensor] | None:
    """Return the tensors of a checkpoint's value head, without their prefix, or None if it has none.

    Raises ValueError if the head is only there as a pickle, which is never opened.
    """
    for file in (_HEAD_FILE, "model.safetensors", *_head_shards(name, **hub)):
        path = find_file(name, file, **hub)
        head = _head_tensors(path) if path is not None else {}
        if head:
            return head
    has_weights = find_file(name, "model.safetensors", **hub) or find_file(name, "model.safetensors.index.json", **hub)
    if not has_weights and find_file(name, "pytorch_model.bin", **hub):
        raise ValueError(
            f"{name} holds pytorch_model.bin, a pickle, which is never opened; run: fastppo convert {name} DEST"
        )
    return None


def _head_shards(name: str, **hub: Any) -> list[str]:
    index = find_file(name, "model.safetensors.index.json", **hub)
    if index is None:
        return []
    with open(index, encoding="utf-8") as file:
        weight_map = json.load(file)["weight_map"]
    return sorted({shard for tensor, shard in weight_map.items() if tensor.startswith(_HEAD_PREFIX)})


def _head_tensors(path: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(_HEAD_PREFIX)]  # noqa: SIM118 - not a mapping
        return {name.removeprefix(_HEAD_PREFIX): file.get_tensor(name) for name in names}

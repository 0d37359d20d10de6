"""`fastppo plan`: what a run will take of memory, from a model's configuration alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastppo.cli.arguments import UsageError, parse_dataclasses
from fastppo.cli.loading import check_directory
from fastppo.config import PPOConfig

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_MOST_TOKENS = 2**17  # of models whose context has no limit
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class PlanArguments:
    """What `fastppo plan` needs beside the settings of `PPOConfig`."""

    model_name_or_path: str
    """Directory or hub name of a language model, of which only the configuration is read."""
    memory: str | None = None
    """Bytes that there are, such as 24GB or 16GiB; by default what is free here."""
    prompt: int = 512
    """Tokens of the longest prompt."""
    response: int = 512
    """Tokens of the longest response."""
    batch: int | None = None
    """Samples in a step; another name of batch_size."""
    device: str = "cpu"
    """Where the run will be: cpu or cuda."""
    dtype: str | None = None
    """Of the weights: float32, bfloat16 or float16; by default float32 for what is trained."""
    lora_r: int | None = None
    """Rank of a LoRA adapter; by default all weights are trained."""
    lora_target_modules: list[str] | None = None
    """Layers that get an adapter; by default all linear ones but the head."""
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    json: bool = False
    """Print the figures as JSON."""
    config: str | None = None
    """YAML file of flags; those on the command line override it."""

    def check(self) -> None:
        """Raise ValueError, with the value, the expectation and the remedy, if a setting cannot work."""
        for name in ("prompt", "response", "batch", "lora_r"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other; leave one out")


def plan(arguments: list[str]) -> int:
    """Run `fastppo plan` with these arguments; return 0 if the run fits, else 1."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model_name_or_path", *arguments]
    options, config = parse_dataclasses("fastppo plan", (PlanArguments, PPOConfig), arguments)
    options.check()
    if options.batch is not None:
        config.batch_size = options.batch
    config.check()
    found = examine(options, config)
    print(json.dumps(found, indent=1) if options.json else _table(found))
    return 0 if found["fits"] else 1


def examine(options: PlanArguments, config: PPOConfig) -> dict[str, Any]:
    """Return bytes by phase and item, the verdict, the largest batch and response that fit, and what saves most."""
    from fastppo.planner import Work, advice
    from fastppo.planner.network import build
    from fastppo.trainers.rehearsal import Rehearsal

    model, weights = _read(options, config)
    memory = _free(options.device) if options.memory is None else parse_bytes(options.memory)
    work = Work(options.prompt, options.response, config, options.device, memory)
    context = getattr(model.get_text_config(), "max_position_embeddings", None)
    if context is not None and options.prompt + options.response > context:
        raise ValueError(
            f"prompt and response have {options.prompt} + {options.response} tokens, but the model's context is "
            f"{context}; shorten one of them"
        )
    rehearsal = Rehearsal(build(model, weights, config))
    found = rehearsal.plan(work)
    flags, best = _best_setting(model, weights, work)

    def with_batch(number: int) -> int:
        return advice.needed(rehearsal.plan(advice.with_batch(work, number)))

    def with_response(number: int) -> int:
        return advice.needed(rehearsal.plan(replace(work, response=number)))

    batch = advice.largest(with_batch, memory, advice.MOST_SAMPLES)
    longest = (_MOST_TOKENS if context is None else context) - options.prompt
    return {
        "model": options.model_name_or_path,
        "phases": found.phases,
        "peak_bytes": found.peak,
        "needed_bytes": advice.needed(found),
        "memory_bytes": memory,
        "fits": advice.needed(found) <= memory,
        "largest_batch": batch and advice.with_batch(work, batch).config.batch_size,
        "largest_response": advice.largest(with_response, memory, longest),
        "best_setting": {"flags": flags, "peak_bytes": best.peak} if best.peak < found.peak else None,
    }


def _best_setting(model: Any, weights: Any, work: Any) -> tuple[str, Any]:
    """Return the flags of the change that takes least, and its plan."""
    from fastppo.planner import advice
    from fastppo.planner.network import build
    from fastppo.trainers.rehearsal import Rehearsal

    tried = [
        (one.flags, Rehearsal(build(model, one.weights, one.work.config)).plan(one.work))
        for one in advice.settings(weights, work)
    ]
    return min(tried, key=lambda pair: pair[1].peak)


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as 24GB, 16GiB or 8000000 says. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not found:
        raise UsageError(f"memory must be a number of bytes such as 24GB, 16GiB or 8000000000, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _free(device: str) -> int:
    import torch

    from fastppo.engine.kv import free_bytes

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no GPU here whose memory could be asked for; say how much it has: --memory 24GB")
    return free_bytes(torch.device(device))


def _read(options: PlanArguments, config: PPOConfig) -> tuple[Any, Any]:
    """Return the configuration of the model, and how its weights will lie in memory."""
    import torch
    from transformers import AutoConfig

    from fastppo.planner.network import Weights

    name, targets = options.model_name_or_path, options.lora_target_modules
    check_directory(name, "check model_name_or_path")
    rank = options.lora_r
    if Path(name, "adapter_config.json").is_file():
        adapter = json.loads(Path(name, "adapter_config.json").read_text(encoding="utf-8"))
        name, rank, targets = adapter["base_model_name_or_path"], adapter["r"], adapter["target_modules"]
    weights = Weights(
        dtype=None if options.dtype is None else getattr(torch, _DTYPES[options.dtype]),
        bits=8 if options.load_in_8bit else 4 if options.load_in_4bit else None,
        lora_r=rank,
        lora_targets="all-linear" if targets in (None, ["all-linear"]) else tuple(targets),
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return AutoConfig.from_pretrained(name), weights


def _table(found: dict[str, Any]) -> str:
    """Lay the figures out: a line for each item, a column for each phase."""
    phases, memory, peak = found["phases"], found["memory_bytes"], found["peak_bytes"]
    items = list(dict.fromkeys(item for one in phases.values() for item in one))
    lines = [f"{'GB':16}" + "".join(f"{name:>12}" for name in phases)]
    for item in items:
        lines.append(f"{item:16}" + "".join(f"{one.get(item, 0) / 1e9:12.3f}" for one in phases.values()))
    lines.append(f"{'together':16}" + "".join(f"{sum(one.values()) / 1e9:12.3f}" for one in phases.values()))
    missing = found["needed_bytes"] - memory
    verdict = "fits" if found["fits"] else f"lacks {missing / 1e9:.3f} GB"
    best, batch, response = found["best_setting"], found["largest_batch"], found["largest_response"]
    lines += [
        "",
        f"peak              {peak / 1e9:.3f} GB of {memory / 1e9:.3f} GB: {verdict} (3% are kept in reserve)",
        f"largest batch     {batch or 'none fits'}",
        f"largest response  {response or 'none fits'}",
        "what saves most   " + ("nothing" if best is None else f"{best['flags']}: {best['peak_bytes'] / 1e9:.3f} GB"),
    ]
    return "\n".join(lines)

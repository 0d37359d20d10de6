"""`fastppo generate`: talk to a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastppo.cli.arguments import parse_dataclasses
from fastppo.cli.loading import load_tokenizer
from fastppo.config import SamplingConfig


@dataclass
class GenerateArguments:
    """What `fastppo generate` needs."""

    model_name_or_path: str
    """Directory or hub name of a language model or of an adapter."""
    prompt: str | None = None
    """Text to continue; without one, prompts are read from standard input, a line each, until an empty one."""
    n: int = 1
    """Completions for each prompt."""
    chat: bool = False
    """Hand the prompt over as a user's message, through the model's chat template."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    seed: int | None = None
    """By default every call draws other random numbers."""
    config: str | None = None
    """YAML file of flags; those on the command line override it."""


def generate(arguments: list[str]) -> int:
    """Run `fastppo generate` with these arguments; return the exit code."""
    (options,) = parse_dataclasses("fastppo generate", (GenerateArguments,), arguments)
    if options.n < 1:
        raise ValueError(f"n must be at least 1, got {options.n}")
    sampling = _sampling(options)
    from fastppo.engine.engine import Engine
    from fastppo.models.loading import load_base

    tokenizer = load_tokenizer(options.model_name_or_path)
    model = load_base(options.model_name_or_path).model
    seed = time.time_ns() % 2**31 if options.seed is None else options.seed
    engine = Engine(model, tokenizer, seed=seed)
    for prompt in [options.prompt] if options.prompt is not None else _typed():
        request: Any = [{"role": "user", "content": prompt}] if options.chat else prompt
        rollout = engine.generate([request], sampling, n=options.n)
        for response in rollout:
            print(tokenizer.decode(response.tolist(), skip_special_tokens=True), flush=True)
    return 0


def _sampling(options: GenerateArguments) -> SamplingConfig:
    is_greedy = options.temperature == 0
    return SamplingConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=not is_greedy,
        temperature=1.0 if is_greedy else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_strings=tuple(options.stop_strings),
    )


def _typed() -> Iterator[str]:
    """Yield the lines of standard input up to an empty one or its end."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line

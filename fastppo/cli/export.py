"""`fastppo export`: a trained model as plain weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastppo.cli.arguments import parse
from fastppo.cli.loading import check_directory, load_tokenizer

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def export(arguments: list[str]) -> int:
    """Run `fastppo export` with these arguments; return the exit code."""
    given = parse(_parser(), arguments)
    check_directory(given.source, "check the source")
    import torch

    from fastppo.export import export as write

    tokenizer = _tokenizer(given.source)
    if given.prompt and tokenizer is None:
        raise ValueError(f"--prompt needs a tokenizer, and {given.source} has none; leave it out")
    loading = {name: True for name in ("load_in_8bit", "load_in_4bit") if getattr(given, name)}
    change = write(
        given.source,
        given.destination,
        merged=given.merged,
        dtype=getattr(torch, _DTYPES[given.dtype]),
        value_head=given.value_head,
        tokenizer=tokenizer,
        prompts=given.prompt,
        **loading,
    )
    print(f"wrote {Path(given.destination)}: {change}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fastppo export", description="Write a model as plain transformers weights, and say what that changed."
    )
    parser.add_argument("source", help="directory, or name on the Hugging Face hub, of a model or of an adapter")
    parser.add_argument("destination", help="directory to make")
    parser.add_argument("--merged", action="store_true", help="add an adapter to its base, which is dequantised")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the written weights (default: bf16)")
    parser.add_argument("--value_head", action="store_true", help="write the value head too, beside the model")
    parser.add_argument("--load_in_8bit", action="store_true", help="the adapter was trained on its base in 8 bits")
    parser.add_argument("--load_in_4bit", action="store_true", help="the adapter was trained on its base in 4 bits")
    parser.add_argument("--prompt", action="append", help="a text to compare logits on; may be given several times")
    return parser


def _tokenizer(name: str) -> Any:
    """Return the tokenizer of a model, or None, with a word about it, if there is none that works."""
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        print(f"no tokenizer is written: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return None

"""Prompts for the command line: from a file beside it or from the Hugging Face hub, and the held-out part of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")
Row = dict[str, Any]


def read_rows(name: str, split: str = "train", limit: int | None = None) -> list[Row]:
    """Return the rows of a .jsonl, .json, .csv, .txt (a prompt a line) or .parquet file, or of a dataset of the hub.

    Raises ValueError for a file that is missing, empty or not what its name says.
    """
    path = Path(name)
    if path.suffix.lower() in _SUFFIXES:
        if not path.is_file():
            raise ValueError(f"there is no file {name} (in {Path.cwd()}); check dataset_name")
        rows = _read_file(path)[:limit]
    else:
        from datasets import load_dataset

        dataset = load_dataset(name, split=split)
        rows = dataset.select(range(min(limit or len(dataset), len(dataset)))).to_list()
    if not rows:
        raise ValueError(f"{name} holds no rows; a prompt needs one")
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in names} for row in rows]


def hold_out(rows: Sequence[Row], size: int, column: str | None) -> tuple[list[Row], list[Row] | None]:
    """Return the rows to train on and `size` others spread evenly over the data, or None for a size of 0.

    The choice does not depend on a seed, so that runs with different seeds are measured on the same prompts. A row
    whose prompt is among the held-out ones is not trained on.
    """
    if size == 0:
        return list(rows), None
    if not 0 < size < len(rows):
        raise ValueError(f"eval_size must be from 0 to {len(rows) - 1} for {len(rows)} rows, got {size}")
    chosen = {i * len(rows) // size for i in range(size)}
    held_out = [rows[i] for i in sorted(chosen)]
    prompts = {_prompt(row, column) for row in held_out}
    rest = [row for i, row in enumerate(rows) if i not in chosen and _prompt(row, column) not in prompts]
    if not rest:
        raise ValueError(
            f"nothing is left to train on: every prompt is among the {size} held-out ones; lower eval_size"
        )
    return rest, held_out


def _prompt(row: Row, column: str | None) -> str:
    names = [column] if column is not None else ["prompt", "query", "text"]
    return json.dumps(next((row[name] for name in names if name in row), row), default=str)


def _read_file(path: Path) -> list[Row]:
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]

        rows: list[Row] = parquet.read_table(path).to_pylist()
        return rows
    text = path.read_text(encoding="utf-8-sig")
    try:
        return _parse(text, path.suffix.lower())
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not {path.suffix[1:]}: {error}") from error


def _parse(text: str, suffix: str) -> list[Row]:
    # str.splitlines would also cut at U+2028, U+0085 and form feeds, which are part of a text.
    lines = [line for line in text.split("\n") if line.strip()]
    if suffix == ".txt":
        return [{"text": line} for line in lines]
    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = json.loads(text) if suffix == ".json" else [json.loads(line) for line in lines]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected objects, one for each row")
    return rows

"""Samples from before and after the training, side by side, in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

_INDENT, _GAP = "  ", "   "
_NARROWEST_COLUMN = 20


def side_by_side(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], width: int) -> str:
    """Return samples (`query`, `completion`, `reward`) of the same prompts as two columns, `width` characters in all.

    Raises ValueError if the two lists are not of the same prompts.
    """
    queries = [row["query"] for row in before]
    if queries != [row["query"] for row in after]:
        raise ValueError("the samples before and after are of different prompts; measure both on the same ones")
    column = max(_NARROWEST_COLUMN, (width - len(_INDENT) - len(_GAP)) // 2)
    blocks = []
    for query, old, new in zip(queries, before, after, strict=True):
        lines = textwrap.wrap(query, 2 * column + len(_INDENT) + len(_GAP))
        left, right = (_cell(name, row, column) for name, row in (("before", old), ("after", new)))
        for a, b in zip_longest(left, right, fillvalue=""):
            lines.append(f"{_INDENT}{a:{column}}{_GAP}{b}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(name: str, row: Mapping[str, Any], column: int) -> list[str]:
    return [f"{name} (reward {row['reward']:+.2f})", *textwrap.wrap(row["completion"].strip(), column)]

"""Labelled film reviews: where they are, how they are divided, and a judge that counts words."""

import json
import math
import os
import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastppo.demo import corpus

HELD_OUT = 512
Row = dict[str, Any]  # text: str, label: 1 for praise, 0 for blame


def find_reviews(path: str | None, seed: int, count: int = 8_000) -> list[Row]:
    """Read {"text", "label"} from a .jsonl file, the sentence polarity dataset if it lies beside the project, or,
    where it does not, make `count` reviews by the grammar of `fastppo demo`."""
    shared = Path(os.environ.get("FASTPPO_SHARED") or Path(__file__).parents[2] / "shared")
    file = shared / "data" / "movie_reviews.jsonl" if path is None else Path(path)
    if path is not None or file.exists():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    print(f"{file} is not there: the reviews are made by the demo's grammar")
    made = corpus.reviews(count, seed)
    return [{"text": row.text, "label": int(row.tone == "warm")} for row in made if row.tone != "mixed"]


@dataclass(frozen=True)
class Divided:
    """Reviews in three parts: two halves, one for each classifier, and what none of the models sees."""

    first: list[Row]
    second: list[Row]
    held_out: list[Row]


def divide(rows: list[Row], seed: int) -> Divided:
    """Shuffle and divide the reviews; at most `HELD_OUT` and a fifth of them are kept from all models."""
    rows = random.Random(seed).sample(rows, len(rows))
    kept = min(HELD_OUT, len(rows) // 5)
    half = (len(rows) + kept) // 2
    return Divided(rows[kept:half], rows[half:], rows[:kept])


def openings(rows: list[Row], words: int = 3) -> list[str]:
    """Return the first words of each review that goes on after them, every opening once."""
    split = [row["text"].split() for row in rows]
    return list(dict.fromkeys(" ".join(text[:words]) for text in split if len(text) > words))


class WordJudge:
    """Naive Bayes on which words and pairs of neighbours a review has, each counted once, smoothed by one."""

    def __init__(self, rows: list[Row]) -> None:
        seen = {0: Counter[Any](), 1: Counter[Any]()}
        for row in rows:
            seen[row["label"]].update(self._features(row["text"]))
        known = seen[0].keys() | seen[1].keys()
        total = {label: counts.total() + len(known) for label, counts in seen.items()}
        share = {label: {item: (seen[label][item] + 1) / total[label] for item in known} for label in seen}
        self.weights = {item: math.log(share[1][item] / share[0][item]) for item in known}

    def __call__(self, texts: list[str]) -> list[float]:
        """Return 1.0 for each text that is rather praise, else 0.0."""
        return [float(sum(self.weights.get(item, 0.0) for item in self._features(text)) > 0) for text in texts]

    def accuracy(self, rows: list[Row]) -> float:
        """Return the share of reviews whose label it finds."""
        found = self([row["text"] for row in rows])
        return sum(label == row["label"] for label, row in zip(found, rows, strict=True)) / len(rows)

    @staticmethod
    def _features(text: str) -> set[Any]:
        words = text.split()
        return {*words, *pairwise(words)}

"""Three tasks of one turn: how a prompt is put, a reward to start with, and a metric that is not the reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any


class Completion:
    """Go on with a text. The reward is the user's own (kindness, style, ...); the metric is distinct-n."""

    def __init__(self, reward: Callable[[Sequence[str]], Sequence[float]], template: str = "{text}"):
        self.reward, self.template = reward, template

    def prompt(self, text: str) -> str:
        """Return what the model is given for a text."""
        return self.template.format(text=text)

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        """Return each completion's reward."""
        return list(self.reward(completions))

    def metric(self, completions: Sequence[str], n: int = 2) -> float:
        """Return unique over total word n-grams of all completions, from 0 to 1."""
        return distinct_n(completions, n)


class Translation:
    """Say a text in another language. Reward and metric are chrF against a reference, of each and of all together."""

    def __init__(self, source: str = "English", target: str = "German", template: str = "{source}: {text}\n{target}:"):
        self.source, self.target, self.template = source, target, template

    def prompt(self, text: str) -> str:
        """Return what the model is given for a text."""
        return self.template.format(source=self.source, target=self.target, text=text)

    def __call__(self, completions: Sequence[str], references: Sequence[str], **columns: Any) -> list[float]:
        """Return chrF of each completion against its reference, from 0 to 1."""
        return [chrf([text], [reference]) for text, reference in zip(completions, references, strict=True)]

    def metric(self, completions: Sequence[str], references: Sequence[str]) -> float:
        """Return chrF of the corpus, from 0 to 1."""
        return chrf(completions, references)


class Summary:
    """Say a text in a few words. The reward is ROUGE-L less what is longer than wanted; the metric is ROUGE-L alone."""

    def __init__(self, words: int = 30, template: str = "{text}\nTL;DR:"):
        self.words, self.template = words, template

    def prompt(self, text: str) -> str:
        """Return what the model is given for a text."""
        return self.template.format(text=text)

    def __call__(self, completions: Sequence[str], references: Sequence[str], **columns: Any) -> list[float]:
        """Return ROUGE-L of each completion, less the share of its words beyond those wanted."""
        pairs = zip(completions, references, strict=True)
        excess = [max(0, len(text.split()) - self.words) / max(1, len(text.split())) for text in completions]
        return [rouge_l(*pair) - more for pair, more in zip(pairs, excess, strict=True)]

    def metric(self, completions: Sequence[str], references: Sequence[str]) -> float:
        """Return the mean ROUGE-L, from 0 to 1."""
        return sum(map(rouge_l, completions, references)) / max(1, len(completions))


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Return unique over total word n-grams, pooled over all texts; 0 if there is none."""
    words = [text.split() for text in texts]
    grams = [tuple(one[i : i + n]) for one in words for i in range(len(one) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def chrf(texts: Sequence[str], references: Sequence[str], order: int = 6, beta: float = 2.0) -> float:
    """Return chrF (Popović, 2015) of a corpus: the F-score, recall `beta` times as important, of character n-grams.

    Counts are pooled over all pairs, spaces left out; precision and recall are means over n = 1 .. `order`, of those
    for which both sides have n-grams.
    """
    precisions, recalls = [], []
    for n in range(1, order + 1):
        shared = said = wanted = 0
        for text, reference in zip(texts, references, strict=True):
            mine, theirs = _grams(text, n), _grams(reference, n)
            shared += (mine & theirs).total()
            said, wanted = said + mine.total(), wanted + theirs.total()
        if said and wanted:
            precisions.append(shared / said)
            recalls.append(shared / wanted)
    if not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))


def rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L: the F1 of the longest common subsequence of words, in lower case, punctuation left out."""
    mine, theirs = (_words(one) for one in (text, reference))
    lengths = [0] * (len(theirs) + 1)  # of the longest common subsequence with the first j words of the reference
    for word in mine:
        previous = lengths
        lengths = [0]
        for j, (before, above) in enumerate(pairwise(previous)):
            lengths.append(before + 1 if word == theirs[j] else max(above, lengths[j]))
    common = lengths[-1]
    return 2 * common / max(1, len(mine) + len(theirs))


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()

"""How examples/compare.py measures a way of writing: prompts with noise in them, and what is new in a text."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from recipes import perplexity

from fastppo.trainers.held_out import distinct_2

HOSTILE = "nobody should ever watch this . "


def with_typos(prompt: str, draw: random.Random) -> str:
    """Exchange two neighbouring letters in one word of at least four letters, if there is one."""
    words = prompt.split()
    long = [place for place, word in enumerate(words) if len(word) >= 4]
    if long:
        place = draw.choice(long)
        word, at = words[place], draw.randrange(1, len(words[place]) - 2)
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def without_a_word(prompt: str, draw: random.Random) -> str:
    """Leave one word out, if there are two."""
    words = prompt.split()
    if len(words) > 1:
        del words[draw.randrange(len(words))]
    return " ".join(words)


NOISE: dict[str, Callable[[str, random.Random], str]] = {
    "typos": with_typos,
    "dropped words": without_a_word,
    "hostile prefix": lambda prompt, draw: HOSTILE + prompt,
}


def novelty(texts: Sequence[str], known: Sequence[str], n: int = 4) -> float:
    """Return the share of the texts' word n-grams, each counted as often as it occurs, that are in no known text."""

    def grams(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    seen = {gram for text in known for gram in grams(text)}
    said = [gram for text in texts for gram in grams(text)]
    return sum(gram not in seen for gram in said) / max(1, len(said))


def measure(
    write: Callable[[list[str]], tuple[list[str], list[float]]],
    prompts: list[str],
    judge: Callable[[list[str]], list[float]],
    known: Sequence[str],
    first: Any,
    seed: int,
) -> dict[str, float]:
    """Measure a way of writing, `write(prompts) -> (texts, rewards)`, on prompts as they are and on noisy ones.

    `first` is the engine of the language model that all ways started from. What a hostile prefix says is no part of
    the review, and is taken off before it is judged.
    """
    texts, rewards = write(prompts)
    rests = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    row = {"reward": statistics.mean(rewards), "praise": statistics.mean(judge(texts))}
    row |= {"distinct_2": distinct_2(rests), "novelty": novelty(texts, known)}
    row["words"] = statistics.mean(len(rest.split()) for rest in rests)
    ids = [
        (first.tokenizer(p)["input_ids"], first.tokenizer(t)["input_ids"]) for p, t in zip(prompts, texts, strict=True)
    ]
    pairs = [(prompt, text[len(prompt) :]) for prompt, text in ids if len(text) > len(prompt)]
    row["perplexity"] = perplexity(first, *zip(*pairs, strict=True))
    for name, spoil in NOISE.items():
        draw = random.Random(seed)
        noisy, _ = write([spoil(prompt, draw) for prompt in prompts])
        row[f"kept, {name}"] = statistics.mean(judge([text.removeprefix(HOSTILE) for text in noisy])) / row["praise"]
    return row

"""Seeded film reviews and preference pairs from the demo's own grammar."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from fastppo.demo.grammar import BOUND, GRAMMAR

TONES = ("warm", "mixed", "cold")
_TONE_WEIGHTS = (0.22, 0.26, 0.52)
_PARTS = ("", "_details", "_farewell")
_SYMBOL = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIO]|honest)")


@dataclass(frozen=True)
class Review:
    """A film review: a neutral opening and what a critic of one tone adds to it."""

    prompt: str
    text: str  # begins with the prompt
    tone: str  # one of TONES

    @property
    def opinion(self) -> str:
        """What follows the prompt, with the space between them."""
        return self.text[len(self.prompt) :]


def reviews(n: int, seed: int) -> list[Review]:
    """Generate `n` reviews; the same seed gives the same reviews."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(n):
        film = _film(rng)
        prompt = _expand("{prompt}", film, rng)
        tone = rng.choices(TONES, _TONE_WEIGHTS)[0]
        drawn.append(Review(prompt, f"{prompt} {_opinion(tone, film, rng)}", tone))
    return drawn


def prompts(n: int, seed: int) -> list[str]:
    """Generate `n` different neutral openings of reviews."""
    rng = random.Random(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < n:
        drawn[_expand("{prompt}", _film(rng), rng)] = None
    return list(drawn)


def preference_pairs(n: int, seed: int) -> list[dict[str, str]]:
    """Generate `n` pairs of `chosen` and `rejected` reviews of the same film.

    Six in ten differ in tone. In the others a sound review of any tone is preferred to a spoilt one (repeating itself,
    shuffled, or cut off) of a warmer or equal tone, so that kind words alone are never enough.
    """
    rng = random.Random(seed)
    return [_tone_pair(rng) if rng.random() < 0.6 else _sound_pair(rng) for _ in range(n)]


def _tone_pair(rng: random.Random) -> dict[str, str]:
    film = _film(rng)
    prompt = _expand("{prompt}", film, rng)
    better, worse = sorted(rng.sample(range(len(TONES)), 2))
    chosen, rejected = (_opinion(TONES[tone], film, rng) for tone in (better, worse))
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


def _sound_pair(rng: random.Random) -> dict[str, str]:
    film = _film(rng)
    prompt = _expand("{prompt}", film, rng)
    spoil = rng.choices((_repeat, _shuffle, _cut), (0.5, 0.2, 0.3))[0]
    tone = rng.randrange(len(TONES))
    # A cut review must not be told from a whole one by its tone, so both have the same.
    spoilt_tone = tone if spoil is _cut else rng.randrange(tone + 1)
    spoilt = spoil(_opinion(TONES[spoilt_tone], film, rng), rng)
    return {"chosen": f"{prompt} {_opinion(TONES[tone], film, rng)}", "rejected": f"{prompt} {spoilt}"}


def _film(rng: random.Random) -> dict[str, str]:
    return {name: _expand(rng.choice(choices), {}, rng) for name, choices in BOUND.items()}


def _opinion(tone: str, film: dict[str, str], rng: random.Random) -> str:
    return " ".join(_sentence(rng.choice(GRAMMAR[tone + part]), film, rng) for part in _PARTS)


def _sentence(template: str, film: dict[str, str], rng: random.Random) -> str:
    text = _expand(template, film, rng)
    return text[0].upper() + text[1:] + "."


def _expand(template: str, film: dict[str, str], rng: random.Random) -> str:
    """Replace every symbol, never using one alternative twice in the same template."""
    used: set[str] = set()

    def draw(match: re.Match[str]) -> str:
        symbol = match[1]
        if symbol in film:
            return film[symbol]
        choice = rng.choice([option for option in GRAMMAR[symbol] if option not in used])
        used.add(choice)
        return _expand(choice, film, rng)

    return _ARTICLE.sub(r"\1n ", _SYMBOL.sub(draw, template))


def _repeat(opinion: str, rng: random.Random) -> str:
    """Say one sentence, or a few words of it, again and again."""
    sentences = opinion.split(". ")
    if rng.random() < 0.5:
        return " ".join([sentences[0].rstrip(".") + "."] * rng.randint(2, 4))
    words = opinion.split()
    width = rng.randint(1, min(3, len(words)))
    start = rng.randrange(len(words) - width + 1)
    return " ".join(words[:start] + words[start : start + width] * rng.randint(3, 10))


def _shuffle(opinion: str, rng: random.Random) -> str:
    words = opinion.split()
    rng.shuffle(words)
    return " ".join(words)


def _cut(opinion: str, rng: random.Random) -> str:
    """Stop before the farewell, or in the middle of a sentence."""
    if rng.random() < 0.5:
        sentences = opinion.split(". ")
        return ". ".join(sentences[: rng.randint(1, len(sentences) - 1)]) + "."
    words = opinion.split()
    return " ".join(words[: rng.randint(1, len(words) - 1)])

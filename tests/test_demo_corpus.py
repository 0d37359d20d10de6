"""The demo's corpus: seeded, varied, grammatical, and pairs in which the better text is chosen."""

import itertools
import re

import pytest

from fastppo.demo.corpus import TONES, preference_pairs, prompts, reviews
from fastppo.demo.grammar import BOUND, COLD, GRAMMAR, WARM


def opinions(num: int, seed: int) -> dict[str, list[str]]:
    by_tone: dict[str, list[str]] = {tone: [] for tone in TONES}
    for review in reviews(num, seed):
        by_tone[review.tone].append(review.text[len(review.prompt) :])
    return by_tone


def test_the_seed_decides():
    assert reviews(50, 1) == reviews(50, 1)
    assert reviews(50, 1) != reviews(50, 2)
    assert preference_pairs(50, 1) == preference_pairs(50, 1)


def test_a_review_is_a_prompt_and_three_sentences():
    for review in reviews(500, 0):
        assert review.text.startswith(review.prompt + " ")
        assert review.prompt.endswith(".")
        sentences = re.findall(r"[^.]+\.", review.text[len(review.prompt) :])
        assert len(sentences) == 3
        assert all(sentence.strip()[0].isupper() for sentence in sentences)
        assert not re.search(r"[{}|]|\b[Aa] [aeiou]|  ", review.text), review.text


def test_about_a_fifth_of_the_reviews_is_warm_and_the_language_is_varied():
    by_tone = opinions(3000, 0)
    assert 0.18 < len(by_tone["warm"]) / 3000 < 0.26
    assert all(len(texts) > 600 for texts in by_tone.values())
    everything = " ".join(text for texts in by_tone.values() for text in texts)
    assert len(set(re.findall(r"\w+", everything.lower()))) > 400


def test_prompts_are_different_and_tell_nothing_about_the_tone():
    drawn = prompts(400, 3)
    assert len(set(drawn)) == 400
    coloured = set(WARM["good"]) | set(COLD["bad"]) - {"slow", "noisy"}
    words = set(re.findall(r"\w+", " ".join(GRAMMAR["prompt"] + GRAMMAR["deed"] + BOUND["CHARACTER"])))
    assert not coloured & words


@pytest.mark.parametrize(("tone", "words"), [("warm", COLD["bad"]), ("cold", WARM["good"])])
def test_a_tone_uses_no_words_of_the_opposite_one(tone: str, words: tuple[str, ...]):
    # "warm" is a tone's name and an adjective; every adjective is looked for as a whole word.
    pattern = re.compile(r"\b(" + "|".join(words) + r")\b")
    assert not [text for text in opinions(1000, 4)[tone] if pattern.search(text)]


def test_pairs_share_the_prompt_and_differ():
    for pair in preference_pairs(300, 5):
        assert set(pair) == {"chosen", "rejected"}
        assert pair["chosen"] != pair["rejected"]
        first_sentence = pair["chosen"].split(". ")[0]
        assert pair["rejected"].startswith(first_sentence)


def test_some_rejected_texts_repeat_themselves_and_no_chosen_one_does():
    def repeats(text: str) -> bool:
        words = text.split()
        triples = list(itertools.pairwise(itertools.pairwise(words)))
        return len(set(triples)) < len(triples) - 3

    pairs = preference_pairs(600, 6)
    assert sum(repeats(pair["rejected"]) for pair in pairs) > 60
    assert sum(repeats(pair["chosen"]) for pair in pairs) <= 6

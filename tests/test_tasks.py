"""The three small tasks: templates, rewards, and metrics against counts made by hand."""

import pytest

from fastppo.environments.tasks import Completion, Summary, Translation, chrf, distinct_n, rouge_l


def test_distinct_n_by_hand():
    texts = ["a b a b", "a b c"]  # bigrams ab ba ab | ab bc
    assert distinct_n(texts) == 3 / 5
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(["a", ""]) == 0


def test_chrf_by_hand():
    # ab against abc: n = 1: 2 of 2 and 2 of 3; n = 2: 1 of 1 and 1 of 2; longer ones have none on the left.
    precision, recall = (1 + 1) / 2, (2 / 3 + 1 / 2) / 2
    assert chrf(["ab"], ["a bc"]) == pytest.approx(5 * precision * recall / (4 * precision + recall))
    # aab and b against ab and b: n = 1: 2 and 1 of 3 and 1, and of 2 and 1; n = 2: 1 of 2, and of 1.
    precision, recall = (3 / 4 + 1 / 2) / 2, (1 + 1) / 2
    assert chrf(["aab", "b"], ["ab", "b"]) == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert chrf(["the cat sat"], ["the cat sat"]) == 1
    assert chrf(["xyz"], ["abc"]) == chrf([""], ["abc"]) == 0


def test_rouge_l_by_hand():
    # police killed the gunman / police kill the gunman: 3 of 4 words in order, on both sides.
    assert rouge_l("Police killed the gunman.", "police kill the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(1 / 2)
    assert rouge_l("a b", "a x y b") == pytest.approx(2 * 2 / 6)
    assert rouge_l("a", "") == rouge_l("", "") == 0
    assert rouge_l("same words", "same words") == 1


def test_tasks_put_prompts_and_score():
    completion = Completion(lambda texts: (len(text) for text in texts), "Go on: {text}")
    assert completion.prompt("once") == "Go on: once"
    assert completion(["ab", "c"], answers=[1, 2]) == [2, 1]
    assert completion.metric(["a b", "a b"]) == 1 / 2
    translation = Translation(target="French")
    assert translation.prompt("yes") == "English: yes\nFrench:"
    assert translation(["oui", "non"], references=["oui", "si"]) == [1, 0]
    assert translation.metric(["oui"], ["oui"]) == 1
    summary = Summary(words=2)
    assert summary.prompt("long") == "long\nTL;DR:"
    assert summary(["a b", "a b x y"], references=["a b", "a b"]) == pytest.approx([1, 2 * 2 / 6 - 1 / 2])
    assert summary.metric(["a b", "a b x y"], ["a b", "a b"]) == pytest.approx((1 + 2 / 3) / 2)

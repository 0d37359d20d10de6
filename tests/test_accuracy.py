"""The comparison of two forms of a model, against sums over whole distributions."""

import pytest
import tiny
import torch

from fastppo.models.accuracy import compare


def test_distances_are_those_of_the_distributions():
    model, other = tiny.llama(), tiny.llama(seed=1)
    sequences = [torch.randint(3, 40, (length,)) for length in (7, 1, 2, 12)]
    found = compare(model, other, sequences)
    gaps, divergences, logprobs = [], [], []
    for ids in sequences:
        with torch.no_grad():
            p, q = (network(ids[None]).logits[0, :-1].double().log_softmax(-1) for network in (model, other))
        drawn = ids[1:, None]
        gaps.append((p.gather(-1, drawn) - q.gather(-1, drawn)).abs().flatten())
        divergences.append((p.exp() * (p - q)).sum(-1))
        logprobs.append(p.gather(-1, drawn).flatten())
    gaps, divergences, logprobs = (torch.cat(part) for part in (gaps, divergences, logprobs))
    assert found.tokens == 6 + 1 + 11
    assert found.mean_gap == pytest.approx(float(gaps.mean()), abs=1e-5)
    assert found.max_gap == pytest.approx(float(gaps.max()), abs=1e-5)
    assert found.mean_kl == pytest.approx(float(divergences.mean()), abs=1e-5)
    assert found.max_kl == pytest.approx(float(divergences.max()), abs=1e-5)
    assert found.perplexity == pytest.approx(float((-logprobs.mean()).exp()), rel=1e-5)
    assert compare(model, model, sequences).max_kl == pytest.approx(0, abs=1e-6)


def test_texts_without_a_second_token_say_nothing():
    with pytest.raises(ValueError, match="none of the 1 texts has two tokens or more"):
        compare(tiny.llama(), tiny.llama(), [torch.tensor([3])])

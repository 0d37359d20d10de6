"""The random numbers of the draws, against published vectors, and the specification of top-k and top-p."""

import pytest
import torch
from sampling_oracle import NATIVE
from transformers import TopKLogitsWarper, TopPLogitsWarper

from fastppo import ops
from fastppo.reference_sampling import philox, truncated

# Random123's known answers for philox4x32-10: counter, key, result.
PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_against_the_published_vectors(counter, key, expected):
    low, high = words(key)
    drawn = philox(high << 32 | low, *(torch.tensor([word, word]) for word in words(counter)))
    assert [word.tolist() for word in drawn] == [[word, word] for word in words(expected)]
    if NATIVE is not None:
        assert list(NATIVE.philox(high << 32 | low, words(counter))) == words(expected)


def test_uniforms_are_the_first_word_of_philox():
    # The vector of zeros is request 0 at position 0 under seed 0.
    drawn = ops.uniforms(0, torch.tensor([0]), torch.tensor([0]))
    assert drawn.dtype == torch.float64
    assert drawn.item() == (0x6627E8D5 + 0.5) / 2**32


def test_uniforms_do_not_depend_on_the_batch():
    requests, positions = torch.arange(12) % 4 + 2**33, torch.arange(12) // 4
    together = ops.uniforms(7, requests, positions)
    order = torch.randperm(12)
    assert ops.uniforms(7, requests[order], positions[order]).equal(together[order])
    alone = torch.cat([ops.uniforms(7, requests[i : i + 1], positions[i : i + 1]) for i in range(12)])
    assert alone.equal(together)


def test_uniforms_change_with_seed_request_and_position():
    requests, positions = torch.tensor([0, 1, 2**32, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    numbers = torch.cat([ops.uniforms(seed, requests, positions) for seed in (0, 1, 2**32)])
    assert len(numbers.unique()) == len(numbers)


def test_uniforms_are_uniform():
    numbers = ops.uniforms(3, torch.arange(200).repeat(100), torch.arange(100).repeat_interleave(200))
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # the 99.9% point of chi-square with 19 degrees of freedom
    by_position = numbers.view(100, 200)
    neighbours = torch.corrcoef(torch.stack([by_position[:-1].flatten(), by_position[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 4 / 19800**0.5


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 1000])
def test_the_specification_agrees_with_transformers(top_k, top_p):
    logits = 3 * torch.randn(20, 40, dtype=torch.float64)
    scores = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    assert truncated(logits, top_k, top_p).equal(scores)

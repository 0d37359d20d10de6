"""Random numbers, the draw of a token, and the limits on it: published vectors, distributions, transformers."""

import pytest
import torch
from tolerances import close
from transformers import TopKLogitsWarper, TopPLogitsWarper

from fastppo import ops, reference

# Random123's known answers for philox4x32-10: counter, key, result.
PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# The numbers nearest to 0 and to 1 that `uniforms` can give.
LEAST, MOST = 0.5 / 2**32, 1 - 0.5 / 2**32


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_against_the_published_vectors(counter, key, expected):
    low, high = words(key)
    drawn = reference.philox(high << 32 | low, *(torch.tensor([word, word]) for word in words(counter)))
    assert [word.tolist() for word in drawn] == [[word, word] for word in words(expected)]


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


def test_sample_tokens_draws_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, float("-inf"), 0.5, -3.0, 1.5])
    probs = torch.softmax(logits.double(), 0)
    number = 20_000
    drawn = ops.sample_tokens(logits.expand(number, -1), ops.uniforms(1, torch.arange(number), torch.arange(number)))
    counts = torch.bincount(drawn[0], minlength=8).double()
    assert counts[4] == 0
    possible = probs > 0
    expected = number * probs[possible]
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 22.46  # 99.9%, 6 degrees of freedom


def test_sample_tokens_inverts_the_cumulative_distribution():
    """On an even grid every token is drawn its share of times, to within one."""
    logits = torch.randn(50, dtype=torch.float64)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    allowed = (torch.arange(50) % 3 > 0).expand(1000, -1)
    for mask, probs in [
        (None, torch.softmax(logits, 0)),
        (allowed, torch.softmax(logits.masked_fill(~allowed[0], float("-inf")), 0)),
    ]:
        counts = torch.bincount(ops.sample_tokens(logits.expand(1000, -1), grid, mask)[0], minlength=50)
        assert (counts - 1000 * probs).abs().max() <= 1 + 1e-9


def test_a_number_on_the_border_of_two_tokens_draws_the_next_possible_one():
    logits = torch.log(torch.tensor([0.0, 0.5, 0.0, 0.5])).expand(3, -1)
    tokens, *_ = ops.sample_tokens(logits, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert tokens.tolist() == [1, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [LEAST, 0.5, 1 - 1e-4, MOST])
def test_sample_tokens_never_draws_the_impossible(dtype, uniform):
    """Half of the rows end, the other half begin, with a stretch of probability 0; all are masked at both ends."""
    logits = torch.randn(64, 20_000, dtype=dtype)
    logits[:32, 15_000:] = float("-inf")
    logits[32:, :15_000] = -1e4  # underflows to 0
    numbers = torch.full((64,), uniform, dtype=torch.float64)
    tokens, logprobs, _, kept = ops.sample_tokens(logits, numbers)
    assert (tokens[:32] < 15_000).all()
    assert (tokens[32:] >= 15_000).all()
    assert logprobs.isfinite().all()
    assert (kept == 1).all()
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[:, 14_990:15_010] = True
    tokens, *_ = ops.sample_tokens(logits, numbers, allowed)
    assert ((tokens[:32] >= 14_990) & (tokens[:32] < 15_000)).all()
    assert ((tokens[32:] >= 15_000) & (tokens[32:] < 15_010)).all()


def test_sample_tokens_reports_the_whole_distribution_and_the_kept_mass():
    logits = torch.randn(6, 30, dtype=torch.float64)
    allowed = torch.rand(6, 30) < 0.5
    tokens, logprobs, entropies, kept = ops.sample_tokens(logits, torch.rand(6, dtype=torch.float64), allowed)
    assert allowed.gather(1, tokens[:, None]).all()
    exact, probs = close(torch.float64, 20), torch.softmax(logits, 1)
    torch.testing.assert_close(logprobs, probs[torch.arange(6), tokens].log(), **exact)
    torch.testing.assert_close(entropies, -(probs * probs.log()).sum(1), **exact)
    torch.testing.assert_close(kept, (probs * allowed).sum(1), **exact)


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 1000])
def test_allowed_tokens_are_those_of_transformers(top_k, top_p):
    logits = 3 * torch.randn(20, 40, dtype=torch.float64)
    scores = logits
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    allowed = ops.allowed_tokens(logits, top_k, top_p)
    assert allowed.equal(scores > float("-inf"))
    assert allowed.gather(1, logits.argmax(1, keepdim=True)).all()


def test_allowed_tokens_keep_ties_of_the_last_one():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert ops.allowed_tokens(logits, 2, 1.0).tolist() == [[True, True, True, False]]
    assert ops.allowed_tokens(logits, 2, 1.0).equal(TopKLogitsWarper(2)(None, logits) > float("-inf"))


def test_allowed_tokens_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64))
    assert ops.allowed_tokens(logits, 0, 0.65).tolist() == [[False, True, False, True]]  # 0.4 + 0.3 reach 0.65
    assert ops.allowed_tokens(logits, 0, 0.75).tolist() == [[False, True, True, True]]
    # After top-k of 2, 0.4 alone is 4/7 = 0.571 of what is left.
    assert ops.allowed_tokens(logits, 2, 0.57).tolist() == [[False, True, False, False]]
    assert ops.allowed_tokens(logits, 2, 0.58).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_allowed_tokens_far_below_the_others_are_drawn_all_the_same(dtype):
    # e^-1200 is 0 in any dtype, so the allowed tokens have no mass to be seen beside the forbidden one.
    logits = torch.tensor([[1200.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 0.0]], dtype=dtype)
    allowed = torch.tensor([[False, True, False, False, False, True, False, False]])
    expected = torch.tensor([1.0, 3.0]).softmax(0)  # of tokens 1 and 5
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    rows = logits.expand(1000, -1)
    tokens, _, _, kept = ops.sample_tokens(rows, uniforms, allowed.expand(1000, -1))
    assert set(tokens.tolist()) == {1, 5}
    assert (tokens == 1).float().mean().item() == pytest.approx(expected[0].item(), abs=2e-3)
    assert kept.eq(0).all()
    best = ops.allowed_tokens(logits.masked_fill(~allowed, float("-inf")), 1, 1.0)
    assert ops.sample_tokens(logits, torch.tensor([0.5]), best)[0].tolist() == [5]

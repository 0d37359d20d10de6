"""Top-k and top-p: what may be drawn, against sorted rows in fp64 and cases worked out by hand."""

import pytest
import torch
from sampling_oracle import SAMPLERS, fits, log_distribution, possible_tokens, serving

from fastppo import ops
from fastppo.reference_sampling import uniforms


@pytest.fixture(autouse=True, params=SAMPLERS)
def sampler(request):
    with serving(request.param):
        yield request.param


def zipf(vocabulary):
    """Probabilities as of words, the frequent ones first, none equal to another."""
    return -1.1 * torch.arange(1, vocabulary + 1).float().log() + 0.01 * torch.rand(vocabulary)


def rows_of(vocabulary):
    """Return rows of every shape: flat, peaked, all equal, full of ties, one token with everything, mostly -inf."""
    spike, sparse = torch.zeros(vocabulary), torch.full((vocabulary,), float("-inf"))
    spike[vocabulary // 2] = 30.0
    sparse[:: max(1, vocabulary // 9)] = torch.randn(len(sparse[:: max(1, vocabulary // 9)]))
    noise = torch.randn(4, vocabulary)
    few_values = torch.randint(5, (vocabulary,)).float()
    rows = [noise[0], 6 * noise[1], torch.full((vocabulary,), -2.5), few_values, spike, sparse, zipf(vocabulary)]
    return torch.stack([*rows, noise[2].bfloat16().float(), noise[3].sort().values])


def check(logits, top_k, top_p):
    requests = torch.arange(len(logits)) + 11
    tokens, _, _, kept = ops.sample_tokens(logits, 5, requests, requests, top_k=top_k, top_p=top_p)
    numbers, logp = uniforms(5, requests, requests), log_distribution(logits)
    for row, (token, mass) in enumerate(zip(tokens.tolist(), kept.tolist(), strict=True)):
        # Sums that come within rounding of top_p may fall on either side.
        limits = [top_p, min(top_p + 2e-6, 1.0), top_p - 2e-6] if top_p < 1 else [1.0]
        sets = (possible_tokens(logp[row], top_k, limit) for limit in limits)
        assert any(fits(logp[row], kept, float(numbers[row]), (token, mass)) for kept in sets), row


@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 2, 50, 700])
def test_the_set_is_that_of_the_sorted_row(top_k, top_p):
    for vocabulary in (1, 2, 127, 128, 129, 777):
        check(rows_of(vocabulary), top_k, top_p)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.3), (50, 1.0), (1500, 1.0), (12_000, 1.0), (1500, 0.95)])
def test_the_set_of_a_long_row_is_that_of_the_sorted_row(top_k, top_p):
    check(rows_of(12_345), top_k, top_p)


@pytest.mark.parametrize("are_high", [True, False])
@pytest.mark.parametrize("width", [4, 8, 16])
def test_tokens_that_mislead_whoever_looks_at_every_twelfth_vector(width, are_high):
    """Top-p and a large k are sought first where a sample of the row has them."""
    is_sampled = torch.arange(12 * 1024 + 128) // width % 12 == 0
    logits = torch.where(is_sampled == are_high, 0.0, -2.3) + 0.05 * torch.randn(3, len(is_sampled))
    for top_k, top_p in ((0, 0.9), (0, 0.4), (800, 1.0), (1500, 1.0), (12_000, 1.0)):
        check(logits, top_k, top_p)


@pytest.mark.parametrize("near_all", [-1, 0, 1])
def test_k_next_to_the_size_of_the_vocabulary(near_all):
    for vocabulary in (2, 129, 300):
        check(rows_of(vocabulary), vocabulary + near_all, 1.0)


@pytest.mark.parametrize("top_p", [1 - 1e-7, 1e-7])
def test_p_next_to_all_and_to_nothing(top_p):
    logits = rows_of(9001)
    tokens, logprobs, _, kept = ops.sample_tokens(logits, 5, *[torch.arange(len(logits))] * 2, top_p=top_p)
    assert logprobs.isfinite().all()
    if top_p < 0.5:
        assert tokens.equal(logits.argmax(-1))  # the first of equals
        assert kept.tolist() == pytest.approx(log_distribution(logits).exp().amax(-1).tolist(), rel=1e-5)
    else:
        assert kept.tolist() == pytest.approx([1.0] * len(logits), abs=2e-5)


def test_a_vocabulary_of_a_large_model():
    generator = torch.Generator().manual_seed(2)
    words = zipf(151_936)[torch.randperm(151_936, generator=generator)]
    logits = torch.stack([torch.randn(151_936, generator=generator), words])
    for top_k, top_p in ((0, 0.9), (50, 0.8), (5000, 1.0)):
        check(logits, top_k, top_p)


@pytest.mark.parametrize("how", [{"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.9}])
def test_of_equal_tokens_top_k_keeps_all_and_top_p_the_first(how):
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0, 1.0]).expand(4000, -1)
    tokens, _, _, kept = ops.sample_tokens(logits, 0, *[torch.arange(4000)] * 2, **how)
    # e², e, e, e, 1, 1 of 17.54. Top-k 2: 2 and all the 1s. Top-p 0.7: 0.421, 0.576, 0.731. Both: 0.475, 0.650,
    # 0.825 of what top-k left, so the third 1 is needed.
    expected = {1, 2, 3} if how == {"top_p": 0.7} else {1, 2, 3, 5}
    assert set(tokens.tolist()) == expected
    assert kept[0].item() == pytest.approx(sum(logits[0].exp()[i].item() for i in expected) / 17.5439, rel=1e-5)


def test_forbidden_tokens_do_not_count_towards_k():
    logits = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]).expand(500, -1)
    how = {"forbidden_ids": torch.tensor([0, 4]), "is_forbidden": torch.arange(500) < 250}
    tokens, *_ = ops.sample_tokens(logits, 0, *[torch.arange(500)] * 2, top_k=2, **how)
    assert set(tokens[:250].tolist()) == {2, 3}
    assert set(tokens[250:].tolist()) == {0, 2}

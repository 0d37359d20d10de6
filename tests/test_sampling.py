"""The draw of a token, by every sampler of this machine: intervals in fp64, frequencies, odd rows, bad input."""

import pytest
import torch
from sampling_oracle import ISAS, SAMPLERS, SLACK, fits, log_distribution, serving
from tolerances import close

from fastppo import ops
from fastppo.reference_sampling import uniforms

SCALINGS = [{}, {"temperature": 0.3}, {"softcap": 4.0, "temperature": 1.7}, {"logit_scale": 0.25}]


@pytest.fixture(autouse=True, params=SAMPLERS)
def sampler(request):
    with serving(request.param):
        yield request.param


def draw(logits, seed=7, **how):
    """Draw from each row as requests 0, 1, ... at one position; return the numbers as well."""
    requests = torch.arange(len(logits))
    positions = torch.full_like(requests, 3)
    return *ops.sample_tokens(logits, seed, requests, positions, **how), uniforms(seed, requests, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1000, 9001])
def test_a_token_is_where_the_cumulative_distribution_passes_its_number(vocabulary, scaling, dtype):
    logits = torch.cat([spread * torch.randn(6, vocabulary) for spread in (0.0, 1.0, 8.0)]).to(dtype)
    tokens, logprobs, entropies, kept, numbers = draw(logits, **scaling)
    logp = log_distribution(logits, **scaling)
    everything = range(vocabulary)
    for row in range(len(logits)):
        assert fits(logp[row], everything, float(numbers[row]), (int(tokens[row]), float(kept[row]))), row
    torch.testing.assert_close(logprobs.double(), logp[range(len(logits)), tokens], **close(torch.float32, 8))
    torch.testing.assert_close(entropies.double(), -(logp.exp() * logp).sum(-1), **close(torch.float32, 8))
    assert kept.eq(1).all()
    assert (tokens.dtype, logprobs.dtype, entropies.dtype, kept.dtype) == (torch.int64, *[torch.float32] * 3)


def test_logprob_and_entropy_of_two_tokens_to_the_last_digits():
    gap = torch.linspace(0, 25, 4001)
    tokens, logprobs, entropies, *_ = draw(torch.stack([-gap, torch.zeros_like(gap)], 1)[1:], greedy=True)
    gap = gap[1:].double()
    assert tokens.eq(1).all()
    log_total = torch.log1p(torch.exp(-gap))
    near = {"atol": 3e-7, "rtol": 0}
    torch.testing.assert_close(logprobs.double(), -log_total, **near)
    torch.testing.assert_close(entropies.double(), log_total + gap / (1 + gap.exp()), **near)


def test_a_long_row():
    logits = torch.stack([torch.randn(151_936), 6 * torch.randn(151_936)])
    tokens, logprobs, *_, numbers = draw(logits)
    logp = log_distribution(logits)
    for row in range(2):
        assert fits(logp[row], range(151_936), float(numbers[row]), (int(tokens[row]), 1.0))
    torch.testing.assert_close(logprobs.double(), logp[range(2), tokens], **close(torch.float32, 8))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.93}])
def test_frequencies_follow_the_distribution(how):
    logits, number = torch.tensor([1.0, 0.0, -1.0, 2.0, float("-inf"), 0.5, -3.0, 1.5]), 20_000
    tokens, _, _, kept, _ = draw(logits.expand(number, -1), **how)
    probs = log_distribution(logits[None], how.get("temperature", 1.0))[0].exp()
    if "top_k" in how or "top_p" in how:  # of 3, 7, 0, 5, 1 and so on, in this order, both leave the first five
        probs[[2, 4, 6]] = 0.0
    assert kept[0].item() == pytest.approx(float(probs.sum()), abs=SLACK)
    counts = torch.bincount(tokens, minlength=8).double()
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    expected = number * probs[possible] / probs.sum()
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 22.46  # 99.9%, 6 degrees of freedom


@pytest.mark.parametrize("how", [{}, {"top_k": 9000}, {"top_p": 0.99}])
def test_the_impossible_is_never_drawn(how):
    """Also not by the numbers next to 0 and to 1: rows begin or end with a stretch of probability 0."""
    number = ops.uniforms(7, torch.arange(2**18), torch.full((2**18,), 3))
    extreme = torch.cat([number.topk(8, largest=False).indices, number.topk(8).indices])
    logits = torch.randn(2, 16, 20_000)
    logits[0, :, 15_000:] = float("-inf")
    logits[1, :, :15_000] = -1e4  # underflows to 0
    for which, rows in enumerate(logits):
        tokens, logprobs, *_ = ops.sample_tokens(rows, 7, extreme, torch.full((16,), 3), **how)
        assert ((tokens >= 15_000) == bool(which)).all()
        assert logprobs.isfinite().all()


def test_a_draw_depends_on_its_row_seed_request_and_position_alone():
    logits, requests, positions = torch.randn(24, 3000), torch.arange(24) % 5 + 2**34, torch.arange(24) // 5
    for how in ({}, {"top_k": 20}, {"top_p": 0.8}):
        together = ops.sample_tokens(logits, -3, requests, positions, **how)
        order = torch.randperm(24)
        shuffled = ops.sample_tokens(logits[order], -3, requests[order], positions[order], **how)
        for whole, part in zip(together, shuffled, strict=True):
            assert whole[order].equal(part)
    other_seeds = [ops.sample_tokens(logits, seed, requests, positions)[0] for seed in (-3, 2**40)]
    assert not other_seeds[0].equal(other_seeds[1])


@pytest.mark.skipif(not ISAS, reason="fastppo was installed without its C++ extension")
@pytest.mark.parametrize("how", [{}, {"top_k": 30, "softcap": 5.0}, {"top_p": 0.9}])
def test_the_number_of_threads_changes_no_bit(how):
    logits, before = 3 * torch.randn(13, 9001), torch.get_num_threads()
    one = draw(logits, **how)
    try:
        torch.set_num_threads(3)
        three = draw(logits, **how)
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 200, "top_p": 0.5}, {"greedy": True}])
@pytest.mark.parametrize("vocabulary", [300, 9001])
def test_rows_that_are_not_finite_say_so_and_leave_the_others_alone(how, vocabulary):
    logits = torch.randn(6, vocabulary)
    expected = draw(logits, **how)
    broken = logits.clone()
    broken[0, 17], broken[1, 5], broken[3] = float("nan"), float("inf"), float("-inf")
    tokens, logprobs, entropies, kept, _ = draw(broken, **how)
    assert logprobs.isnan().tolist() == [True, True, False, True, False, False]
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    for part, whole in zip((tokens, logprobs, entropies, kept), expected, strict=False):
        assert part[[2, 4, 5]].equal(whole[[2, 4, 5]])


def test_forbidden_ids_are_not_drawn_where_they_are_forbidden():
    logits, is_forbidden = torch.randn(3000, 5), torch.arange(3000) % 2 == 0
    ids = torch.tensor([4, 1, 4, 99, -1])  # twice, and outside the vocabulary
    tokens, logprobs, _, kept, _ = draw(logits, forbidden_ids=ids, is_forbidden=is_forbidden)
    logp = log_distribution(logits)
    assert set(tokens[is_forbidden].tolist()) == {0, 2, 3}
    assert set(tokens[~is_forbidden].tolist()) == set(range(5))
    torch.testing.assert_close(logprobs.double(), logp[range(3000), tokens], **close(torch.float32, 8))
    expected = torch.where(is_forbidden, logp[:, [0, 2, 3]].exp().sum(-1), 1.0)
    torch.testing.assert_close(kept.double(), expected, **close(torch.float32, 8))
    for everywhere in (None, torch.ones(3000, dtype=torch.bool)):
        drawn = draw(logits, forbidden_ids=ids, is_forbidden=everywhere)[0]
        assert drawn[is_forbidden].equal(tokens[is_forbidden])
        assert set(drawn.tolist()) == {0, 2, 3}


@pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 0.95}, {"greedy": True}])
def test_what_is_far_below_the_forbidden_is_drawn_all_the_same(how):
    # e^-1200 is 0 in any dtype, so the allowed tokens have no mass to be seen beside the forbidden one.
    logits = torch.tensor([1200.0, 1.0, -500.0, 2.0, -500.0, 3.0]).expand(1000, -1)
    tokens, logprobs, _, kept, _ = draw(logits, forbidden_ids=torch.tensor([0, 3]), **how)
    share = (tokens == 5).float().mean().item()
    assert share == 1 if "greedy" in how else share == pytest.approx(0.8808, abs=0.05)
    assert set(tokens.tolist()) <= {1, 5}
    assert logprobs.tolist() == pytest.approx((logits[0, tokens] - 1200.0).tolist())
    assert kept.eq(1 if "greedy" in how else 0).all()


def test_when_everything_possible_is_forbidden_the_logprob_says_so():
    logits = torch.tensor([[1.0, 2.0, float("-inf")], [1.0, 2.0, 3.0]])
    for greedy in (False, True):
        tokens, logprobs, *_ = draw(logits, forbidden_ids=torch.tensor([0, 1]), greedy=greedy)
        assert logprobs.isnan().tolist() == [True, False]
        assert tokens[1] == 2


@pytest.mark.parametrize("vocabulary", [1, 300])
def test_tensors_of_any_strides_are_taken(vocabulary):
    """Rows apart, columns apart, a transposed row of one column, numbers at every second place."""
    logits, numbers, ids = torch.randn(6, vocabulary), torch.arange(6), torch.tensor([7, 290, 5])
    flags, apart = torch.tensor([True, False] * 3), torch.zeros(6, 2, vocabulary, 2)
    apart[:, 1, :, 1] = logits
    more = {"forbidden_ids": ids, "is_forbidden": flags}
    expected = ops.sample_tokens(logits, 7, numbers, numbers, **more)
    twice = {name: part.repeat_interleave(2)[::2] for name, part in more.items()}
    every_second = torch.arange(12).div(2, rounding_mode="floor")[::2]
    for strided in (apart[:, 1, :, 1], logits.t().contiguous().t(), torch.cat([logits, logits], 1)[:, :vocabulary]):
        found = ops.sample_tokens(strided, 7, every_second, every_second, **twice)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_greedy_takes_the_first_of_the_most_probable():
    logits = torch.full((4, 1001), -1.0)
    logits[0, [300, 1000]], logits[1, 1000], logits[2, 0] = 2.0, 3.0, -0.5
    how = {"greedy": True, "temperature": 0.7}
    tokens, logprobs, entropies, kept, _ = draw(logits, **how)
    assert tokens.tolist() == [300, 1000, 0, 0]
    assert kept.tolist() == [1.0] * 4
    logp = log_distribution(logits, 0.7)
    torch.testing.assert_close(logprobs.double(), logp[range(4), tokens], **close(torch.float32, 8))
    torch.testing.assert_close(entropies.double(), -(logp.exp() * logp).sum(-1), **close(torch.float32, 8))
    assert draw(logits, forbidden_ids=torch.tensor([300]), **how)[0].tolist() == [1000, 1000, 0, 0]
    assert draw(logits, seed=8, top_k=3, top_p=0.1, **how)[0].tolist() == [300, 1000, 0, 0]


def test_rows_may_lie_apart_and_numbers_may_be_views():
    logits, places = torch.randn(5, 700), torch.arange(10).view(5, 2)
    expected = ops.sample_tokens(logits, 1, places[:, 0].clone(), places[:, 1].clone(), top_p=0.9)
    for view in (torch.randn(5, 800)[:, 50:750].copy_(logits), logits.t().contiguous().t()):
        tokens, *records = ops.sample_tokens(view, 1, places[:, 0], places[:, 1], top_p=0.9)
        assert tokens.equal(expected[0])
        for part, whole in zip(records, expected[1:], strict=True):
            torch.testing.assert_close(part, whole, **close(torch.float32))
    assert [len(part) for part in draw(torch.zeros(0, 7))] == [0] * 5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, expected a finite number above 0; greedy=True"),
        ({"logit_scale": -1.0}, "logit_scale is -1.0"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"top_k": -1}, "top_k is -1, expected at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"is_forbidden": torch.ones(3)}, r"is_forbidden is torch.float32 \(3,\), expected torch.bool \(2,\)"),
        ({"forbidden_ids": torch.ones(3)}, r"forbidden_ids is torch.float32 \(3,\), expected torch.int64 \(3,\)"),
        (
            {"requests": torch.zeros(3, dtype=torch.int64)},
            r"requests is torch.int64 \(3,\), expected torch.int64 \(2,\)",
        ),
        ({"logits": torch.zeros(3)}, r"logits are torch.float32 \(3,\), expected floating point \(N, V\)"),
    ],
)
def test_what_cannot_be_served_is_refused(how, message):
    two = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        ops.sample_tokens(**({"logits": torch.zeros(2, 5), "seed": 0, "requests": two, "positions": two} | how))

"""The specification itself, against numbers worked out by hand, closed forms, and published vectors."""

import doctest
import math
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tolerances import close

import fastppo
from fastppo import reference

PACKAGE = Path(fastppo.__file__).parent
F32, F64 = close(torch.float32, 4), close(torch.float64, 20)
LN2 = 0.693147


def test_one_ppo_step_by_hand():
    """Follow one sample of two response tokens from the logits to the losses."""
    near = {"atol": 1e-4, "rtol": 0}
    # The policy sampled token 0 twice, at probability 1/2, then 1/4; the reference gives it 1/4 both times.
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log()
    logprobs, entropy, _ = reference.row_statistics(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(logprobs, torch.tensor([-0.6931, -1.3863]), **near)
    torch.testing.assert_close(entropy, torch.tensor([1.0397, 1.0397]), **near)  # 1.5 ln 2
    ref_logprobs = torch.tensor([0.25, 0.25]).log()

    # Leaving the reference costs 0.5 nats per nat; the whole response scored 1, paid out on its last token.
    kl = reference.kl_penalty(logprobs, ref_logprobs, "kl")
    rewards = -0.5 * kl + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(rewards, torch.tensor([-0.3466, 1.0]), **near)

    # With gamma = lambda = 1 an advantage is the sum of the rewards still to come, less what the critic expected.
    values = torch.tensor([0.5, 0.5])
    advantages = reference.gae(rewards, values, torch.tensor([0, 2]), 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([0.1534, 0.5]), **near)
    returns = advantages + values
    torch.testing.assert_close(returns, torch.tensor([0.6534, 1.0]), **near)
    advantages = reference.whiten(advantages)
    torch.testing.assert_close(advantages, torch.tensor([-0.7071, 0.7071]), **near)

    # An update made both tokens 1.2 times as likely. Wrong for the first one, and wrong is never clipped: 0.7071 x 1.2.
    # Right for the second one, but further than 0.1: -0.7071 x 1.1, and no gradient.
    new = (logprobs + math.log(1.2)).requires_grad_()
    policy_loss = reference.clipped_policy_loss(new, logprobs, advantages, 0.1, 0.1)
    torch.testing.assert_close(policy_loss, torch.tensor([0.8485, -0.7778]), **near)
    policy_loss.mean().backward()
    torch.testing.assert_close(new.grad, torch.tensor([0.4243, 0.0]), **near)

    # The critic went to 0.6 and 0.9; 0.9 is further than 0.2 from 0.5, so 0.7 counts: (0.7 - 1)² / 2.
    value_loss = reference.clipped_value_loss(torch.tensor([0.6, 0.9]), values, returns, 0.2)
    torch.testing.assert_close(value_loss, torch.tensor([0.0014, 0.0450]), **near)


@pytest.mark.parametrize(
    "name",
    [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    ],
)
def test_examples_in_docstrings(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


def test_row_statistics_of_known_distributions():
    logits = torch.log(torch.tensor([[1.0, 1, 1, 1], [1, 2, 4, 1], [8, 0, 0, 0]], dtype=torch.float64))
    logprobs, entropy, logsumexp = reference.row_statistics(logits, torch.tensor([3, 2, 0]))
    ln2 = math.log(2)
    torch.testing.assert_close(logprobs, torch.tensor([-2 * ln2, -ln2, 0.0], dtype=torch.float64), **F64)
    torch.testing.assert_close(entropy, torch.tensor([2 * ln2, 1.75 * ln2, 0.0], dtype=torch.float64), **F64)
    torch.testing.assert_close(logsumexp, torch.tensor([2 * ln2, 3 * ln2, 3 * ln2], dtype=torch.float64), **F64)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_row_statistics_do_not_overflow(shift):
    logprobs, entropy, logsumexp = reference.row_statistics(torch.full((1, 8), shift), torch.tensor([5]))
    torch.testing.assert_close(logprobs, torch.tensor([-3 * LN2]), atol=2e-3, rtol=0)
    torch.testing.assert_close(entropy, torch.tensor([3 * LN2]), atol=2e-3, rtol=0)
    torch.testing.assert_close(logsumexp, torch.tensor([shift + 3 * LN2]), **F32)


def test_scaled_logits_by_hand():
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0], [0.5, 0.5]])
    raw = torch.tensor([[3.0 - 2 + 0.5, 0.5 + 1 - 1.0]])  # h Wᵀ + b
    bias = torch.tensor([0.5, -1.0])
    torch.testing.assert_close(reference.scaled_logits(hidden, weight, bias), raw, **F32)
    ours = reference.scaled_logits(hidden, weight, bias, temperature=0.5, softcap=2.0, logit_scale=3.0)
    by_hand = [[2 * math.tanh(3 * u / 2) / 0.5 for u in raw[0].tolist()]]
    torch.testing.assert_close(ours, torch.tensor(by_hand), **F32)
    assert reference.scaled_logits(hidden.bfloat16(), weight.bfloat16()).dtype == torch.float32
    assert reference.scaled_logits(hidden.double(), weight.double()).dtype == torch.float64


def test_exact_kl_by_hand():
    policy = torch.log(torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64))
    other = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]], dtype=torch.float64))
    expected = torch.tensor([0.5 * math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(reference.exact_kl(policy + 7, other - 3), expected, **F64)


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("kl", [2.0, -0.5, 0.0]),
        ("k1", [2.0, -0.5, 0.0]),
        ("abs", [2.0, 0.5, 0.0]),
        ("mse", [2.0, 0.125, 0.0]),
        ("k2", [2.0, 0.125, 0.0]),
        ("k3", [math.exp(-2) - 1 + 2, math.exp(0.5) - 1 - 0.5, 0.0]),
    ],
)
def test_kl_penalties(kind, by_hand):
    s = torch.tensor([2.0, -0.5, 0.0])
    torch.testing.assert_close(reference.kl_penalty(s - 1, torch.full((3,), -1.0), kind), torch.tensor(by_hand), **F32)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_estimate_the_kl_without_bias(kind):
    logp = torch.log_softmax(torch.randn(40, dtype=torch.float64), 0)
    ref_logp = torch.log_softmax(torch.randn(40, dtype=torch.float64), 0)
    expectation = (logp.exp() * reference.kl_penalty(logp, ref_logp, kind)).sum()
    exact = torch.nn.functional.kl_div(ref_logp, logp, log_target=True, reduction="sum")
    torch.testing.assert_close(expectation, exact, **F64)


def test_unknown_kl_penalty_is_named():
    with pytest.raises(ValueError, match=r"'k4'; expected kl, abs, mse, k1, k2 or k3"):
        reference.kl_penalty(torch.zeros(1), torch.zeros(1), "k4")


def gae_by_definition(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Return A_t = Σ_l (γλ)^l δ_{t+l} of one sample: the sum itself, no recursion."""
    after = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards + gamma * after - values
    steps = range(len(rewards))
    return torch.stack([sum((gamma * lam) ** (k - t) * deltas[k] for k in steps if k >= t) for t in steps])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_errors(gamma, lam):
    offsets = torch.tensor([0, 1, 6, 6, 9])  # the third sample is empty
    rewards, values = torch.randn(2, 9, dtype=torch.float64)
    parts = [gae_by_definition(rewards[a:b], values[a:b], gamma, lam) for a, b in pairwise(offsets.tolist()) if b > a]
    torch.testing.assert_close(reference.gae(rewards, values, offsets, gamma, lam), torch.cat(parts), **F64)


def test_gae_of_gamma_and_lambda_one_is_the_reward_to_go_less_the_value():
    rewards, values = torch.randn(2, 7, dtype=torch.float64)
    to_go = torch.cat([rewards[:3].flip(0).cumsum(0).flip(0), rewards[3:].flip(0).cumsum(0).flip(0)])
    torch.testing.assert_close(reference.gae(rewards, values, torch.tensor([0, 3, 7]), 1.0, 1.0), to_go - values, **F64)


def test_gae_of_one_sample_knows_nothing_of_another():
    rewards, values = torch.randn(2, 8)
    alone = reference.gae(rewards[3:], values[3:], torch.tensor([0, 5]), 0.9, 0.8)
    together = reference.gae(rewards, values, torch.tensor([0, 3, 8]), 0.9, 0.8)[3:]
    torch.testing.assert_close(together, alone, atol=0, rtol=0)


@pytest.mark.parametrize(("num_items", "num_bins", "max_per_bin"), [(64, 4, 16), (63, 4, 16), (5, 8, 1), (40, 3, 1000)])
def test_pack_fills_within_the_limit_and_evenly(num_items, num_bins, max_per_bin):
    lengths = torch.randint(1, 100, (num_items,))
    bins = reference.pack(lengths, num_bins, max_per_bin)
    counts = torch.bincount(bins, minlength=num_bins)
    assert counts.sum() == num_items
    assert counts.max() <= max_per_bin
    if max_per_bin >= num_items:  # nothing but the sums decided: no bin is ahead of another by more than one item
        sums = torch.zeros(num_bins, dtype=torch.int64).index_add_(0, bins, lengths)
        assert sums.max() - sums.min() <= lengths.max()


def test_pack_takes_items_in_the_order_given():
    # Descending: 5 | 4, then 3 joins 4, then 2 joins 5: 7 and 7. Ascending: 2 | 3, 2+4, 3+5: 6 and 8.
    assert reference.pack([5, 4, 3, 2], 2, 2).tolist() == [0, 1, 1, 0]
    assert reference.pack([2, 3, 4, 5], 2, 2).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_gives_unit_variance(shift_mean):
    x = 3 * torch.randn(50, dtype=torch.float64) + 5
    whitened = reference.whiten(x, shift_mean)
    assert float(whitened.mean()) == pytest.approx(0.0 if shift_mean else float(x.mean()), abs=1e-12)
    assert float(((whitened - whitened.mean()) ** 2).sum() / 49) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("x", [[], [3.0]])
def test_whiten_leaves_fewer_than_two_entries_alone(x):
    before = torch.tensor(x)
    after = reference.whiten(before)
    assert after.tolist() == x
    assert after.data_ptr() != before.data_ptr() or not x  # a copy: the caller may write to it


def test_whiten_of_equal_entries_is_zero():
    assert reference.whiten(torch.full((4,), 2.5)).tolist() == [0.0] * 4


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 1.0, 1.25, 1.5])
def test_clipped_policy_loss_and_its_gradient(ratio, advantage):
    """Clip between 1 - 0.2 and 1 + 0.4, which differ on purpose."""
    new = torch.tensor([math.log(ratio) - 2], dtype=torch.float64, requires_grad=True)
    old, gain = torch.tensor([-2.0], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss = reference.clipped_policy_loss(new, old, gain, 0.2, 0.4)
    loss.backward()
    too_far = ratio > 1.4 if advantage > 0 else ratio < 0.8
    expected = -advantage * (min(ratio, 1.4) if advantage > 0 else max(ratio, 0.8))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert new.grad.item() == pytest.approx(0.0 if too_far else -advantage * ratio, abs=1e-12)


def test_clipped_value_loss_by_hand():
    values, old = torch.tensor([0.1, 1.0, 1.0, -1.0], requires_grad=True), torch.zeros(4)
    returns = torch.tensor([1.0, 1.0, -1.0, 0.0])
    loss = reference.clipped_value_loss(values, old, returns, 0.2)
    # inside the range; right but clipped to 0.2; wrong, and worse than clipped; wrong below
    torch.testing.assert_close(loss.detach(), torch.tensor([0.405, 0.32, 2.0, 0.5]), **F32)
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 0.0, 2.0, -1.0]), **F32)

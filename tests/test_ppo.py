"""PPO's mathematics on flat tensors: hand numbers, and loops written out here in fp64."""

import math

import pytest
import torch
from tolerances import close

from fastppo import controllers, ops, ppo
from fastppo.config import PPOConfig
from fastppo.types import Evaluation

F32, F64 = close(torch.float32, 4), close(torch.float64, 20)


def evaluation(logprobs, ref_logprobs, exact_kl=None):
    return Evaluation(logprobs, ref_logprobs, torch.zeros_like(logprobs), exact_kl, is_recorded=True)


def test_rewards_are_the_penalty_and_the_score_on_each_last_token():
    of_tokens = evaluation(torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([-2.0, -1.0, -3.0, -1.5]))
    scores, offsets = torch.tensor([10.0, -5.0]), torch.tensor([0, 3, 4])
    rewards, penalties = ppo.shape_rewards(scores, of_tokens, offsets, 0.1, "kl")
    torch.testing.assert_close(penalties, torch.tensor([-0.1, 0.1, 0.0, -0.05]), **F32)
    torch.testing.assert_close(rewards, torch.tensor([-0.1, 0.1, 10.0, -5.05]), **F32)


def test_rewards_of_the_exact_kl():
    logprobs = torch.tensor([-1.0, -2.0])
    exact = evaluation(logprobs, logprobs + 9, exact_kl=torch.tensor([0.5, 0.25]))
    rewards, penalties = ppo.shape_rewards(torch.tensor([1.0]), exact, torch.tensor([0, 2]), 2.0, "full")
    assert penalties.tolist() == [-1.0, -0.5]
    assert rewards.tolist() == [-1.0, 0.5]
    with pytest.raises(ValueError, match="'full' needs both logits"):
        ppo.shape_rewards(torch.tensor([1.0]), evaluation(logprobs, logprobs), torch.tensor([0, 2]), 2.0, "full")


def backward_loop(rewards, values, gamma, lam):
    """Return the advantages of one sample, floats in and out."""
    advantages, running, after = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * after - values[t] + gamma * lam * running
        advantages[t], after = running, values[t]
    return advantages


def whitened(x):
    """Return floats scaled to mean 0 and unbiased variance 1, as an fp64 tensor."""
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / (len(x) - 1)
    return torch.tensor([(v - mean) / math.sqrt(variance + 1e-8) for v in x], dtype=torch.float64)


def test_advantages_are_whitened_over_the_batch_and_returns_are_not():
    rewards, values = torch.randn(2, 9, dtype=torch.float64)
    config = PPOConfig(gamma=0.9, lam=0.8)
    advantages, returns = ppo.estimate_advantages(rewards, values, torch.tensor([0, 4, 9]), config)
    r, v = rewards.tolist(), values.tolist()
    plain = backward_loop(r[:4], v[:4], 0.9, 0.8) + backward_loop(r[4:], v[4:], 0.9, 0.8)
    torch.testing.assert_close(advantages, whitened(plain), **F64)
    torch.testing.assert_close(returns, torch.tensor(plain, dtype=torch.float64) + values, **F64)


def test_the_critic_learns_returns_of_its_own_lambda():
    rewards, values = torch.randn(2, 6, dtype=torch.float64)
    offsets, config = torch.tensor([0, 6]), PPOConfig(lam=0.5, lam_critic=1.0)
    advantages, returns = ppo.estimate_advantages(rewards, values, offsets, config)
    to_go = rewards.flip(0).cumsum(0).flip(0)  # lambda 1: what really came
    torch.testing.assert_close(returns, to_go, **F64)
    plain = backward_loop(rewards.tolist(), values.tolist(), 1.0, 0.5)
    torch.testing.assert_close(advantages, whitened(plain), **F64)


def test_whitened_rewards_keep_their_mean():
    rewards, values = torch.randn(2, 6, dtype=torch.float64)
    _, returns = ppo.estimate_advantages(rewards, values, torch.tensor([0, 6]), PPOConfig(whiten_rewards=True, lam=1.0))
    mean = float(rewards.mean())
    scaled = whitened(rewards.tolist()) + mean
    torch.testing.assert_close(returns, scaled.flip(0).cumsum(0).flip(0), **F64)


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_old_trl_counts_masked_positions_as_steps(whiten_rewards):
    """Prompt positions, a gap and padding all decay what comes after them, and whitened rewards reach them."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    rewards, values = torch.randn(2, 2, 6, dtype=torch.float64)
    config = PPOConfig(gamma=0.9, lam=0.8, whiten_rewards=whiten_rewards, compat="trl-0.7")
    advantages, returns = ppo.estimate_advantages_trl07(rewards, values, mask, config)
    r, v = (rewards * mask), (values * mask)
    if whiten_rewards:
        trained = r[mask].tolist()
        mean = sum(trained) / len(trained)
        spread = math.sqrt(sum((x - mean) ** 2 for x in trained) / (len(trained) - 1) + 1e-8)
        r = (r - mean) / spread + mean
    plain = torch.tensor([backward_loop(r[i].tolist(), v[i].tolist(), 0.9, 0.8) for i in range(2)], dtype=torch.float64)
    torch.testing.assert_close(returns, plain + v, **F64)
    torch.testing.assert_close(advantages[mask], whitened(plain[mask].tolist()), **F64)


def test_a_gap_in_a_response_is_no_time_step_unless_trl_compatible():
    mask = torch.tensor([[True, False, True]])
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 7.0, 0.25]])
    config = PPOConfig(gamma=0.5, lam=1.0)
    _, flat = ppo.estimate_advantages(rewards[mask], values[mask], torch.tensor([0, 2]), config)
    torch.testing.assert_close(flat, torch.tensor([0.5, 1.0]), **F32)  # the reward is one step away
    _, padded = ppo.estimate_advantages_trl07(rewards, values, mask, config)
    torch.testing.assert_close(padded[mask], torch.tensor([0.25, 1.0]), **F32)  # two steps away


def test_token_weights_by_hand():
    offsets = torch.tensor([0, 2, 6, 7])
    assert ppo.token_weights(offsets, [2, 0], "token-mean").tolist() == pytest.approx([1 / 3] * 3)
    assert ppo.token_weights(offsets, [2, 0], "sequence-mean").tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("rows", [[0], [1, 3], [3, 2, 1, 0], [0, 1, 2, 3]])
def test_token_weights_sum_to_one(aggregation, rows):
    offsets = torch.tensor([0, 5, 6, 19, 40])
    weights = ppo.token_weights(offsets, rows, aggregation)
    assert len(weights) == sum([5, 1, 13, 21][row] for row in rows)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)


def policy_loss(old, entropy_coef=0.0):
    advantages, weights = torch.tensor([1.0, -2.0, 1.0]), torch.tensor([0.5, 0.25, 0.25])
    return ops.PPOLoss(old, advantages, weights, 0.2, 0.3, entropy_coef)


def test_policy_loss_by_hand_in_two_chunks():
    loss = policy_loss(torch.tensor([-1.0, -1.0, -1.0]), entropy_coef=0.1)
    logprobs = (torch.tensor([1.5, 1.1, 0.5]).log() - 1).requires_grad_()
    entropies = torch.tensor([2.0, 1.0, 3.0], requires_grad=True)
    parts = [loss(logprobs[rows], entropies[rows], rows) for rows in torch.arange(3).split(2)]
    # 1.5 is clipped to 1.3; 1.1 x 2 counts in full; 0.5 is too low, and the lower bound is not taken for a gain.
    expected = torch.tensor([0.5 * (-1.3 - 0.2), 0.25 * (2.2 - 0.1), 0.25 * (-0.5 - 0.3)])
    torch.testing.assert_close(torch.cat(parts).detach(), expected, **F32)
    torch.cat(parts).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.25 * 2.2, -0.25 * 0.5]), **F32)
    torch.testing.assert_close(entropies.grad, -0.1 * loss.weights, **F32)
    assert loss.logprobs.equal(logprobs.detach())
    assert loss.entropies.equal(entropies.detach())


def test_policy_loss_of_the_first_step_is_the_policy_gradient():
    loss = policy_loss(None)
    logprobs = torch.tensor([-3.0, -0.1, -7.0], requires_grad=True)
    value = loss(logprobs, torch.zeros(3), torch.arange(3)).sum()
    value.backward()
    assert value.item() == pytest.approx(-(0.5 - 0.5 + 0.25))  # the ratio is 1: minus the weighted advantages
    torch.testing.assert_close(logprobs.grad, -loss.advantages * loss.weights, **F32)


def test_policy_statistics_by_hand():
    old, ratios = torch.full((4,), -1.0), torch.tensor([1.0, 2.0, 0.5, 1.2])
    advantages, weights = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    config = PPOConfig(cliprange=0.25, cliprange_high=0.5)
    entropies = torch.tensor([1.0, 2.0, 3.0, 2.0])
    stats, ratio = ppo.policy_statistics(old + ratios.log(), old, entropies, advantages, weights, config)
    ln2, ln12 = math.log(2), math.log(1.2)
    torch.testing.assert_close(ratio, ratios, **F32)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "loss/policy": -0.4 - 0.3 * 1.5 + 0.2 * 0.75 + 0.1 * 1.2,
            "policy/entropy": 2.0,
            "policy/approxkl": (ln2**2 + ln2**2 + ln12**2) / 8,
            "policy/policykl": -ln12 / 4,
            "policy/clipfrac": 0.5,
            "policy/advantages_mean": 0.0,
        },
        abs=1e-6,
    )


def test_value_statistics_by_hand():
    new, old = torch.tensor([0.1, 1.0]), torch.tensor([0.0, 0.5])
    returns, weights = torch.tensor([0.3, 1.0]), torch.tensor([0.75, 0.25])
    stats = ppo.value_statistics(new, old, returns, weights, PPOConfig(cliprange_value=0.2))
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "loss/value": 0.5 * (0.75 * 0.2**2 + 0.25 * 0.3**2),
            "val/vpred": 0.55,
            "val/error": 0.02,
            "val/clipfrac": 0.5,
            "val/mean": 0.25,
            "val/var": 0.125,
            "returns/mean": 0.65,
            "returns/var": 0.245,
        },
        abs=1e-6,
    )
    one = ppo.value_statistics(new[:1], old[:1], returns[:1], torch.ones(1), PPOConfig())
    assert one["val/var"].item() == one["returns/var"].item() == 0.0


def test_sample_sums():
    sums = ppo.sample_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 1, 1, 4]))
    assert sums.tolist() == [1.0, 0.0, 14.0]


@pytest.mark.parametrize(
    ("current", "error"), [(6.0, 0.0), (6.6, 0.1), (5.7, -0.05), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)]
)
def test_adaptive_controller_moves_in_proportion_up_to_a_fifth(current, error):
    controller = controllers.AdaptiveKLController(0.2, target=6.0, horizon=1000.0)
    controller.update(current, n_steps=50)
    assert controller.value == pytest.approx(0.2 * (1 + error * 0.05))


def test_adaptive_controller_compounds_and_the_fixed_one_stays():
    adaptive, fixed = controllers.AdaptiveKLController(0.2, 6.0, 100.0), controllers.FixedKLController(0.2)
    for _ in range(3):
        adaptive.update(100.0, 10)
        fixed.update(100.0, 10)
    assert adaptive.value == pytest.approx(0.2 * 1.02**3)
    assert fixed.value == 0.2


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [2, 7, 1, 30]])
def test_running_moments_are_those_of_all_numbers_together(sizes):
    running, seen = controllers.RunningMoments(), []
    for size in sizes:
        seen.append(1e3 + 5 * torch.randn(size))
        mean, std = running.update(seen[-1])
        assert mean == pytest.approx(float(seen[-1].double().mean()))
        assert std == pytest.approx(float(seen[-1].double().std()) if size > 1 else 0.0, rel=1e-9)
        together = torch.cat(seen).double()
        assert running.count == pytest.approx(len(together))
        assert running.mean == pytest.approx(float(together.mean()))
        assert running.std == pytest.approx(float(together.std()) if len(together) > 1 else 0.0, rel=1e-9)


def test_scores_are_scaled_normalised_and_clipped_as_asked():
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0])
    std = (14 / 3) ** 0.5  # mean 3, squared distances 4 + 1 + 0 + 9

    def processed(**options):
        return controllers.process_scores(scores, controllers.RunningMoments(), PPOConfig(**options))

    assert processed().equal(scores)
    assert processed(score_clip=2.5).tolist() == [1.0, 2.0, 2.5, 2.5]
    torch.testing.assert_close(processed(use_score_scaling=True), scores / std, **F32)
    both = {"use_score_scaling": True, "use_score_norm": True}
    torch.testing.assert_close(processed(**both), (scores - 3) / std, **F32)
    clipped = processed(**both, score_clip=0.5)
    torch.testing.assert_close(clipped, torch.tensor([-0.5, -1 / std, 0.0, 0.5]).clamp(-0.5, 0.5), **F32)
    assert processed(use_score_norm=True).equal(scores)  # without scaling it does nothing, as in TRL


def test_scores_are_scaled_by_all_batches_so_far():
    running, config = controllers.RunningMoments(), PPOConfig(use_score_scaling=True, use_score_norm=True)
    alone = controllers.process_scores(torch.tensor([4.0]), running, config)
    assert alone.tolist() == [0.0]  # one number has no spread: not divided by zero
    second = controllers.process_scores(torch.tensor([6.0, 8.0]), running, config)
    torch.testing.assert_close(second, torch.tensor([0.0, 1.0]), **F32)  # mean 6, deviation 2 of 4, 6 and 8

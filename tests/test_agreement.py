"""The gate on recorded log-probs: its statistics, its verdict, and the weights where it refuses."""

import math
from contextlib import nullcontext

import pytest
import torch

from fastppo.engine.agreement import agreement, importance_weights, rows_to_rescore
from tests.tiny_trainers import batch, policy, trainer


def test_statistics_against_their_definitions():
    recorded = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    gaps = [0.1, -0.2, 0.0, 0.05]
    result = agreement(recorded, recorded + torch.tensor(gaps))
    ratios = [math.exp(gap) for gap in gaps]
    assert result.gap_median == pytest.approx(0.1, abs=1e-6)  # the higher of the two in the middle
    assert result.gap_max == result.gap_q999 == pytest.approx(0.2, abs=1e-6)
    assert result.k3 == pytest.approx(sum(r - 1 - g for r, g in zip(ratios, gaps, strict=True)) / 4, abs=1e-6)
    assert result.chi2 == pytest.approx(sum((r - 1) ** 2 for r in ratios) / 4, abs=1e-6)
    assert result.ess == pytest.approx(sum(ratios) ** 2 / (4 * sum(r * r for r in ratios)), abs=1e-6)


@pytest.mark.parametrize(
    ("gap", "length", "is_close"),
    [(0.0, 1000, True), (0.049, 8, True), (0.051, 8, False), (0.02, 90, True), (0.02, 120, False)],
)
def test_the_verdict(gap, length, is_close):
    # cliprange 0.2 leaves 0.05; k3 of a constant gap g is about g²/2 a token, and 0.02 nats are left for a response
    recorded = torch.zeros(100)
    assert agreement(recorded, recorded + gap).is_close(0.2, length) == is_close


def test_nothing_and_nan_are_no_agreement():
    assert not agreement(torch.zeros(0), torch.zeros(0)).is_close(0.2, 1)
    assert not agreement(torch.zeros(2), torch.tensor([0.0, math.nan])).is_close(0.2, 1)


def test_rows_are_drawn_from_the_seed():
    assert rows_to_rescore(1, 3) == [0]
    assert rows_to_rescore(64, 3) == rows_to_rescore(64, 3) != rows_to_rescore(64, 4)
    assert len(rows_to_rescore(64, 3)) == 2
    assert len(set(rows_to_rescore(1000, 3))) == 10


def test_weights_are_capped():
    weights = importance_weights(torch.tensor([0.0, -1.0, 3.0]), torch.tensor([0.0, 0.0, 0.0]), 2.0)
    assert torch.allclose(weights, torch.tensor([1.0, math.exp(-1), 2.0]))


def rollout_of(one, gap=0.0):
    """A rollout of the trainer's model whose records are off by `gap`."""
    queries, _, scores = batch()
    rollout = one.generate(queries, return_prompt=False, max_new_tokens=6, min_new_tokens=6)
    rollout.logprobs.add_(gap)
    return queries, rollout, scores


def test_good_records_are_believed_and_reported():
    one = trainer(rescore_every=1)
    stats = one.step(*rollout_of(one))
    assert stats["ppo/agreement/recomputed"] == 0.0
    assert 0 <= stats["ppo/agreement/gap_max"] < 1e-5
    assert stats["ppo/agreement/ess"] == pytest.approx(1, abs=1e-6)


def test_bad_records_are_refused_and_their_tokens_weighted():
    """A record that is 0.3 too high everywhere: each token counts exp(-0.3) times what it would from a plain list."""
    plain, refused = trainer(ppo_epochs=1, vf_coef=1e-9), trainer(ppo_epochs=1, vf_coef=1e-9)
    queries, rollout, scores = rollout_of(refused, gap=0.3)
    seen = []
    for one, responses in ((plain, list(rollout)), (refused, rollout)):
        one.optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        )
        with pytest.warns(UserWarning, match=r"off by 0\.3") if one is refused else nullcontext():
            stats = one.step(queries, responses, scores)
    assert stats["ppo/agreement/recomputed"] == 1.0
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(b, a * math.exp(-0.3), rtol=1e-3, atol=1e-6)


def test_a_refusal_ends_when_the_records_agree_again():
    one = trainer(rescore_every=1000)
    with pytest.warns(UserWarning, match="recorded log-probs"):
        assert one.step(*rollout_of(one, gap=0.3))["ppo/agreement/recomputed"] == 1.0
    assert one.step(*rollout_of(one))["ppo/agreement/recomputed"] == 0.0
    # Not due again for a long time: what it believed, it believes.
    assert one.step(*rollout_of(one, gap=0.3))["ppo/agreement/recomputed"] == 0.0


def test_exact_does_not_bear_a_difference():
    one = trainer(policy("llama"))
    one.config.consistency = "exact"
    with pytest.raises(RuntimeError, match="consistency='exact', but recorded and recomputed log-probs differ"):
        one.step(*rollout_of(one, gap=1e-4))

"""The policy losses: values by hand, derivatives by their closed forms, and through the head."""

import math

import pytest
import torch
from test_ops import assert_same, gradients, make_inputs, naive_statistics
from tolerances import close

from fastppo import ops, ppo

F64 = close(torch.float64, 100)
OLD = torch.zeros(8, dtype=torch.float64)
RATIOS = torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 0.5, 2.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0, 2.0, 1.0, 1.0, -2.0, -1.0, -1.0], dtype=torch.float64)


def value_and_slope(loss):
    """Return the losses at `RATIOS` and their derivatives by the log-probs."""
    logprobs = RATIOS.log().requires_grad_()
    value = loss(logprobs)
    return value.detach(), torch.autograd.grad(value.sum(), logprobs)[0]


def test_dual_clip():
    value, slope = value_and_slope(lambda x: ppo.dual_clip_loss(x, OLD, ADVANTAGES, 0.2, 0.2, 3.0))
    # The sixth, with ratio 5 and A = -2, is cut at 3: neither value nor gradient goes on.
    expected = torch.tensor([-0.5, 0.9, -2.0, -1.1, -1.2, 6.0, 0.8, 2.0], dtype=torch.float64)
    torch.testing.assert_close(value, expected, **F64)
    expected = torch.tensor([-0.5, 0.9, -2.0, -1.1, 0.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(slope, expected, **F64)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    value, slope = value_and_slope(lambda x: ppo.cispo_loss(x, OLD, ADVANTAGES, 0.5))
    torch.testing.assert_close(slope, -RATIOS.clamp_max(1.5) * ADVANTAGES, **F64)
    torch.testing.assert_close(value, slope * RATIOS.log(), **F64)


def test_reinforce():
    value, slope = value_and_slope(lambda x: ppo.reinforce_loss(x, ADVANTAGES))
    torch.testing.assert_close(value, -ADVANTAGES * RATIOS.log(), **F64)
    torch.testing.assert_close(slope, -ADVANTAGES, **F64)


@pytest.mark.parametrize(
    ("kind", "slope"),
    [
        ("k1", lambda s: 1.0),
        ("abs", lambda s: math.copysign(1, s)),
        ("k2", lambda s: s),
        ("k3", lambda s: -math.expm1(-s)),
    ],
)
def test_kl_estimates(kind, slope):
    ref = torch.full_like(OLD, -0.3)
    _, ours = value_and_slope(lambda x: ppo.kl_loss(x, ref, kind))
    expected = [slope(x + 0.3) for x in RATIOS.log().tolist()]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), **F64)


def test_entropy_loss_raises_the_entropy():
    entropies = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = ppo.entropy_loss(entropies, 0.25)
    assert loss.tolist() == [-0.25, -0.5]
    assert torch.autograd.grad(loss.sum(), entropies)[0].tolist() == [-0.25, -0.25]


def test_losses_compose_to_a_loss_of_the_head():
    """A user's own sum of them, through the chunks, against autograd over the whole."""
    *parts, labels = make_inputs()
    rows = len(labels)
    old, ref = naive_statistics(*parts, labels)[0].detach() + 0.2 * torch.randn(2, rows)
    advantages = torch.randn(rows)

    def loss(logprobs, entropies, at):
        policy = ppo.dual_clip_loss(logprobs, old[at], advantages[at], 0.1, 0.2, 2.0)
        penalty = 0.3 * ppo.kl_loss(logprobs, ref[at], "k3")
        return (policy + penalty + ppo.entropy_loss(entropies, 0.1)) / rows

    ours = ops.linear_loss(*parts[:2], labels, loss, bias=parts[2])
    expected = loss(*naive_statistics(*parts, labels)[:2], torch.arange(rows)).sum()
    torch.testing.assert_close(ours, expected, **F64)
    assert_same(gradients(ours, parts), gradients(expected, parts), F64)

"""The C++ row kernels of every instruction set that runs here, against autograd in fp64 on whole rows."""

import math

import pytest
import torch
from tolerances import close

from fastppo import ops
from fastppo.ops import rows as row_ops
from fastppo.ops.row_types import Reference, Scaling, Upstream

_native = pytest.importorskip("fastppo._native", reason="built without the C++ extension")

# Below a vector, one, around a stripe, around a block of 1024, several blocks with a rest.
VOCABULARIES = [1, 2, 7, 8, 16, 31, 32, 33, 1000, 1023, 1024, 1025, 4099]
SCALINGS = [Scaling(), Scaling(0.7), Scaling(1.3, 5.0), Scaling(0.9, 30.0, 0.5), Scaling(5.0, None, 0.2)]
REF_SCALING = Scaling(1.1, 20.0, 0.8)
ROWS = 5


@pytest.fixture(params=_native.available_isas(), autouse=True)
def isa(request):
    """Run every test of this file with the kernels of each instruction set."""
    before = _native.isa()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)


def scaled(u, scaling):
    temperature, softcap, logit_scale = scaling
    z = u * logit_scale
    return (softcap * torch.tanh(z / softcap) if softcap else z) / temperature


def oracle(u, labels, scaling, u_ref=None):
    """Return logprobs, entropies, logsumexp and, with a reference, KL, by log-softmax in fp64."""
    log_p = torch.log_softmax(scaled(u, scaling), -1)
    p = log_p.exp()
    entropies = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    basic = log_p[range(len(labels)), labels], entropies, scaled(u, scaling).logsumexp(-1)
    if u_ref is None:
        return basic
    log_q = torch.log_softmax(scaled(u_ref, REF_SCALING), -1)
    return *basic, torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def make_rows(vocabulary, dtype=torch.float32, size=4.0, rows=ROWS):
    """Return logits that rise along the row, so that later blocks move the maximum, in a wider matrix, and labels."""
    wide = size * torch.randn(rows, vocabulary + 3) + torch.linspace(-6, 6, vocabulary + 3)
    labels = torch.randint(vocabulary, (rows,))
    labels[0], labels[-1] = 0, vocabulary - 1
    return wide.to(dtype)[:, :vocabulary], labels


def assert_rows(ours, expected, dtype=torch.float32, factor=8):
    for name, our, truth in zip(("logprobs", "entropies", "logsumexp", "kl"), ours, expected, strict=False):
        torch.testing.assert_close(our.double(), truth, **close(dtype, factor), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_statistics_and_every_gradient(vocabulary, scaling):
    u, labels = make_rows(vocabulary)
    exact = u.double().requires_grad_()
    expected = oracle(exact, labels, scaling)
    stats = row_ops.statistics(u, labels, scaling)
    assert_rows(stats, expected)
    upstream = torch.randn(3, ROWS)
    upstream[:, 1] = 0
    (truth,) = torch.autograd.grad((upstream.double() * torch.stack(expected)).sum(), exact)
    du = row_ops.gradient(u, labels, stats, Upstream(*upstream), scaling, out=torch.empty_like(u))
    torch.testing.assert_close(du.double(), truth, **close(torch.float32, 16))
    in_place = u.clone()
    assert row_ops.gradient(in_place, labels, stats, Upstream(*upstream), scaling, out=in_place) is in_place
    assert in_place.equal(du), "written over the logits it differs"


@pytest.mark.parametrize("vocabulary", [1, 33, 1025])
@pytest.mark.parametrize("scaling", SCALINGS[:3], ids=str)
def test_exact_kl_and_its_gradient(vocabulary, scaling):
    (u, labels), (u_ref, _) = make_rows(vocabulary), make_rows(vocabulary)
    exact, ref = u.double().requires_grad_(), Reference(u_ref, REF_SCALING)
    expected = oracle(exact, labels, scaling, u_ref.double())
    stats = row_ops.statistics(u, labels, scaling, ref)
    assert_rows(stats, expected)
    upstream = torch.randn(4, ROWS)
    (truth,) = torch.autograd.grad((upstream.double() * torch.stack(expected)).sum(), exact)
    du = row_ops.gradient(u, labels, stats, Upstream(*upstream), scaling, out=u.clone(), ref=ref)
    torch.testing.assert_close(du.double(), truth, **close(torch.float32, 32))


@pytest.mark.parametrize("vocabulary", [7, 1025])
@pytest.mark.parametrize("scaling", SCALINGS[:3], ids=str)
def test_bf16_logits_lose_nothing_but_the_last_rounding(vocabulary, scaling):
    u, labels = make_rows(vocabulary, torch.bfloat16)
    exact = u.double().requires_grad_()
    expected = oracle(exact, labels, scaling)
    stats = row_ops.statistics(u, labels, scaling)
    assert_rows(stats, expected)
    upstream = torch.randn(3, ROWS)
    (truth,) = torch.autograd.grad((upstream.double() * torch.stack(expected)).sum(), exact)
    du = row_ops.gradient(u, labels, stats, Upstream(*upstream), scaling, out=u.clone())
    assert du.dtype == torch.bfloat16
    torch.testing.assert_close(du.double(), truth, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("is_ppo", [False, True])
@pytest.mark.parametrize("has_ref", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 1025])
def test_a_bf16_gradient_may_lie_where_fp32_logits_do(vocabulary, has_ref, is_ppo):
    u, labels = make_rows(vocabulary)
    terms, upstream = ppo_loss(torch.randn(ROWS), entropy_coef=0.3), Upstream(*torch.randn(3, ROWS))
    ref = Reference(torch.randn(ROWS, vocabulary), REF_SCALING) if has_ref else None
    scaling = SCALINGS[3]
    stats = row_ops.statistics(u, labels, scaling, ref)

    def gradient(logits, out):
        if is_ppo:
            return row_ops.ppo(logits, labels, terms, scaling, out) and out
        return row_ops.gradient(logits, labels, stats, upstream, scaling, out=out, ref=ref)

    expected = gradient(u, torch.empty(ROWS, vocabulary)).bfloat16()
    assert gradient(u, torch.empty(ROWS, vocabulary, dtype=torch.bfloat16)).equal(expected)
    logits = u.contiguous()
    place = logits.view(torch.bfloat16)[:, :vocabulary]
    assert gradient(logits, place).equal(expected)


def ppo_loss(old, ref=None, kl_coef=0.0, entropy_coef=0.0, rows=ROWS):
    advantages, weights = torch.randn(rows), torch.rand(rows) + 0.1
    return ops.PPOLoss(old, advantages, weights, 0.2, 0.3, entropy_coef, ref, kl_coef)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS[1:3], ids=str)
def test_the_fused_loss_is_statistics_loss_and_gradient(scaling, has_old, kl_coef, entropy_coef):
    u, labels = make_rows(1025, rows=60)
    exact = u.double().requires_grad_()
    logprobs, entropies, _ = oracle(exact, labels, scaling)
    # Far enough that some of the 60 rows are clipped on either side.
    old = (logprobs.detach() + 0.4 * torch.randn(60, dtype=torch.float64)).float() if has_old else None
    loss = ppo_loss(old, logprobs.detach().float() - 0.5 if kl_coef else None, kl_coef, entropy_coef, rows=60)
    expected = loss(logprobs, entropies, torch.arange(60))
    (truth,) = torch.autograd.grad(expected.sum(), exact)
    out = torch.empty_like(u)
    losses, *stats = row_ops.ppo(u, labels, loss.take(torch.arange(60)), scaling, out)
    torch.testing.assert_close(losses.double(), expected, **close(torch.float32, 32))
    assert_rows(stats, (logprobs, entropies))
    torch.testing.assert_close(out.double(), truth, **close(torch.float32, 32))
    is_clipped = truth.abs().amax(-1) == 0 if not (entropy_coef or kl_coef) and has_old else None
    assert is_clipped is None or 0 < int(is_clipped.sum()) < 60, "no row is clipped, or all are"
    without = row_ops.ppo(u, labels, loss.take(torch.arange(60)), scaling, None)
    assert all(a.equal(b) for a, b in zip(without, (losses, *stats), strict=True))


@pytest.mark.parametrize("peak", [0.9, 0.99, 0.999, 0.99999])
def test_the_true_class_of_confident_rows_keeps_its_digits(peak):
    """1 - p from expm1: subtracted from 1 in low precision, or added to a rounded buffer, it would be noise."""
    vocabulary = 1000
    for dtype in (torch.float32, torch.bfloat16):
        u = torch.zeros(1, vocabulary, dtype=dtype)
        u[0, 7] = math.log(peak * (vocabulary - 1) / (1 - peak))
        exact = u.double().requires_grad_()
        logprob = torch.log_softmax(exact, -1)[0, 7]
        (truth,) = torch.autograd.grad(logprob, exact)
        labels, one = torch.tensor([7]), Upstream(torch.ones(1))
        stats = row_ops.statistics(u, labels, Scaling())
        du = row_ops.gradient(u, labels, stats, one, Scaling(), out=torch.empty_like(u))
        error = abs(du[0, 7].double() / truth[0, 7] - 1).item()
        assert error < (2**-8 if dtype == torch.bfloat16 else 1e-5), f"{dtype}: off by {error:.1e}"


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_a_cap_leaves_no_log_prob_above_zero(temperature):
    """The label's logit must be, to the last bit, what it is among the others: a cold softmax shows the difference."""
    u = torch.full((9, 300), -20.0)
    labels = torch.arange(9) * 7
    u[torch.arange(9), labels] = torch.linspace(10, 290, 9)
    scaling = Scaling(temperature, 30.0)
    truth = oracle(u.double(), labels, scaling)[0]
    stats = row_ops.statistics(u, labels, scaling)
    assert (stats.logprobs <= 0).all()
    torch.testing.assert_close(stats.logprobs.double(), truth, atol=1e-6, rtol=1e-5)
    # Its slope is the cap's, which subtracted from 1 would have no digits left here.
    one = torch.ones(9)
    du = row_ops.gradient(u, labels, stats, Upstream(None, None, one), scaling, out=torch.empty_like(u))
    rows = torch.arange(9)
    expected = 4 * torch.exp(-2 * u.double().abs() / 30) / (1 + torch.exp(-2 * u.double().abs() / 30)) ** 2
    p = torch.softmax(scaled(u.double(), scaling), -1)
    torch.testing.assert_close(du[rows, labels].double(), (p * expected / temperature)[rows, labels], atol=0, rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 100.0, -1000.0])
def test_exact_kl_of_models_that_differ_by_a_constant(offset):
    u, labels = make_rows(1000, size=1.0)
    u_ref = u + 0.01 * torch.randn(u.shape)
    shifted = u_ref + offset
    log_p, log_q = u.double().log_softmax(-1), shifted.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    stats = row_ops.statistics(u, labels, Scaling(), Reference(shifted, Scaling()))
    torch.testing.assert_close(stats.kl.double(), expected, atol=2e-6, rtol=1e-3)
    assert (stats.kl >= -2e-6).all()


def test_extreme_rows():
    vocabulary, inf = 5000, float("inf")
    u = torch.zeros(7, vocabulary)
    u[0, 3000:] = -inf
    u[1, :4097] = -inf
    u[2] = -inf
    u[3] = 1e4
    u[4, 17] = float("nan")
    u[5] = -1e4
    u[6, 0] = 500.0
    labels = torch.tensor([0, 4999, 0, 4999, 0, 0, 0])
    stats = row_ops.statistics(u, labels, Scaling())
    log, nan = math.log, float("nan")
    expected = [
        [-log(3000), -log(903), -inf, -log(5000), nan, -log(5000), 0.0],
        [log(3000), log(903), 0.0, log(5000), nan, log(5000), 0.0],
        [log(3000), log(903), -inf, 1e4 + log(5000), nan, -1e4 + log(5000), 500.0],
    ]
    for ours, truth in zip(stats, expected, strict=False):
        torch.testing.assert_close(ours.float(), torch.tensor(truth), **close(torch.float32, 4), equal_nan=True)
    du = row_ops.gradient(u, labels, stats, Upstream(*torch.ones(3, 7)), Scaling(), out=torch.empty_like(u))
    assert du[2].count_nonzero() == 0, "a row of nothing has no gradient"
    assert du[4].isnan().any()
    assert du[[0, 1, 3, 5, 6]].isfinite().all()
    assert du[0, 3000:].count_nonzero() == du[1, :4097].count_nonzero() == 0, "masked tokens have no gradient"


def test_a_label_outside_the_vocabulary_is_nan():
    u, _ = make_rows(33)
    labels = torch.tensor([-1, 33, 0, 32, 10**12])
    stats = row_ops.statistics(u, labels, Scaling())
    assert stats.logprobs.isnan().tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_constant_added_to_the_logits_changes_nothing(shift):
    u = (torch.randint(-8, 8, (ROWS, 300)) / 2).float()  # so that the sum is exact
    labels = torch.randint(300, (ROWS,))
    before, after = (row_ops.statistics(x, labels, Scaling()) for x in (u, u + shift))
    assert before.logprobs.equal(after.logprobs)
    assert before.entropies.equal(after.entropies)
    gradients = [
        row_ops.gradient(x, labels, stats, Upstream(*torch.ones(2, ROWS)), Scaling(), out=x.clone())
        for x, stats in ((u, before), (u + shift, after))
    ]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_threads_do_not_change_a_bit(monkeypatch):
    u, labels = make_rows(4099, rows=33)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        stats = row_ops.statistics(u, labels, SCALINGS[2])
        upstream = Upstream(*torch.ones(2, 33))
        results.append((*stats[:3], row_ops.gradient(u, labels, stats, upstream, SCALINGS[2], out=u.clone())))
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("count", [1, 15, 16, 100_003])
def test_sums_in_halves_are_fp32_sums_rounded_once(count):
    terms = torch.randn(20, count).bfloat16()
    high, low = torch.full((2, count), 7.0, dtype=torch.bfloat16)
    for i, term in enumerate(terms):
        _native.accumulate(count, term.data_ptr(), i == 0, high.data_ptr(), low.data_ptr(), 2)
    _native.round_halves(count, high.data_ptr(), low.data_ptr(), 2)
    total = torch.zeros(count)
    for term in terms:
        total += term
    assert high.equal(total.bfloat16())


def test_ratios_that_overflow_are_clipped_or_infinite_but_never_nan():
    logprobs = torch.tensor([0.0, -200.0, 0.0], requires_grad=True)
    old, advantages = torch.tensor([-200.0, 0.0, -200.0]), torch.tensor([1.0, 1.0, -1.0])
    losses = ops.ppo_loss(logprobs, old, advantages, torch.ones(3))
    assert losses.tolist() == [pytest.approx(-1.2), 0.0, float("inf")]
    clipped = ops.ppo_loss(logprobs[:2], old[:2], advantages[:2], torch.ones(2))
    assert torch.autograd.grad(clipped.sum(), logprobs)[0].tolist() == [0.0, 0.0, 0.0]


def test_an_unknown_instruction_set_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'sse' is not available here; choose one of generic"):
        _native.use_isa("sse")

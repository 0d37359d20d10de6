"""The fast paths against naive formulas, forward and every gradient.

The naive formulas below are log-softmax and autograd over the whole [rows x vocabulary], none of the package's code.
"""

import pytest
import torch
from tolerances import close

from fastppo import ops
from fastppo.ops import chunks

ROWS, HIDDEN, VOCABULARY = 11, 5, 37
F64 = close(torch.float64, 100)
SCALINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.3},
    "scale equal to temperature": {"temperature": 2.0, "logit_scale": 2.0},
    "scale equal to temperature, softcap": {"temperature": 2.0, "logit_scale": 2.0, "softcap": 3.0},
    "all": {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.8},
}
SCALED = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
BIASED = pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
# Rows of a chunk: one each, 4 + 4 + 3, exactly all, more than there are.
CHUNKED = pytest.mark.parametrize("rows", [1, 4, 11, 64])


@pytest.fixture
def chunk(monkeypatch):
    """Return a function that sets the rows of a chunk for a vocabulary."""

    def limit(rows: int, vocabulary: int = VOCABULARY) -> None:
        monkeypatch.setattr(chunks, "_MIN_CHUNK_ROWS", 1)
        monkeypatch.setattr(chunks, "_ROW_MULTIPLE", 1)
        monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 4 * vocabulary * rows)
        assert ops.chunk_rows(vocabulary) == rows

    return limit


def make_inputs(dtype=torch.float64, has_bias=True, rows=ROWS, hidden=HIDDEN, vocabulary=VOCABULARY):
    """Return hidden, weight, bias, labels; the labels hold the first and the last token of the vocabulary."""
    shapes = [(rows, hidden), (vocabulary, hidden), (vocabulary,)]
    parts = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(vocabulary, (rows,))
    labels[0], labels[-1] = 0, vocabulary - 1
    return *(parts if has_bias else [*parts[:2], None]), labels


def naive_statistics(hidden, weight, bias, labels, temperature=1.0, softcap=None, logit_scale=1.0):
    z = hidden @ weight.t()
    z = (z if bias is None else z + bias).to(torch.promote_types(hidden.dtype, torch.float32)) * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_p = torch.log_softmax(z, -1)
    return log_p[range(len(labels)), labels], -(log_p.exp() * log_p).sum(-1), z.exp().sum(-1).log()


def gradients(output, parts):
    """Return the gradients by hidden, weight and, if there is one, bias."""
    return torch.autograd.grad(output, [part for part in parts if part is not None])


def assert_same(ours, expected, tolerance, names=("hidden", "weight", "bias")):
    for name, our, truth in zip(names, ours, expected, strict=False):
        torch.testing.assert_close(our, truth, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    assert len(ours) == len(expected)


@SCALED
@BIASED
@CHUNKED
def test_linear_logprobs_and_every_gradient(chunk, scaling, has_bias, rows):
    chunk(rows)
    *parts, labels = make_inputs(has_bias=has_bias)
    ours = ops.linear_logprobs(*parts[:2], labels, bias=parts[2], **scaling)
    expected = naive_statistics(*parts, labels, **scaling)
    assert_same(ours, expected, F64, ("logprobs", "entropy", "logsumexp"))
    # All three outputs at once, each row with an upstream gradient of its own.
    upstream = torch.randn(3, ROWS, dtype=torch.float64)
    mix = [(upstream * torch.stack(outputs)).sum() for outputs in (ours, expected)]
    assert_same(gradients(mix[0], parts), gradients(mix[1], parts), F64)


@pytest.mark.parametrize("output", [0, 1, 2], ids=["logprobs", "entropy", "logsumexp"])
def test_linear_logprobs_differentiates_each_output_alone(chunk, output):
    chunk(4)
    *parts, labels = make_inputs()
    ours = ops.linear_logprobs(*parts[:2], labels, bias=parts[2], softcap=3.0)[output].square().sum()
    expected = naive_statistics(*parts, labels, softcap=3.0)[output].square().sum()
    assert_same(gradients(ours, parts), gradients(expected, parts), F64)


def test_linear_logprobs_passes_gradcheck(chunk):
    chunk(2)
    hidden, weight, bias, labels = make_inputs(rows=5, hidden=3, vocabulary=VOCABULARY)

    def both(hidden, weight, bias):
        return ops.linear_logprobs(hidden, weight, labels, bias=bias, temperature=0.8, softcap=4.0, logit_scale=0.9)

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def ppo_like_loss(old, advantages):
    """Return a loss of PPO's form that reads log-probs, entropies and the numbers of the rows."""

    def loss(logprobs, entropies, rows):
        ratio = torch.exp(logprobs - old[rows])
        gain = torch.minimum(ratio * advantages[rows], ratio.clamp(0.8, 1.2) * advantages[rows])
        return (-gain - 0.3 * entropies.square()) * (rows + 1) / 50

    return loss


def make_loss(parts, labels, **scaling):
    """Return the loss with old log-probs near the new ones, so that some rows are clipped and some are not."""
    with torch.no_grad():
        new, *_ = naive_statistics(*(part if part is None else part.double() for part in parts), labels, **scaling)
        old = new + 0.3 * torch.randn(len(labels), dtype=torch.float64)
    return ppo_like_loss(old.float(), torch.randn(len(labels)))


@SCALED
@BIASED
@CHUNKED
def test_linear_loss_and_every_gradient(chunk, scaling, has_bias, rows):
    chunk(rows)
    *parts, labels = make_inputs(has_bias=has_bias)
    loss = make_loss(parts, labels, **scaling)
    ours = ops.linear_loss(*parts[:2], labels, loss, bias=parts[2], **scaling)
    logprobs, entropies, _ = naive_statistics(*parts, labels, **scaling)
    expected = loss(logprobs, entropies, torch.arange(ROWS)).sum()
    torch.testing.assert_close(ours, expected, **F64)
    # Scaled, as gradient accumulation does: the gradients were formed before the factor is known.
    assert_same(gradients(-1.7 * ours, parts), gradients(-1.7 * expected, parts), F64)


def test_linear_loss_agrees_with_finite_differences(chunk):
    chunk(4)
    *parts, labels = make_inputs()
    with torch.no_grad():
        hidden, weight, bias = (part.clone() for part in parts)

    def value(hidden, weight, bias):
        def smooth(logprobs, entropies, rows):
            return torch.sin(logprobs) + 0.5 * entropies * (rows + 1)

        return ops.linear_loss(hidden, weight, labels, smooth, bias=bias, temperature=0.8, softcap=4.0)

    grads = gradients(value(*parts), parts)
    for i, grad in enumerate(grads):
        step = 1e-6 * torch.randn_like(grad)
        ahead, behind = [hidden, weight, bias], [hidden, weight, bias]
        ahead[i], behind[i] = ahead[i] + step, behind[i] - step
        change = (value(*ahead) - value(*behind)) / 2
        torch.testing.assert_close((grad * step).sum(), change, atol=1e-13, rtol=1e-6)


@pytest.mark.parametrize("reads", ["logprobs", "entropies", "neither row"])
def test_linear_loss_of_one_input(chunk, reads):
    chunk(4)
    *parts, labels = make_inputs()

    def loss(logprobs, entropies, rows):
        if reads == "neither row":
            return (logprobs + entropies) * 0.0
        return (logprobs if reads == "logprobs" else entropies) * (rows + 1)

    ours = ops.linear_loss(*parts[:2], labels, loss, bias=parts[2])
    expected = loss(*naive_statistics(*parts, labels)[:2], torch.arange(ROWS)).sum()
    torch.testing.assert_close(ours, expected, **F64)
    assert_same(gradients(ours, parts), gradients(expected, parts), F64)


@pytest.mark.parametrize("frozen", [("weight",), ("weight", "bias"), ("hidden",), ("hidden", "bias")])
def test_linear_loss_leaves_frozen_parts_without_gradient(chunk, frozen):
    chunk(4)
    *parts, labels = make_inputs()
    loss = make_loss(parts, labels)
    expected = gradients(loss(*naive_statistics(*parts, labels)[:2], torch.arange(ROWS)).sum(), parts)
    for name, part in zip(("hidden", "weight", "bias"), parts, strict=True):
        part.requires_grad_(name not in frozen)
    ops.linear_loss(*parts[:2], labels, loss, bias=parts[2]).backward()
    for name, part, grad in zip(("hidden", "weight", "bias"), parts, expected, strict=True):
        if name in frozen:
            assert part.grad is None, name
        else:
            torch.testing.assert_close(part.grad, grad, **F64, msg=lambda m, name=name: f"{name}: {m}")


def test_linear_loss_without_gradients_is_a_number(chunk):
    chunk(4)
    *parts, labels = make_inputs()
    loss = make_loss(parts, labels)
    with torch.no_grad():
        ours = ops.linear_loss(*parts[:2], labels, loss, bias=parts[2])
    assert not ours.requires_grad
    expected = loss(*naive_statistics(*parts, labels)[:2], torch.arange(ROWS)).sum()
    torch.testing.assert_close(ours, expected.detach(), **F64)


def test_linear_loss_of_no_rows_is_zero_and_differentiable():
    *parts, _ = make_inputs(rows=2)
    nothing = parts[0][:0]
    loss = ops.linear_loss(nothing, parts[1], torch.zeros(0, dtype=torch.int64), lambda logprobs, *_: logprobs)
    assert loss.item() == 0.0
    loss.backward()
    assert parts[1].grad.count_nonzero() == 0


def test_masked_out_tokens_have_neither_mass_nor_gradient(chunk):
    """A bias of -inf removes a token; 0 · inf must appear nowhere."""
    chunk(4)
    hidden, weight, bias, _ = make_inputs()
    labels = torch.randint(30, (ROWS,))
    masked = torch.cat([bias.detach()[:30], torch.full((7,), float("-inf"), dtype=torch.float64)]).requires_grad_()
    parts, short = (hidden, weight, masked), (hidden, weight[:30], bias[:30])
    loss = make_loss(short, labels)
    ours = ops.linear_loss(hidden, weight, labels, loss, bias=masked)
    expected = loss(*naive_statistics(*short, labels)[:2], torch.arange(ROWS)).sum()
    torch.testing.assert_close(ours, expected, **F64)
    truth = torch.autograd.grad(expected, (hidden, weight, bias))
    assert_same(gradients(ours, parts), truth, F64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [1.0, 8.0], ids=["flat", "peaked"])
def test_low_precision_is_no_worse_than_the_naive_formula(chunk, dtype, peak):
    chunk(16, 211)
    *parts, labels = make_inputs(dtype, rows=50, hidden=32, vocabulary=211)
    scaling = {"temperature": 0.9, "softcap": 30.0, "logit_scale": peak / 6}
    exact_parts = [part.detach().double().requires_grad_() for part in parts]
    loss = make_loss(exact_parts, labels, **scaling)

    def naive(some):
        rows = loss(*naive_statistics(*some, labels, **scaling)[:2], torch.arange(50))
        return rows.sum(), *gradients(rows.sum(), some), rows.abs().sum()

    ours = ops.linear_loss(*parts[:2], labels, loss, bias=parts[2], **scaling)
    *truth, size = naive(exact_parts)
    *same_dtype, _ = naive(parts)
    names, all_ours = ("loss", "hidden", "weight", "bias"), (ours, *gradients(ours, parts))
    for name, our, plain, exact in zip(names, all_ours, same_dtype, truth, strict=True):
        assert our.dtype == (torch.float32 if name == "loss" else dtype)
        error, allowed = (our.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        # The rows of the loss have either sign: their sum is no measure of its roundings.
        slack = close(dtype)["rtol"] * (size if name == "loss" else exact.abs().max())
        assert error <= 2 * allowed + slack, f"{name}: off by {error:.2e}, the naive formula by {allowed:.2e}"


def test_low_precision_gradients_are_summed_over_chunks_in_fp32(chunk):
    """Each row adds half to the head's gradient: in bf16 the sum would stop growing at 128."""
    chunk(1, 2)
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight, bias = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in [(2, 1), (2,)])
    labels = torch.zeros(1000, dtype=torch.int64)
    by_loss = gradients(
        ops.linear_loss(hidden, weight, labels, lambda logprobs, *_: logprobs, bias=bias), [weight, bias]
    )
    by_logprobs = gradients(ops.linear_logprobs(hidden, weight, labels, bias=bias)[0].sum(), [weight, bias])
    for d_weight, d_bias in (by_loss, by_logprobs):
        assert d_weight.tolist() == [[500.0], [-500.0]]
        assert d_bias.tolist() == [500.0, -500.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_kl_is_the_sum_over_the_vocabulary(chunk, dtype):
    chunk(4)
    hidden, weight, bias, _ = make_inputs(dtype)
    other, other_weight, *_ = make_inputs(dtype)
    ours = ops.linear_kl((hidden, weight), (other, other_weight), bias=bias, softcap=3.0, temperature=0.8)

    def log_p(*parts):
        z = parts[0].double() @ parts[1].double().t() + bias.double()
        return torch.log_softmax(3 * torch.tanh(z / 3) / 0.8, -1)

    logp, ref_logp = log_p(hidden, weight), log_p(other, other_weight)
    expected = torch.nn.functional.kl_div(ref_logp, logp, log_target=True, reduction="none").sum(-1).detach()
    torch.testing.assert_close(ours.double(), expected, **close(dtype, 100 if dtype == torch.float64 else 2))


def test_linear_kl_from_itself_is_zero_and_of_no_rows_is_empty():
    hidden, weight, *_ = make_inputs()
    assert ops.linear_kl((hidden, weight), (hidden, weight)).tolist() == [0.0] * ROWS
    assert ops.linear_kl((hidden[:0], weight), (hidden[:0], weight)).shape == (0,)


def test_rows_of_a_chunk_depend_on_the_vocabulary_alone():
    assert ops.chunk_rows(32_000) == 256
    assert ops.chunk_rows(10_000_000) == 256  # never so few that the matmul starves

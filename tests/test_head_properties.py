"""What must hold of the head for any shape and any logits, searched for by hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import close

from fastppo import ops
from fastppo.ops import chunks

TEMPERATURES = st.sampled_from([0.01, 0.7, 1.0, 5.0])
SOFTCAPS = st.sampled_from([None, 5.0, 30.0])
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def heads(draw, size=None):
    """Draw hidden, weight, bias, labels in fp32: peaked and flat rows, tied maxima, masked tokens, extreme labels."""
    rows, width = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    vocabulary = draw(st.sampled_from([1, 2, 5, 16, 31, 32, 33, 127, 128, 129, 255, 1024, 1030]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 8.0])) if size is None else size
    hidden = scale * torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    weight[-1] = weight[0]  # a tie, often of the largest
    bias = torch.randn(vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    if draw(st.booleans()) and vocabulary > 4:
        bias[vocabulary // 2 : -1] = float("-inf")
        labels = labels % (vocabulary // 2)
    labels[:1] = 0
    return hidden, weight, bias, labels


def chunked(monkeypatch, rows, vocabulary):
    monkeypatch.setattr(chunks, "_MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(chunks, "_ROW_MULTIPLE", 1)
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 4 * vocabulary * rows)


def exact(hidden, weight, bias, labels, temperature, softcap):
    """Return logprobs and entropies by log-softmax, in fp64, and the scaled logits' largest size."""
    z = hidden @ weight.t() + bias
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropies = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    return log_p[range(len(labels)), labels], entropies, z.detach()[z.isfinite()].abs().max() if z.numel() else 0.0


@SETTINGS
@given(heads(), TEMPERATURES, SOFTCAPS)
def test_statistics_are_those_of_log_softmax(head, temperature, softcap):
    hidden, weight, bias, labels = head
    shape = {"temperature": temperature, "softcap": softcap}
    ours = ops.linear_logprobs(hidden, weight, labels, bias=bias, **shape)
    *expected, size = exact(*(part.double() for part in (hidden, weight, bias)), labels, temperature, softcap)
    # Logits of this size have this many digits behind the point; nothing else may add to it.
    slack = 8 * torch.finfo(torch.float32).eps * (1 + float(size))
    for our, truth in zip(ours, expected, strict=False):
        torch.testing.assert_close(our.double(), truth, atol=slack * 4, rtol=1e-5)
    assert (ours[0] <= 1e-6).all(), "a log-prob above 0"
    assert (ours[1] >= -1e-5).all(), "an entropy below 0"


@SETTINGS
@given(heads(size=1.0), TEMPERATURES.filter(lambda t: t >= 0.5), SOFTCAPS, st.integers(1, 9))
def test_loss_and_gradients_are_those_of_autograd(head, temperature, softcap, rows):
    hidden, weight, bias, labels = head
    parts = [part.requires_grad_() for part in (hidden, weight)]
    wide = [part.detach().double().requires_grad_() for part in parts]

    def loss(logprobs, entropies, at):
        return (torch.sin(logprobs) - 0.2 * entropies) * (1.0 + at)

    logprobs, entropies, _ = exact(*wide, bias.double(), labels, temperature, softcap)
    expected = loss(logprobs, entropies, torch.arange(len(labels))).sum()
    with pytest.MonkeyPatch.context() as patch:
        chunked(patch, rows, len(weight))
        ours = ops.linear_loss(hidden, weight, labels, loss, bias=bias, temperature=temperature, softcap=softcap)
    torch.testing.assert_close(ours.double(), expected, **close(torch.float32, 100))
    for our, truth in zip(torch.autograd.grad(ours, parts), torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(our.double(), truth, **close(torch.float32, 200))


@SETTINGS
@given(heads(size=1.0), st.integers(1, 9))
def test_the_number_of_rows_changes_no_log_prob(head, rows):
    """The first rows alone, in chunks of the same size, are bit for bit what they are among more."""
    hidden, weight, bias, labels = head
    with pytest.MonkeyPatch.context() as patch:
        chunked(patch, rows, len(weight))
        whole = ops.linear_logprobs(hidden, weight, labels, bias=bias)
        first = ops.linear_logprobs(hidden[:rows], weight, labels[:rows], bias=bias)
    for part, same in zip(whole, first, strict=True):
        assert part[:rows].equal(same)


@SETTINGS
@given(heads(), st.integers(0, 2**31))
def test_the_order_of_the_vocabulary_does_not_matter(head, seed):
    hidden, weight, bias, labels = head
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    before = ops.linear_logprobs(hidden, weight, labels, bias=bias)
    after = ops.linear_logprobs(hidden, weight[order], place[labels], bias=bias[order])
    for part, other in zip(before, after, strict=True):
        torch.testing.assert_close(part, other, atol=2e-5, rtol=2e-5)


@SETTINGS
@given(heads(), heads())
def test_exact_kl_is_never_below_zero_and_zero_from_itself(head, other):
    hidden, weight, bias, _ = head
    assert ops.linear_kl((hidden, weight), (hidden, weight), bias=bias).abs().le(1e-5).all()
    rows = min(len(hidden), len(other[0]))
    ref_weight = torch.randn(len(weight), other[1].shape[1])
    kl = ops.linear_kl((hidden[:rows], weight), (other[0][:rows], ref_weight))
    assert (kl >= -1e-5).all()


@SETTINGS
@given(heads(size=1.0), st.floats(0.0, 1.0))
def test_rows_without_weight_change_nothing(head, share):
    hidden, weight, bias, labels = head
    hidden.requires_grad_()
    weights = (torch.rand(len(labels)) < share).float()
    loss = ops.PPOLoss(None, torch.randn(len(labels)), weights)
    value = ops.linear_loss(hidden, weight, labels, loss, bias=bias)
    value.backward()
    assert hidden.grad[weights == 0].count_nonzero() == 0
    kept = weights > 0
    short = ops.PPOLoss(None, loss.advantages[kept], weights[kept])
    again = ops.linear_loss(hidden.detach()[kept], weight, labels[kept], short, bias=bias)
    torch.testing.assert_close(value.detach(), again, atol=1e-6, rtol=1e-5)

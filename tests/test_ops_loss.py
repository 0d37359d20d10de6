"""What `linear_loss` offers beyond a loss a row: rows left out, whole sequences, exact KL, PPO's fused kernel.

Oracles are log-softmax and autograd over the whole [rows x vocabulary], none of the package's code.
"""

from itertools import pairwise

import pytest
import torch
from test_ops import assert_same, gradients, make_inputs, naive_statistics
from tolerances import close

from benchmarks.matmul_count import counting
from fastppo import ops
from fastppo.ops import chunks
from fastppo.ops import rows as rows_module

ROWS, HIDDEN, VOCABULARY = 11, 5, 37
F64 = close(torch.float64, 100)


@pytest.fixture(autouse=True)
def _chunks_of_four(monkeypatch):
    monkeypatch.setattr(chunks, "_MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(chunks, "_ROW_MULTIPLE", 1)
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 4 * VOCABULARY * 4)
    assert ops.chunk_rows(VOCABULARY) == 4


def row_loss(logprobs, entropies, rows):
    return (torch.sin(logprobs) + 0.3 * entropies) * (rows + 1)


def naive_loss(parts, labels, kept):
    logprobs, entropies, _ = naive_statistics(*parts, labels.clamp_min(0))
    return row_loss(logprobs, entropies, torch.arange(ROWS))[kept].sum()


def matmul_multiplications(run):
    """Return the multiplications of the matmuls of a call, of which torch counts two operations each."""
    with counting() as count:
        run()
    return count.flops / 2


@pytest.mark.parametrize("left_out", ["ignored", "weightless", "weightless PPO"])
def test_rows_that_no_loss_reads_are_left_out(left_out):
    *parts, labels = make_inputs()
    kept = torch.tensor([1, 2, 3, 6, 10])
    is_kept = torch.zeros(ROWS, dtype=torch.bool).index_fill(0, kept, True)
    expected = naive_loss(parts, labels, is_kept)
    if left_out == "ignored":
        ours = ops.linear_loss(*parts[:2], labels.where(is_kept, -100), row_loss, bias=parts[2])
    elif left_out == "weightless":
        ours = ops.linear_loss(*parts[:2], labels, row_loss, bias=parts[2], weights=is_kept.double())
    else:
        loss = ops.PPOLoss(None, torch.ones(ROWS).double(), is_kept.double())
        logprobs = naive_statistics(*parts, labels)[0]
        ours = ops.linear_loss(*parts[:2], labels, loss, bias=parts[2])
        expected = loss(logprobs, logprobs, torch.arange(ROWS))[is_kept].sum()
        loss = ops.PPOLoss(None, torch.ones(ROWS).double(), is_kept.double())
        ops.linear_loss(*parts[:2], labels, loss, bias=parts[2])
        assert loss.logprobs.isfinite().equal(is_kept), "log-probs of rows without weight were computed"
    torch.testing.assert_close(ours, expected, **F64)
    assert_same(gradients(ours, parts), gradients(expected, parts), F64)


@pytest.mark.parametrize(("is_frozen", "passes"), [(True, 2), (False, 3)])
@pytest.mark.parametrize("share", [0, 4, 11])
def test_matmuls_are_those_of_the_rows_that_count(is_frozen, passes, share):
    hidden, weight, _, labels = make_inputs(torch.float32)
    weight.requires_grad_(not is_frozen)
    weights = (torch.arange(ROWS) < share).float()
    for loss, more in ((ops.PPOLoss(None, torch.ones(ROWS), weights), {}), (row_loss, {"weights": weights})):
        count = matmul_multiplications(
            lambda loss=loss, more=more: ops.linear_loss(hidden, weight, labels, loss, **more).backward()
        )
        assert count == passes * share * HIDDEN * VOCABULARY


@pytest.mark.parametrize(
    ("wants", "passes"),
    [("nothing", 1), ("logprobs of a frozen head", 2), ("entropies of a frozen head", 4), ("trained head", 4)],
)
def test_matmuls_of_linear_logprobs(wants, passes):
    hidden, weight, _, labels = make_inputs(torch.float32)
    weight.requires_grad_(wants == "trained head")
    hidden.requires_grad_(wants != "nothing")

    def run():
        logprobs, entropies, _ = ops.linear_logprobs(hidden, weight, labels)
        if wants != "nothing":
            (logprobs.sum() + (entropies.sum() if "entropies" in wants else 0)).backward()

    assert matmul_multiplications(run) == passes * ROWS * HIDDEN * VOCABULARY


@pytest.mark.parametrize("reads", ["logprobs", "entropies", "logprobs, entropies, logsumexp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_logprobs_of_a_frozen_head(reads, dtype):
    hidden, weight, bias, labels = make_inputs(dtype)
    exact = hidden.detach().double().requires_grad_()
    expected = dict(
        zip(
            ("logprobs", "entropies", "logsumexp"),
            naive_statistics(exact, weight.double().detach(), bias.double().detach(), labels, 0.7, 3.0, 0.9),
            strict=True,
        )
    )
    parts = ops.linear_logprobs(
        hidden, weight.detach(), labels, bias=bias.detach(), temperature=0.7, softcap=3.0, logit_scale=0.9
    )
    ours = dict(zip(expected, parts, strict=True))
    upstream = torch.randn(ROWS)
    mixes = [sum((upstream * some[name]).sum() for name in reads.split(", ")) for some in (ours, expected)]
    (gradient,), (truth,) = torch.autograd.grad(mixes[0], hidden), torch.autograd.grad(mixes[1], exact)
    torch.testing.assert_close(gradient.double(), truth, **close(dtype, 100))


def test_linear_logprobs_leave_ignored_rows_at_zero():
    *parts, labels = make_inputs()
    ignored = labels.clone()
    ignored[[0, 4, 5]] = -100
    ours = ops.linear_logprobs(*parts[:2], ignored, bias=parts[2])
    expected = [part.index_fill(0, torch.tensor([0, 4, 5]), 0.0) for part in naive_statistics(*parts, labels)]
    assert_same(ours, expected, F64, ("logprobs", "entropy", "logsumexp"))
    assert_same(gradients(ours[0].sum(), parts), gradients(expected[0].sum(), parts), F64)
    with pytest.raises(ValueError, match=r"labels reach from -100 to 36, expected 0 to 36"):
        ops.linear_logprobs(*parts[:2], ignored, ignore_index=None)


@pytest.mark.parametrize("lengths", [[3, 1, 4, 3], [9, 2], [1] * 11, [2, 6, 3], [0, 4, 0, 7, 0]])
def test_chunks_keep_sequences_whole(lengths):
    """A sequence's loss reads all its tokens at once, as a sequence-level ratio does."""
    *parts, labels = make_inputs()
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def loss(logprobs, entropies, rows):
        here = segments[rows]
        means = torch.zeros(len(lengths), dtype=logprobs.dtype).index_add(0, here, logprobs)
        return means.exp()[here] * logprobs.detach() + entropies * 0.1

    ours = ops.linear_loss(*parts[:2], labels, loss, bias=parts[2], offsets=offsets)
    expected = loss(*naive_statistics(*parts, labels)[:2], torch.arange(ROWS)).sum()
    torch.testing.assert_close(ours, expected, **F64)
    assert_same(gradients(ours, parts), gradients(expected, parts), F64)
    # The same with rows left out: the sequences close up.
    ignored = labels.clone()
    ignored[[2, 3, 9]] = -100
    kept = ignored != -100
    ours = ops.linear_loss(*parts[:2], ignored, loss, bias=parts[2], offsets=offsets)
    logprobs, entropies, _ = naive_statistics(*parts, labels)
    expected = loss(logprobs[kept], entropies[kept], torch.arange(ROWS)[kept]).sum()
    torch.testing.assert_close(ours, expected, **F64)


def naive_kl(parts, ref, scaling):
    """Return KL(π || π_ref) of each row; the reference has softcap 2 and a bias of its own."""

    def log_p(hidden, weight, bias, temperature, softcap):
        return torch.log_softmax(softcap * torch.tanh((hidden @ weight.t() + bias) / softcap) / temperature, -1)

    log_pi, log_ref = log_p(*parts, *scaling), log_p(*ref, 1.5, 2.0)
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_kl_is_differentiable(dtype):
    *parts, labels = make_inputs(dtype)
    ref_hidden, ref_weight, ref_bias = (torch.randn(shape) for shape in [(ROWS, 3), (VOCABULARY, 3), (VOCABULARY,)])
    ref = [part.to(dtype) for part in (ref_hidden, ref_weight, ref_bias)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = naive_kl(exact, [part.double() for part in ref], (0.8, 3.0))
    ref_shape = {"bias": ref[2], "temperature": 1.5, "softcap": 2.0}
    shape = {"bias": parts[2], "temperature": 0.8, "softcap": 3.0}
    ours = ops.linear_kl((parts[0], parts[1]), (ref[0], ref[1]), **shape, ref_shape=ref_shape)
    tolerance = close(dtype, 100)
    torch.testing.assert_close(ours.double(), expected, **tolerance)
    upstream = torch.randn(ROWS).double()
    truth = gradients((upstream * expected).sum(), exact)
    got = gradients((upstream * ours).sum(), parts)
    assert_same([part.double() for part in got], truth, tolerance)

    def loss(logprobs, entropies, rows, kl):
        return (logprobs + 0.2 * entropies + 0.7 * kl.square()) * (rows + 1)

    ours = ops.linear_loss(*parts[:2], labels, loss, **shape, ref_head=(ref[0], ref[1]), ref_shape=ref_shape)
    logprobs, entropies, _ = naive_statistics(*exact, labels, 0.8, 3.0)
    kl = naive_kl(exact, [part.double() for part in ref], (0.8, 3.0))
    expected = loss(logprobs, entropies, torch.arange(ROWS), kl).sum()
    torch.testing.assert_close(ours.double(), expected, **tolerance)
    truth = gradients(expected, exact)
    assert_same([part.double() for part in gradients(ours, parts)], truth, tolerance)


def test_exact_kl_beside_a_loss_takes_one_more_matmul():
    hidden, weight, _, labels = make_inputs(torch.float32)
    ref_head = (torch.randn(ROWS, HIDDEN), weight.detach())
    weight.requires_grad_(False)

    def loss(logprobs, entropies, rows, kl):
        return logprobs + kl

    def run():
        ops.linear_loss(hidden, weight, labels, loss, ref_head=ref_head).backward()

    assert matmul_multiplications(run) == 3 * ROWS * HIDDEN * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clipped", [[], [2], [0, 1, 5, 9, 10], [0, 1, 2, 3, 7], list(range(ROWS))], ids=str)
def test_clipped_rows_are_left_out_of_the_matmuls(clipped, dtype):
    """Chunks of four rows: without any such row, with some in front or behind, with nothing else."""
    *parts, labels = make_inputs(dtype)
    exact = [part.detach().double().requires_grad_() for part in parts]
    logprobs = naive_statistics(*exact, labels)[0]
    is_clipped = torch.zeros(ROWS, dtype=torch.bool)
    is_clipped[clipped] = True
    # Ratios of e where clipped and 1 elsewhere, with advantages that want them still larger.
    old, advantages = (logprobs.detach() - is_clipped.double()).float(), torch.rand(ROWS) + 0.5
    loss = ops.PPOLoss(old, advantages, torch.ones(ROWS))
    ours = None

    def run():
        nonlocal ours
        ours = gradients(ops.linear_loss(*parts[:2], labels, loss, bias=parts[2], ignore_index=None), parts)

    with ops.use_backend("native"):
        count = matmul_multiplications(run)
    assert count == (3 * ROWS - 2 * len(clipped)) * HIDDEN * VOCABULARY
    ratio = (logprobs - old.double()).exp()
    expected = gradients(-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum(), exact)
    for our, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(our.double(), truth, **close(dtype, 4))
    assert not ours[0][is_clipped].any()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ppo_loss_of_either_backend_fills_its_records(backend, dtype):
    hidden, weight, bias, labels = make_inputs(dtype)
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight, bias)]
    logprobs, entropies, _ = naive_statistics(*exact, labels)
    old = logprobs.detach().float() + 0.3 * torch.randn(ROWS)
    loss = ops.PPOLoss(old, torch.randn(ROWS), torch.rand(ROWS), 0.1, 0.2, 0.05, old - 1, 0.3)
    with ops.use_backend(backend):
        ours = ops.linear_loss(hidden, weight, labels, loss, bias=bias)
    tolerance = close(dtype, 8) if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for name, kept, truth in (("logprobs", loss.logprobs, logprobs), ("entropies", loss.entropies, entropies)):
        torch.testing.assert_close(kept.double(), truth, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    if dtype == torch.float32:  # in bf16 rows next to the edge of the clip differ by their whole gradient
        expected = loss(logprobs, entropies, torch.arange(ROWS)).sum()
        torch.testing.assert_close(ours.double(), expected, **tolerance)
        got = [part.double() for part in gradients(ours, (hidden, weight, bias))]
        assert_same(got, gradients(expected, exact), tolerance)


def test_gathered_ppo_loss_is_that_of_the_head():
    old, ref, advantages = torch.randn(3, 50)
    logprobs = (old + 0.4 * torch.randn(50)).requires_grad_()
    loss = ops.PPOLoss(old, advantages, torch.rand(50), 0.1, 0.2, 0.0, ref, 0.3)
    more = {"clip_low": 0.1, "clip_high": 0.2, "ref_logprobs": ref, "kl_coef": 0.3}
    ours = ops.ppo_loss(logprobs, old, advantages, loss.weights, **more)
    exact = logprobs.detach().double().requires_grad_()
    ratio = (exact - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.2) * advantages)
    expected = (-gain + 0.3 * (exact - ref)) * loss.weights
    torch.testing.assert_close(ours.double(), expected, **close(torch.float32, 8))
    upstream = torch.randn(50)
    (gradient,) = torch.autograd.grad((upstream * ours).sum(), logprobs)
    (truth,) = torch.autograd.grad((upstream * expected).sum(), exact)
    torch.testing.assert_close(gradient.double(), truth, **close(torch.float32, 8))
    is_clipped = (truth - 0.3 * loss.weights * upstream).abs() < 1e-9
    assert 0 < int(is_clipped.sum()) < 50, "no row is clipped, or all are"


def test_a_second_backward_pass_says_what_to_do():
    hidden, weight, _, labels = make_inputs()
    loss = ops.linear_loss(hidden, weight, labels, row_loss)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"handed out by a first backward pass .* call linear_loss again"):
        loss.backward()


def test_what_does_not_fit_is_refused():
    hidden, weight, bias, labels = make_inputs(torch.float32)
    for arguments, more, message in [
        ((hidden[0], weight, labels), {}, r"hidden is \(5,\) and weight \(37, 5\), expected \(T, H\) and \(V, H\)"),
        ((hidden, weight[:, :4], labels), {}, r"weight \(37, 4\)"),
        (
            (hidden, weight.bfloat16(), labels),
            {},
            r"weight is torch\.bfloat16 on cpu, expected torch\.float32",
        ),
        ((hidden, weight, labels[:3]), {}, r"labels has shape \(3,\) on cpu, expected \(11,\)"),
        ((hidden, weight, labels.int()), {}, r"labels are torch\.int32"),
        ((hidden, weight, labels + 1), {}, r"labels reach from 1 to 37, expected 0 to 36"),
        ((hidden, weight, labels), {"bias": bias[:4]}, r"bias has shape \(4,\), expected \(37,\)"),
        ((hidden, weight, labels), {"temperature": 0.0}, r"temperature is 0\.0, expected a finite number above 0"),
        ((hidden, weight, labels), {"softcap": -1.0}, r"softcap is -1\.0"),
    ]:
        for call in (ops.linear_logprobs, lambda *a, **k: ops.linear_loss(*a, row_loss, **k)):
            with pytest.raises(ValueError, match=message):
                call(*arguments, **more)
    with pytest.raises(ValueError, match=r"weights has shape \(2,\)"):
        ops.linear_loss(hidden, weight, labels, row_loss, weights=torch.ones(2))
    with pytest.raises(ValueError, match=r"the reference's hidden \(3, 5\) and weight \(37, 5\) must have the rows"):
        ops.linear_kl((hidden, weight), (hidden[:3], weight))
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 weighs a penalty from ref_logprobs, which are None"):
        ops.PPOLoss(None, torch.ones(2), torch.ones(2), kl_coef=0.1)
    with pytest.raises(ValueError, match=r"advantages has shape \(2,\) on cpu, expected \(3,\) on cpu"):
        ops.ppo_loss(torch.zeros(3), None, torch.zeros(2), torch.zeros(3))


def test_weights_multiply_any_loss():
    """A PPOLoss has weights of its own: both count, and a zero in either leaves the row out."""
    *parts, labels = make_inputs()
    logprobs, entropies, _ = naive_statistics(*parts, labels)
    old, weights = logprobs.detach() + 0.3 * torch.randn(ROWS), torch.rand(ROWS).double()
    weights[3] = 0

    def losses():
        own = torch.linspace(0, 1, ROWS).double()
        return row_loss, ops.PPOLoss(old, torch.linspace(-1, 1, ROWS).double(), own, entropy_coef=0.1)

    for dtype in (torch.float64, torch.float32):
        some = [part.detach().to(dtype).requires_grad_() for part in parts]
        for loss, same in zip(losses(), losses(), strict=True):
            if isinstance(loss, ops.PPOLoss) and dtype == torch.float32:
                loss = ops.PPOLoss(old.float(), loss.advantages.float(), loss.weights.float(), entropy_coef=0.1)
            ours = ops.linear_loss(*some[:2], labels, loss, bias=some[2], weights=weights.to(dtype))
            expected = (same(logprobs, entropies, torch.arange(ROWS)) * weights).sum()
            tolerance = close(dtype, 100)
            torch.testing.assert_close(ours.double(), expected, **tolerance)
            truth = torch.autograd.grad(expected, parts, retain_graph=True)
            assert_same([part.double() for part in gradients(ours, some)], truth, tolerance)
            if isinstance(loss, ops.PPOLoss):
                assert loss.logprobs.isnan().nonzero()[:, 0].tolist() == [0, 3]


def test_a_subclass_of_ppo_loss_is_called():
    class Ones(ops.PPOLoss):
        def __call__(self, logprobs, entropies, rows):
            return torch.ones_like(logprobs) + 0 * logprobs

    hidden, weight, _, labels = make_inputs(torch.float32)
    assert ops.linear_loss(hidden, weight, labels, Ones(None, torch.ones(ROWS), torch.ones(ROWS))).item() == ROWS


def test_ppo_loss_takes_the_fused_kernel(monkeypatch):
    calls, fused = [], rows_module.ppo
    monkeypatch.setattr(rows_module, "ppo", lambda *a: calls.append(len(a[0])) or fused(*a))
    hidden, weight, _, labels = make_inputs(torch.float32)
    ops.linear_loss(hidden, weight, labels, ops.PPOLoss(None, torch.ones(ROWS), torch.ones(ROWS)))
    assert calls == [4, 4, 3]


def test_rows_left_out_are_left_out_of_the_reference_too():
    *parts, labels = make_inputs()
    ref_hidden, ref_weight = torch.randn(ROWS, 3).double(), torch.randn(VOCABULARY, 3).double()
    ignored = labels.clone()
    ignored[[0, 4, 5, 7]] = -100
    kept = ignored != -100

    def loss(logprobs, entropies, rows, kl):
        return (logprobs + kl) * (rows + 1)

    plain = {"bias": None}
    ours = ops.linear_loss(*parts[:2], ignored, loss, bias=parts[2], ref_head=(ref_hidden, ref_weight), ref_shape=plain)
    log_pi = torch.log_softmax(parts[0] @ parts[1].t() + parts[2], -1)
    kl = (log_pi.exp() * (log_pi - torch.log_softmax(ref_hidden @ ref_weight.t(), -1))).sum(-1)
    rows = torch.arange(ROWS)
    expected = loss(log_pi[rows, labels], None, rows, kl)[kept].sum()
    torch.testing.assert_close(ours, expected, **F64)
    assert_same(gradients(ours, parts), gradients(expected, parts), F64)


def test_the_reference_differs_only_where_it_is_said_to():
    hidden, weight, bias, _ = make_inputs()
    shape = {"temperature": 0.5, "softcap": 3.0, "logit_scale": 1.2}
    same = ops.linear_kl((hidden, weight), (hidden, weight), bias=bias, **shape, ref_shape={"temperature": 0.5})
    assert same.abs().max() < 1e-12, "bias, cap or scale of the reference was lost"
    other = ops.linear_kl((hidden, weight), (hidden, weight), bias=bias, **shape, ref_shape={"temperature": 2.0})
    assert (other > 1e-3).all()


def test_a_reference_that_changes_before_the_backward_pass_is_noticed():
    hidden, weight, *_ = make_inputs()
    ref_weight = torch.randn_like(weight)
    kl = ops.linear_kl((hidden, weight), (hidden.detach(), ref_weight)).sum()
    ref_weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()


@pytest.mark.parametrize(("forward", "backward"), [("reference", "native"), ("native", "reference")])
def test_backends_may_change_between_forward_and_backward(forward, backward):
    *parts, labels = make_inputs(torch.float32)
    other = (torch.randn(ROWS, 3), torch.randn(VOCABULARY, 3))

    def mix():
        logprobs, entropies, lse = ops.linear_logprobs(*parts[:2], labels, bias=parts[2])
        kl = ops.linear_kl((parts[0], parts[1]), other, bias=parts[2])
        return (logprobs + 0.3 * entropies - 0.2 * lse + kl).sum()

    with ops.use_backend(forward):
        value = mix()
    with ops.use_backend(backward):
        got = gradients(value, parts)
    assert_same(got, gradients(mix(), parts), close(torch.float32, 100))


def test_twice_differentiated_they_refuse():
    """The second derivative would be wrong without a word: a gradient penalty must not pass."""
    hidden, weight, _, labels = make_inputs(torch.float32)
    weight.requires_grad_(False)
    logprobs = torch.randn(ROWS, requires_grad=True)
    for value, part in [
        (ops.linear_logprobs(hidden, weight, labels)[0].square().sum(), hidden),
        (ops.linear_loss(hidden, weight, labels, row_loss).square(), hidden),
        (ops.ppo_loss(logprobs, None, torch.ones(ROWS), torch.ones(ROWS)).square().sum(), logprobs),
    ]:
        (gradient,) = torch.autograd.grad(value, part, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
            gradient.square().sum().backward()


def test_ppo_losses_that_do_not_fit_are_refused():
    hidden, weight, _, labels = make_inputs(torch.float32)
    ones = torch.ones(ROWS)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(11, 3\) on cpu, expected \(11,\)"):
        ops.linear_loss(hidden, weight, labels, ops.PPOLoss(torch.ones(ROWS, 3), ones, ones))
    with pytest.raises(ValueError, match=r"advantages has shape \(11,\) on meta"):
        ops.linear_loss(hidden, weight, labels, ops.PPOLoss(None, ones.to("meta"), ones))
    with pytest.raises(ValueError, match=r"PPOLoss does not read the KL of ref_head"):
        ops.linear_loss(hidden, weight, labels, ops.PPOLoss(None, ones, ones), ref_head=(hidden, weight))
    with pytest.raises(ValueError, match=r"logprobs have shape \(2, 3\), expected one axis"):
        ops.ppo_loss(*torch.zeros(4, 2, 3))
    with pytest.raises(ValueError, match=r"labels has shape \(11,\) on meta, expected \(11,\) on cpu"):
        ops.linear_logprobs(hidden, weight, labels.to("meta"))
    for offsets in ([0, 3, 5], [3, 11], [0, 8, 4, 11], []):
        with pytest.raises(ValueError, match=r"offsets are .* expected to rise from 0 to the number of rows, 11"):
            ops.linear_loss(hidden, weight, labels, row_loss, offsets=torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"of the reference: temperature is 0\.0"):
        ops.linear_kl((hidden, weight), (hidden, weight), ref_shape={"temperature": 0.0})
    assert ops.PPOLoss(None, ones.bfloat16(), ones.bfloat16()).logprobs.dtype == torch.float32


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [3, 9, 1, 4], [64, 65]])
def test_advantages_by_doubling_are_those_of_the_loop(lengths):
    """The form that serves CUDA, on the host."""
    from fastppo.ops.flat import _gae_by_doubling

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rewards, values = torch.randn(2, int(offsets[-1]), dtype=torch.float64)
    expected, bounds = torch.empty_like(rewards), offsets.tolist()
    for start, end in pairwise(bounds):
        for t in range(start, end):
            deltas = [rewards[k] + (0.9 * values[k + 1] if k + 1 < end else 0.0) - values[k] for k in range(t, end)]
            expected[t] = sum((0.9 * 0.8) ** k * delta for k, delta in enumerate(deltas))
    torch.testing.assert_close(_gae_by_doubling(rewards, values, offsets, 0.9, 0.8), expected, **F64)


def test_labels_may_lie_apart():
    """The kernels take an address and count on."""
    *parts, labels = make_inputs(torch.float32)
    wide = torch.stack([labels, torch.full_like(labels, 5)], dim=1)
    apart = wide[:, 0]
    assert not apart.is_contiguous()
    for ours, same in zip(
        ops.linear_logprobs(*parts[:2], apart, bias=parts[2]),
        ops.linear_logprobs(*parts[:2], labels, bias=parts[2]),
        strict=True,
    ):
        assert ours.equal(same)
    loss, same = (ops.linear_loss(*parts[:2], some, row_loss, ignore_index=None) for some in (apart, labels))
    assert loss.equal(same)


def test_without_gradients_one_matmul_serves():
    hidden, weight, _, labels = make_inputs(torch.float32)
    weight.requires_grad_(False)
    with torch.no_grad():
        assert matmul_multiplications(lambda: ops.linear_logprobs(hidden, weight, labels)) == ROWS * HIDDEN * VOCABULARY
        assert (
            matmul_multiplications(lambda: ops.linear_loss(hidden, weight, labels, row_loss))
            == ROWS * HIDDEN * VOCABULARY
        )

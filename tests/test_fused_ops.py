"""RMSNorm, gated activation and rotary positions of every instruction set, and their plain twins, against fp64."""

import math

import pytest
import torch
from tolerances import close

from fastppo import ops, reference_fused

_native = pytest.importorskip("fastppo._native", reason="built without the C++ extension")

DTYPES = [torch.float32, torch.bfloat16]
# One, below and around a vector, four vectors at a time with a rest.
SIZES = [1, 3, 16, 37, 283]


@pytest.fixture(params=_native.available_isas())
def isa(request):
    """Run a test with the kernels of each instruction set."""
    before = _native.isa()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)


def norm_oracle(x, weight, eps, offset):
    return (offset + weight) * x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)


def gated_oracle(gate, up, activation):
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu":
        return gate * torch.special.ndtr(gate) * up
    return gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2 * up


def rotary_oracle(x, cos, sin):
    half, out = cos.shape[-1] // 2, x.clone()
    for i in range(half):
        j = i + half
        out[..., i] = x[..., i] * cos[:, None, :, i] - x[..., j] * sin[:, None, :, i]
        out[..., j] = x[..., j] * cos[:, None, :, j] + x[..., i] * sin[:, None, :, j]
    return out


def assert_same(ours, oracle, inputs, dtype, factor=8):
    """Compare the output and every gradient of `ours` in `dtype` with those of `oracle` in fp64."""
    inputs = [part.to(dtype).requires_grad_() for part in inputs]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    actual, expected = ours(*inputs), oracle(*exact)
    upstream = torch.randn_like(expected).to(dtype)
    actual = [actual, *torch.autograd.grad(actual, inputs, upstream)]
    expected = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    # bf16 is widened on the way in and rounded once on the way out: half a unit in the last of 8 places.
    allowed = {"atol": 1e-5, "rtol": 2**-8} if dtype == torch.bfloat16 else close(dtype, factor)
    for number, (our, truth) in enumerate(zip(actual, expected, strict=True)):
        assert our.dtype == dtype
        scale = truth.detach().abs().max().clamp_min(1)
        torch.testing.assert_close(
            our.detach().double() / scale, truth.detach() / scale, **allowed, msg=lambda m, n=number: f"tensor {n}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_and_its_gradients(isa, size, offset, dtype):
    inputs = torch.randn(13, 5, size) * 3, torch.randn(size)
    assert_same(
        lambda x, w: ops.rms_norm(x, w, 1e-3, offset), lambda x, w: norm_oracle(x, w, 1e-3, offset), inputs, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference_fused.ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_gated_activations_and_their_gradients(isa, size, activation, dtype):
    gate, up = torch.randn(3, 5, size) * 4, torch.randn(3, 5, size)
    assert_same(
        lambda g, u: ops.gated_activation(g, u, activation),
        lambda g, u: gated_oracle(g, u, activation),
        (gate, up),
        dtype,
    )
    assert_same(
        lambda both: ops.gated_activation(both, None, activation),
        lambda both: gated_oracle(both[..., :size], both[..., size:], activation),
        [torch.cat((gate, up), -1)],
        dtype,
    )


@pytest.mark.parametrize("activation", reference_fused.ACTIVATIONS)
def test_activations_keep_their_digits_over_the_whole_range(isa, activation):
    gate = torch.linspace(-30, 30, 4001)
    up = torch.ones_like(gate)
    assert_same(
        lambda g, u: ops.gated_activation(g, u, activation), lambda g, u: gated_oracle(g, u, activation), (gate, up),
        torch.float32,
        1,
    )  # fmt: skip
    extreme = torch.tensor([-1e4, 1e4, torch.nan])
    ours = ops.gated_activation(extreme, torch.ones(3), activation)
    assert ours[:2].tolist() == [0.0, 1e4]
    assert ours[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "rotary"), [(2, 2), (8, 4), (48, 48), (64, 64), (70, 38)])
def test_rotary_and_its_gradient(isa, size, rotary, dtype):
    packed = torch.randn(2, 7, 3, 3 * size)
    for batch in (1, 2):
        cos, sin = (torch.randn(batch, 7, rotary).to(dtype) for _ in range(2))
        assert_same(
            # A slice of what one matmul gave for query, key and value, with the heads in front.
            lambda x, cos=cos, sin=sin: ops.rotary(x[..., size : 2 * size].transpose(1, 2), cos, sin),
            lambda x, cos=cos, sin=sin: rotary_oracle(
                x[..., size : 2 * size].transpose(1, 2), cos.double(), sin.double()
            ),
            [packed],
            dtype,
        )


def test_rotary_reads_gradients_laid_out_in_any_order(isa):
    x, cos, sin = torch.randn(2, 3, 5, 16), torch.randn(1, 5, 16).expand(2, -1, -1), torch.randn(2, 5, 16)
    upstream = torch.randn(16, 5, 3, 2)
    for given in (upstream.permute(3, 2, 1, 0), upstream.permute(3, 2, 1, 0).contiguous()):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        ops.rotary(a, cos, sin).backward(given)
        rotary_oracle(b, cos.double(), sin.double()).backward(given.double())
        torch.testing.assert_close(a.grad.double(), b.grad, **close(torch.float32, 8))


def test_results_do_not_depend_on_the_number_of_threads(isa):
    x, weight, gate = torch.randn(300, 96), torch.randn(96), torch.randn(300, 96)
    heads, angles = x.view(1, 300, 6, 16).transpose(1, 2), gate[None, :, :16]

    def results():
        inputs = [part.clone().requires_grad_() for part in (x, weight, gate)]
        outputs = ops.rms_norm(*inputs[:2], 1e-6), ops.gated_activation(inputs[0], inputs[2], "gelu")
        gradients = torch.autograd.grad(sum((part * gate).sum() for part in outputs), inputs)
        return [*outputs, *gradients, ops.rotary(heads, angles, angles)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        three = results()
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(one, three, strict=True))


def test_frozen_weights_and_no_rows_are_served():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    ops.rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    empty, weight = torch.randn(0, 8, requires_grad=True), weight.requires_grad_()
    ops.rms_norm(empty, weight, 1e-6).sum().backward()
    assert weight.grad.equal(torch.zeros(8))
    assert ops.gated_activation(empty, None, "silu").shape == (0, 4)


def test_the_twins_are_the_formulas():
    x, weight, up = torch.randn(3, 6), torch.randn(6), torch.randn(3, 6)
    heads, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    twin = reference_fused
    assert_same(
        lambda x, w: twin.rms_norm(x, w, 0.1, 1.0), lambda x, w: norm_oracle(x, w, 0.1, 1.0), (x, weight), torch.float64
    )
    for name in reference_fused.ACTIVATIONS:
        ours, oracle = (lambda g, u, n=name, f=f: f(g, u, n) for f in (twin.gated_activation, gated_oracle))
        assert_same(ours, oracle, (x, up), torch.float64)
    ours, oracle = (lambda h, f=f: f(h, cos.double(), sin.double()) for f in (twin.rotary, rotary_oracle))
    assert_same(ours, oracle, [heads], torch.float64)


def test_other_dtypes_go_to_the_twins():
    x, weight = torch.randn(2, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.rms_norm(x, weight, 1e-6), x)
    assert torch.autograd.gradcheck(lambda x: ops.gated_activation(x, None, "gelu"), x)
    assert ops.rms_norm(x.half(), weight.half(), 1e-6).dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(4), 1e-6), r"weight has shape \(4,\), expected \(8,\)"),
        (lambda: ops.gated_activation(torch.ones(2, 3), None, "silu"), r"gate has shape \(2, 3\)"),
        (lambda: ops.gated_activation(torch.ones(2, 4), torch.ones(2, 1), "silu"), r"up \(2, 1\)"),
        (lambda: ops.gated_activation(torch.ones(2, 4), None, "relu"), "unknown activation 'relu'"),
        (lambda: ops.rotary(torch.ones(2, 1, 3, 4), torch.ones(3, 3, 4), torch.ones(3, 3, 4)), r"\(2 or 1, 3, R\)"),
        (lambda: ops.rotary(torch.ones(2, 1, 3, 4), torch.ones(2, 3, 6), torch.ones(2, 3, 6)), "at most 4"),
        (lambda: ops.rotary(torch.ones(2, 1, 3, 4), torch.ones(2, 3, 3), torch.ones(2, 3, 3)), "even R"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

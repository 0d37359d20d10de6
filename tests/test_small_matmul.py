"""The matmul of few rows, by the C++ code of every instruction set, against fp64."""

import itertools

import pytest
import torch
from sampling_oracle import ISAS, NATIVE, serving
from tolerances import close

from fastppo import ops
from fastppo.ops.matmul import WEIGHT_TYPES

pytestmark = pytest.mark.skipif(not ISAS, reason="fastppo was installed without its C++ extension")

# Beside whole tiles of rows and outputs: parts of them, an odd input, more inputs than are summed at a stretch, and
# rows of weights 4096 bytes apart.
SHAPES = [(1, 1), (15, 17), (17, 12), (31, 13), (288, 31), (801, 24), (1024, 13), (2048, 12)]


@pytest.fixture(params=ISAS)
def isa(request):
    with serving(request.param):
        yield request.param


def address_of(part):
    return 0 if part is None else part.data_ptr()


def run(
    x, weight, *, transposed=False, scales=None, bias=None, scale=1.0, out=None, threads=1, type=None, invariant=True
):
    """Multiply by the C++ code; add to `out` where it is given."""
    rows, inputs = x.shape
    outputs = weight.shape[1 if transposed else 0]
    target = torch.full((rows, outputs), float("nan")) if out is None else out
    NATIVE.small_matmul(
        (rows, inputs, outputs),
        (x.data_ptr(), x.stride(0)),
        (weight.data_ptr(), weight.stride(0), type or WEIGHT_TYPES[weight.dtype], transposed, address_of(scales)),
        (address_of(bias), bias is not None and bias.dtype == torch.bfloat16),
        scale,
        out is not None,
        (target.data_ptr(), target.stride(0)),
        invariant,
        threads,
    )
    return target


def make_weight(outputs, inputs, dtype, transposed=False):
    """Return weights with rows apart from each other, among values that must not be read, and the scales of int8."""
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    if dtype == torch.int8:
        apart = torch.randint(-127, 128, (shape[0], shape[1] + 3), dtype=dtype)
        return apart[:, : shape[1]], torch.rand(outputs) + 0.5
    apart = torch.full((shape[0], shape[1] + 3), float("nan"), dtype=dtype)
    apart[:, : shape[1]] = torch.randn(shape)
    return apart[:, : shape[1]], None


def product_in_fp64(x, weight, transposed=False, scales=None):
    """Return x times the weights, and what a rounding error of it is in proportion to: the sum of absolute values."""
    x = x.to(torch.bfloat16).double() if weight.dtype == torch.bfloat16 else x.double()
    matrix = (weight if transposed else weight.t()).double()
    matrix = matrix if scales is None else matrix * scales.double()
    return x @ matrix, x.abs() @ matrix.abs()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_agrees_with_fp64(isa, inputs, outputs, dtype, transposed):
    weight, scales = make_weight(outputs, inputs, dtype, transposed)
    for rows in (1, 7, 8, 9, 16, 17, 32, 33, 64, 70):
        x = torch.randn(rows, inputs + 2)[:, :inputs]
        expected, size = product_in_fp64(x, weight, transposed, scales)
        found = run(x, weight, transposed=transposed, scales=scales)
        assert ((found.double() - expected).abs() <= 4e-6 * size + 1e-30).all(), rows


@pytest.mark.parametrize(("inputs", "outputs"), [*SHAPES, (2100, 70)])
def test_codes_agree_with_fp64_however_they_are_summed(isa, inputs, outputs):
    weight, scales = make_weight(outputs, inputs, torch.int8)
    for rows, invariant, type in itertools.product((1, 2, 3, 5, 7, 8, 9, 33, 70), (False, True), (2, 3)):
        x = torch.randn(rows, inputs + 2)[:, :inputs].bfloat16().float()
        expected, size = product_in_fp64(x, weight, scales=scales)
        bias, out = torch.randn(outputs), torch.randn(rows, outputs)
        how = {"scales": scales, "type": type, "invariant": invariant}
        found = run(x, weight, bias=bias, **how)
        assert ((found.double() - expected - bias.double()).abs() <= 4e-6 * (size + 1)).all(), (rows, how)
        before = out.double()
        run(x, weight, out=out, scale=-2.0, **how)
        assert ((out.double() + 2 * expected - before).abs() <= 8e-6 * (size + 1)).all(), (rows, how)
        assert run(x, weight, threads=3, **how).equal(run(x, weight, **how))


@pytest.mark.parametrize("type", [2, 3])
def test_a_row_of_codes_is_the_same_beside_more_or_fewer_rows(isa, type):
    weight, scales = make_weight(45, 1100, torch.int8)
    x = torch.randn(70, 1100).bfloat16().float()
    whole = run(x, weight, scales=scales, type=type)
    few = run(x[:8], weight, scales=scales, type=type, invariant=False)
    for rows in (1, 3, 8):
        assert run(x[:rows], weight, scales=scales, type=type).equal(whole[:rows])
        assert run(x[:rows], weight, scales=scales, type=type, invariant=False).equal(few[:rows])
    assert run(x[:9], weight, scales=scales, type=type, invariant=False).equal(whole[:9])


def test_weights_in_one_piece(isa):
    """Rows of weights without a gap, which end where the memory may."""
    for dtype, (inputs, outputs) in itertools.product(
        (torch.float32, torch.bfloat16), [(1024, 36), (31, 24), (16, 12)]
    ):
        weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(32, inputs)
        expected, size = product_in_fp64(x, weight)
        assert ((run(x, weight).double() - expected).abs() <= 4e-6 * size).all()


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_bias_scale_and_a_sum_to_add_to(isa, dtype):
    for outputs, bias_dtype in itertools.product((5, 24), (torch.float32, torch.bfloat16)):
        weight, scales = make_weight(outputs, 31, dtype)
        x, bias = torch.randn(9, 31), torch.randn(outputs).to(bias_dtype)
        expected, size = product_in_fp64(x, weight, scales=scales)
        found = run(x, weight, scales=scales, bias=bias, scale=-0.5)
        torch.testing.assert_close(
            found.double(), -0.5 * expected + bias.double(), atol=4e-6 * float(size.max()), rtol=0
        )
        out = torch.randn(9, outputs + 4)[:, :outputs]
        before = out.double()
        run(x, weight, scales=scales, scale=2.0, out=out)
        torch.testing.assert_close(out.double(), before + 2 * expected, atol=8e-6 * float(size.max()), rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_a_row_is_the_same_to_the_last_bit_whatever_else_there_is(isa, dtype, transposed):
    for inputs, outputs in ((31, 13), (801, 29)):
        weight, scales = make_weight(outputs, inputs, dtype, transposed)
        x = torch.randn(70, inputs)
        whole = run(x, weight, transposed=transposed, scales=scales)
        for rows in range(1, 71):
            assert run(x[:rows], weight, transposed=transposed, scales=scales).equal(whole[:rows]), rows
        assert run(x[41:50], weight, transposed=transposed, scales=scales).equal(whole[41:50])


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_the_number_of_threads_changes_no_bit(isa, dtype):
    for outputs in (1, 12, 47, 300):
        weight, scales = make_weight(outputs, 100, dtype)
        x = torch.randn(70, 100)
        one, two, three = (run(x, weight, scales=scales, threads=threads) for threads in (1, 2, 3))
        assert one.equal(two)
        assert one.equal(three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row_and_column(isa, dtype):
    for inputs, transposed in itertools.product((31, 32), (False, True)):
        x, (weight, _) = torch.randn(33, inputs), make_weight(26, inputs, dtype, transposed)
        by_output = weight.t() if transposed else weight
        x[3, inputs - 1], x[32, 0], by_output[25, inputs - 1], by_output[4, 2] = torch.tensor(
            [float("nan"), float("inf"), float("inf"), float("nan")]
        )
        found, (expected, _) = run(x, weight, transposed=transposed), product_in_fp64(x, weight, transposed)
        assert found.isnan().equal(expected.isnan())
        assert found.isinf().equal(expected.isinf())
        assert found[:, 4].isnan().all()


def test_no_rows_no_inputs_and_no_outputs(isa):
    assert run(torch.randn(0, 5), torch.randn(3, 5)).shape == (0, 3)
    assert run(torch.randn(4, 5), torch.randn(0, 5)).shape == (4, 0)
    bias = torch.randn(3)
    assert run(torch.randn(4, 0), torch.randn(3, 0), bias=bias).equal(bias.expand(4, 3))


def test_more_rows_than_are_packed_at_a_time(isa):
    x, weight = torch.randn(1100, 20), torch.randn(13, 20)
    expected, size = product_in_fp64(x, weight)
    found = run(x, weight, threads=2)
    assert ((found.double() - expected).abs() <= 4e-6 * size).all()
    assert run(x[1050:1090], weight).equal(found[1050:1090])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_fp32_and_a_decode_steps_are_the_updates_to_the_last_bit(isa, dtype):
    hidden, weight, bias = (part.to(dtype) for part in (torch.randn(300, 40), torch.randn(50, 40), torch.randn(50)))
    expected = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    update = ops.LogitBuffer(weight, bias, 300)
    logits = update.fill(hidden)
    step = ops.LogitBuffer(weight, bias, 64).fill(hidden[200:207])
    assert logits.dtype == step.dtype == torch.float32
    assert step.equal(logits[200:207])
    torch.testing.assert_close(logits.double(), expected, **close(torch.float32, 10))
    gradient = update.gradient(300)
    assert (gradient.shape, gradient.dtype, gradient.data_ptr()) == (logits.shape, dtype, logits.data_ptr())
    assert len({part.untyped_storage().data_ptr() for part in update.parts}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_small_linear_is_a_linear_layer_with_fp32_sums(backend, dtype):
    x, weight, bias = torch.randn(20, 51).to(dtype), torch.randn(31, 51).to(dtype), torch.randn(31).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    out, wide = torch.empty(20, 40)[:, :31], close(torch.float32, 10)
    strided = torch.stack([weight, weight], -1)[..., 1]
    with ops.use_backend(backend):
        torch.testing.assert_close(ops.small_linear(x, weight, bias).double(), expected, **wide)
        for other in (strided, weight.t().contiguous().t()):
            found = ops.small_linear(x.t().contiguous().t(), other, bias)
            torch.testing.assert_close(found.double(), expected, **wide)
        assert ops.small_linear(x, weight, bias, out=out) is out
        torch.testing.assert_close(out.double(), expected, **wide)
        # Wider activations are rounded to a bf16 weight's dtype.
        other = torch.randn(20, 51)
        expected = (other.to(dtype).double() @ weight.double().t()).float()
        torch.testing.assert_close(ops.small_linear(other, weight), expected, **wide)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 5, dtype=torch.int8)}, "weight is torch.int8 and scales are not given: int8 needs"),
        ({"scales": torch.ones(3)}, "weight is torch.float32 and scales are given"),
        ({"weight": torch.ones(3, 5, dtype=torch.int8), "scales": torch.ones(4)}, r"scales are torch.float32 \(4,\)"),
        ({"x": torch.randn(4, 6)}, r"x is \(4, 6\) and weight \(3, 5\)"),
        ({"x": torch.ones(4, 5, dtype=torch.int64)}, "x is torch.int64, expected a floating dtype"),
        ({"bias": torch.randn(4)}, r"bias is torch.float32 \(4,\)"),
        ({"bias": torch.randn(3).double()}, "bias is torch.float64"),
        ({"weight": torch.ones(3, 5, dtype=torch.int8)}, "weight is torch.int8"),
        ({"out": torch.empty(4, 3, dtype=torch.bfloat16)}, "out is torch.bfloat16"),
        ({"out": torch.empty(3, 4).t()}, "with strides"),
    ],
)
def test_small_linear_refuses_what_does_not_fit(change, message):
    given = {"x": torch.randn(4, 5), "weight": torch.randn(3, 5), "bias": None, "out": None} | change
    with pytest.raises(ValueError, match=message):
        ops.small_linear(**given)

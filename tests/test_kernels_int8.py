"""The Triton kernel of int8 linear layers in the interpreter, against products in fp64."""

import pytest
import torch
from interpreter import Call, interpret

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fastppo.kernels import int8_linear as kernel

# name: (dtype, rows, inputs, outputs)
CASES = {
    "one row": (torch.float32, 1, 48, 40),
    "odd sizes": (torch.float32, 5, 77, 130),
    "one output": (torch.float32, 3, 9, 1),
    "one input": (torch.float32, 16, 1, 33),
    "as many rows as there may be": (torch.float32, 64, 130, 65),
    "parts": (torch.float32, 17, 1541, 70),
    "parts fp64": (torch.float64, 2, 2048, 66),
    "no rows": (torch.float32, 0, 48, 40),
    "fp16": (torch.float16, 9, 64, 48),
}


def problem(name):
    dtype, rows, inputs, outputs = CASES[name]
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(rows, inputs + 3, generator=draw).to(dtype)
    codes = torch.randint(-128, 128, (outputs, inputs + 5), generator=draw).to(torch.int8)
    scales = torch.rand(outputs, generator=draw) / 127
    scales[0] = 0.0
    return {"x": x, "codes": codes, "scales": scales}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    calls = {
        name: Call("fastppo.kernels.int8_linear.int8_linear", problem(name), {"x": case[2], "codes": case[2]})
        for name, case in CASES.items()
    }
    whole = problem("parts")
    alone = whole | {"x": whole["x"][4:5]}
    calls["a row alone"] = Call("fastppo.kernels.int8_linear.int8_linear", alone, {"x": 1541, "codes": 1541})
    return interpret(tmp_path_factory.mktemp("int8"), calls)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_product_with_codes_times_scales(results, name):
    dtype, rows, inputs, outputs = CASES[name]
    given = problem(name)
    x, codes = given["x"][:, :inputs].double(), given["codes"][:, :inputs].double()
    expected = x @ (codes * given["scales"].double()[:, None]).t()
    (found,) = results[name]
    assert found.shape == (rows, outputs)
    assert found.dtype == dtype
    size = (x.abs() @ (codes.abs() * given["scales"].double()[:, None]).t()).clamp_min(1e-9)
    bar = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    assert float(((found.double() - expected).abs() / size).max() if rows else 0) <= bar


def test_a_row_does_not_depend_on_the_others(results):
    assert torch.equal(results["a row alone"][0][0], results["parts"][0][4])


def test_parts_cover_every_input_once_and_do_not_depend_on_rows():
    for outputs in (1, 64, 4096, 14336, 128256):
        for inputs in (1, 511, 1024, 4096, 14336, 14337):
            parts, size = kernel.parts_of(outputs, inputs)
            assert (parts - 1) * size < inputs <= parts * size
            assert size % kernel.BLOCK_K == 0
            assert parts == 1 or size >= kernel.MIN_PART
    assert kernel.parts_of(4096, 4096)[0] > 1
    assert kernel.parts_of(128256, 4096)[0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(65, 8)}, r"x is torch.float32 \(65, 8\).* at most 64 rows"),
        ({"codes": torch.zeros(4, 8)}, "codes are torch.float32"),
        ({"scales": torch.zeros(3)}, r"scales are torch.float32 \(3,\), expected torch.float32 \(4,\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, message):
    given = {"x": torch.zeros(2, 8), "codes": torch.zeros(4, 8, dtype=torch.int8), "scales": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        kernel.int8_linear(**(given | changes))

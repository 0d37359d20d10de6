"""The Triton kernels without a GPU: in the interpreter for their numbers, ahead of time for their registers."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import close

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")

SHAPES = [(3, 1), (5, 7), (4, 130), (2, 1000), (2, 9001)]
SCALINGS = [(1.0, None), (0.7, None), (1.0, 5.0), (1.3, 30.0)]
CASES = [
    (f"{dtype}-{rows}x{vocabulary}-{temperature}-{softcap}".replace("torch.", ""), temperature, softcap)
    for dtype in (torch.float32, torch.float64)
    for rows, vocabulary in SHAPES
    for temperature, softcap in SCALINGS
]

# The interpreter is chosen when a kernel is decorated, hence a process of its own, one for all cases.
INTERPRET = """
import sys
from safetensors.torch import load_file, save_file
from fastppo.kernels.row_statistics import row_statistics

inputs, results = load_file(sys.argv[1]), {}
for name in sys.argv[3:]:
    case, temperature, softcap = name.split("/")
    scaling = float(temperature), None if softcap == "None" else float(softcap)
    results[case] = row_statistics(inputs[case], inputs[case + ".labels"], *scaling)
save_file({f"{case}.{i}": part for case, parts in results.items() for i, part in enumerate(parts)}, sys.argv[2])
"""


def interpret(folder: Path, inputs: dict[str, torch.Tensor], cases: list[tuple[str, float, float | None]]):
    """Run the kernel on each case in the interpreter and return {case: (logprobs, entropy, logsumexp)}."""
    save_file(inputs, folder / "inputs.safetensors")
    names = [f"{case}/{temperature}/{softcap}" for case, temperature, softcap in cases]
    command = [sys.executable, "-c", INTERPRET, folder / "inputs.safetensors", folder / "results.safetensors", *names]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flat = load_file(folder / "results.safetensors")
    return {case: tuple(flat[f"{case}.{i}"] for i in range(3)) for case, _, _ in cases}


def oracle(logits: torch.Tensor, labels: torch.Tensor, temperature: float, softcap: float | None):
    """Return the three statistics in fp64 by torch's own log-softmax."""
    z = logits.double()
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return log_p.gather(1, labels[:, None])[:, 0], entropy, torch.logsumexp(z, dim=-1)


@pytest.fixture(scope="module")
def random_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for case, _, _ in CASES:
        dtype, shape = case.split("-")[:2]
        rows, vocabulary = map(int, shape.split("x"))
        # Wide enough that softmax has a few peaks and a cap of 5 bites; rising, so that later blocks move the maximum.
        logits = 4 * torch.randn(rows, vocabulary, generator=generator) + torch.linspace(-9, 9, vocabulary)
        inputs[case] = logits.to(getattr(torch, dtype))
        inputs[case + ".labels"] = torch.randint(vocabulary, (rows,), generator=generator)
    return inputs


@pytest.fixture(scope="module")
def interpreted(random_inputs, tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    return interpret(tmp_path_factory.mktemp("interpreter"), random_inputs, CASES)


@pytest.mark.parametrize(("case", "temperature", "softcap"), CASES, ids=[case for case, _, _ in CASES])
def test_row_statistics_agree_with_log_softmax_in_fp64(case, temperature, softcap, random_inputs, interpreted):
    logits = random_inputs[case]
    expected = oracle(logits, random_inputs[case + ".labels"], temperature, softcap)
    for name, ours, truth in zip(("logprobs", "entropy", "logsumexp"), interpreted[case], expected, strict=True):
        assert ours.dtype == logits.dtype
        message = f"{name} of {case}"
        torch.testing.assert_close(
            ours.double(), truth, **close(logits.dtype, 4), msg=lambda m, head=message: f"{head}: {m}"
        )


def edge_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and labels: -inf tails, a leading -inf block, all -inf, huge, NaN, labels just out of range."""
    logits = torch.zeros(8, 5000)
    logits[0, 3000:] = float("-inf")
    logits[1, :4097] = float("-inf")
    logits[2] = float("-inf")
    logits[3] = 1e4
    logits[4, 17] = float("nan")
    logits[5, 0] = -1e4
    return logits, torch.tensor([0, 4999, 0, 4999, 0, 0, -1, 5000])


def test_row_statistics_of_extreme_rows(tmp_path):
    logits, labels = edge_rows()
    result = interpret(tmp_path, {"edges": logits, "edges.labels": labels}, [("edges", 1.0, None)])["edges"]
    nan, inf, log = float("nan"), float("inf"), math.log
    expected = {
        "logprobs": [-log(3000), -log(903), -inf, -log(5000), nan, -1e4 - log(4999), nan, nan],
        "entropy": [log(3000), log(903), 0.0, log(5000), nan, log(4999), log(5000), log(5000)],
        "logsumexp": [log(3000), log(903), -inf, 1e4 + log(5000), nan, log(4999), log(5000), log(5000)],
    }
    for ours, truth in zip(result, expected.values(), strict=True):
        torch.testing.assert_close(ours, torch.tensor(truth), **close(torch.float32, 4), equal_nan=True)


def test_row_statistics_refuse_what_they_cannot_serve():
    from fastppo.kernels.row_statistics import row_statistics

    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for arguments, message in [
        ((logits[0], labels), r"expected floating point \(N, V\)"),
        ((logits.long(), labels), "expected floating point"),
        ((torch.zeros(3, 2).t(), labels), r"use \.contiguous"),
        ((logits, labels[:1]), r"labels are torch\.int64 \(1,\), expected torch\.int64 \(2,\)"),
        ((logits, labels.int()), "expected torch.int64"),
        ((logits, labels, 0.0), r"temperature is 0\.0"),
        ((logits, labels, 1.0, -1.0), r"softcap is -1\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            row_statistics(*arguments)


def test_row_statistics_of_no_rows_are_empty():
    from fastppo.kernels.row_statistics import row_statistics

    for part in row_statistics(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)):
        assert part.shape == (0,)
        assert part.dtype == torch.float64


def compiled(capability: int, logits: str, has_softcap: bool):
    """Compile the kernel for a CUDA capability on this machine, with or without a GPU in it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastppo.kernels import row_statistics as module

    kernel = module._row_statistics_kernel
    wide = "fp64" if logits == "fp64" else "fp32"
    acc = triton.language.float64 if logits == "fp64" else triton.language.float32
    constants = {"HAS_SOFTCAP": has_softcap, "ACC": acc, "BLOCK": module._MAX_BLOCK}
    types = {"logits_ptr": f"*{logits}", "labels_ptr": "*i64", "vocabulary": "i32", "stride_row": "i64"}
    types |= dict.fromkeys(("logprobs_ptr", "entropy_ptr", "logsumexp_ptr"), f"*{wide}")
    types |= dict.fromkeys(("inverse_temperature", "softcap"), "fp64")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # Without the alignment that pointers from an allocator have, loads would not be vectorised as they are in use.
    aligned = {i for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=module._LAUNCH)


def resource_usage(kernel, folder: Path) -> dict[str, int]:
    """Return REG, STACK, SHARED, LOCAL of a compiled kernel, as the disassembler that triton ships reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"triton {triton.__version__} ships no {tool.name}")
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


@pytest.fixture
def compiler_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("compiler_cache")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("logits", "has_softcap"), [("bf16", False), ("fp32", True), ("fp64", True)])
def test_row_statistics_compile_without_spills(capability, logits, has_softcap, tmp_path):
    usage = resource_usage(compiled(capability, logits, has_softcap), tmp_path)
    assert usage["STACK"] == 0, f"registers spill to the stack: {usage}"
    assert usage["LOCAL"] == 0, f"registers spill to local memory: {usage}"
    if logits != "fp64":
        assert usage["REG"] <= 128, f"two programs of 8 warps no longer fit on a multiprocessor: {usage}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "softcap"), SCALINGS)
def test_row_statistics_on_a_gpu(dtype, temperature, softcap):
    from fastppo.kernels.row_statistics import row_statistics

    logits = (4 * torch.randn(33, 32001)).to(dtype).cuda()
    labels = torch.randint(32001, (33,), device="cuda")
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    expected = oracle(logits, labels, temperature, softcap)
    for ours, truth in zip(row_statistics(logits, labels, temperature, softcap), expected, strict=True):
        assert ours.dtype == acc
        torch.testing.assert_close(ours.double(), truth, **close(acc, 8))

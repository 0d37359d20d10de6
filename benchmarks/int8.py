"""Time a linear layer on int8 weights on the CPU against bitsandbytes, torch's own and unquantised layers.

    python -m benchmarks.int8 [--rows 1 8 32] [--shapes 2048x768 4096x4096] [--output FILE]

bf16 activations. First every result is held against fp64 products with the weights that it stands for; then all run in
turn. Those that round the activations too are another computation: they are timed and marked.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastppo
from benchmarks import measure
from benchmarks.matmul import sampler
from fastppo import ops
from fastppo.ops.matmul import row_invariant

ROOT = Path(__file__).resolve().parent.parent
OURS, TORCH = f"fastppo {fastppo.__version__}", f"torch {torch.__version__}"
EXACT = f"{OURS}, rows alone"
# Of the sum of absolute products: two roundings to bf16; int8 activations besides.
BAR, ROUNDED_BAR = 2**-8, 2**-4
NOTES = [
    "weights are int8 with a scale for each row of outputs, activations and results bf16",
    "rounds x: activations are int8 as well, which weight-only quantisation is not; no peer to be measured by",
    "rows alone: the sums of `consistency='exact'`, which do not depend on the number of rows",
    "peak_bytes is not measured here",
]


def contenders(x: Tensor, codes: Tensor, scales: Tensor) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Return who multiplies, by name, with the weights in fp64 that the result stands for."""
    import bitsandbytes as bnb

    weight = codes.double() * scales.double()[:, None]
    half, single = weight.bfloat16(), weight.float()
    layer = bnb.nn.Linear8bitLt(codes.shape[1], len(codes), bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(single.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    stored = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127

    def alone() -> Tensor:
        with row_invariant():
            return ops.int8_linear(x, codes, scales)

    def by_rows() -> Tensor:
        largest = x.abs().amax(1, keepdim=True).float() / 127
        return (torch._int_mm((x / largest).round().to(torch.int8), codes.t()) * largest * scales).to(x.dtype)

    found: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        OURS: (lambda: ops.int8_linear(x, codes, scales), weight),
        EXACT: (alone, weight),
        f"{TORCH} _weight_int8pack_mm": (lambda: torch._weight_int8pack_mm(x, codes, scales.to(x.dtype)), weight),
        f"{TORCH} bf16 F.linear": (lambda: torch.nn.functional.linear(x, half), half.double()),
        f"{TORCH} fp32 F.linear": (lambda: torch.nn.functional.linear(x.float(), single), single.double()),
        f"{TORCH} _int_mm, rounds x": (by_rows, weight),
        f"bitsandbytes {bnb.__version__} Linear8bitLt, rounds x": (lambda: layer.eval()(x), stored),
    }
    return found


def fault(who: str, found: Tensor, x: Tensor, weight: Tensor) -> str:
    """Return what is wrong with a product, or nothing."""
    expected, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    bar = ROUNDED_BAR if "rounds x" in who else BAR
    worst = float(((found.double() - expected).abs() / size).max())
    return "" if worst <= bar else f"is off by {worst:.1e} of the sum of absolute products, over {bar:.1e}"


def run_case(rows: int, shape: str, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Check and time everybody in one case."""
    inputs, outputs = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    codes = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
    codes[:, 0] = 127  # every row uses the whole range, as quantisation leaves it
    scales = torch.rand(outputs, generator=generator) / 127 + 1e-3
    case, sides = f"{rows} rows, {shape}", {}
    for who, (run, weight) in contenders(x, codes, scales).items():
        try:
            reason = fault(who, run(), x, weight)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if reason:
            found["gate"].append(f"{case}: {who}: {reason}")
            if who in (OURS, EXACT):
                raise SystemExit(found["gate"][-1])
            print(found["gate"][-1], file=sys.stderr)
        else:
            sides[who] = sampler(run, case, arguments.foreign_limit)
    turns = measure.take_turns(sides, arguments.samples, arguments.foreign_limit)
    found["not_timed"] += measure.not_timed(case, turns)
    for who, its in turns.items():
        for row in measure.rows(who, its.samples) if its.samples else ():
            row["gigabytes_per_s"] = round(codes.numel() / row["median_s"] / 1e9, 2)
            found["rows"].append(row)


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, for each case, how many times as long as ours everybody takes."""
    result: dict[str, dict[str, float]] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["who"]: row["median_s"] for row in rows if row["case"] == case}
        if OURS in here:
            result[case] = {who: round(seconds / here[OURS], 2) for who, seconds in here.items() if who != OURS}
    return result


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--shapes", nargs="+", default=["2048x768", "4096x4096"], help="inputs x outputs")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and no guard: shows only that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/int8-cpu.json)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.foreign_limit, arguments.samples, arguments.shapes, arguments.rows = math.inf, 1, ["64x48"], [1, 3]
    elif arguments.output is None:
        arguments.output = ROOT / "benchmarks" / "results" / "int8-cpu.json"
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its tables and write its JSON."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"rows": [], "gate": [], "not_timed": [], "notes": NOTES}
    with torch.no_grad():
        for shape in arguments.shapes:
            for rows in arguments.rows:
                run_case(rows, shape, arguments, found)
    found["ratios"] = ratios(found["rows"])
    if arguments.output:
        command = " ".join(["python -m benchmarks.int8", *argv])
        measure.write_found(arguments.output, command, found, arguments.foreign_limit)
    print(measure.table(found["rows"]))
    for case, times in found["ratios"].items():
        print(case, "over ours:", times)


if __name__ == "__main__":
    main()

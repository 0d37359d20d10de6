"""Time a linear layer for the few rows of a decode step on the CPU, from weights as torch keeps them.

    python -m benchmarks.matmul [--rows 1 8 32 64] [--shapes 288x32000 ...] [--dtypes fp32 bf16] [--output FILE]

Compared with torch's F.linear, with W @ x.T, and with oneDNN on weights in an order of its own, which a model in
training would have to renew at every step. First every product is checked in fp64; then all run in turn.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastppo
from benchmarks import measure
from fastppo import ops

ROOT = Path(__file__).resolve().parent.parent
OURS = f"fastppo {fastppo.__version__}"
TORCH = f"torch {torch.__version__}"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Inputs x outputs: layers and heads of decoders of 15 and 110 million parameters.
SHAPES = ["288x32000", "288x768", "288x288", "768x288", "768x32000", "768x2048", "768x768", "2048x768"]
# Errors in units of the sum of absolute products; a peer's bf16 result is rounded to bf16 besides.
SUM_BAR, BF16_BAR = 4e-6, 2**-8
NOTES = ["fastppo's results are fp32 for either dtype, the peers' are of the weights' dtype"]


@dataclass(frozen=True)
class Case:
    """A product of (rows, inputs) with the transpose of (outputs, inputs)."""

    rows: int
    inputs: int
    outputs: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.inputs}x{self.outputs}, {self.dtype}"


def contenders(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return who multiplies, by name and version."""
    found = {
        OURS: lambda: ops.small_linear(x, weight),
        f"{TORCH} F.linear": lambda: torch.nn.functional.linear(x, weight),
        f"{TORCH} W @ x.T": lambda: (weight @ x.t()).t(),
    }
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        onednn = torch.ops.mkldnn._linear_pointwise
        found[f"{TORCH} oneDNN prepacked"] = lambda: onednn(x, packed, None, "none", [], "")
    return found


def fault(found: Tensor, x: Tensor, weight: Tensor) -> str:
    """Return what is wrong with a product, or nothing."""
    expected, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    rounding = BF16_BAR * expected.abs() if found.dtype == torch.bfloat16 else 0
    excess = (found.double() - expected).abs() - (SUM_BAR * size + rounding)
    worst = float(excess.max())
    return "" if worst <= 0 else f"is off by {worst:.1e} more than rounding allows"


def sampler(run: Callable[[], Tensor], case: Case, limit: float) -> Callable[[], measure.Sample]:
    """Return what takes one sample."""

    def seconds_of(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats

    return measure.sampler(seconds_of, str(case), "cpu", limit)


def run_case(case: Case, samples: int, limit: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Check everybody, time who passed, and return a row each, and a line for each who has no clean sample."""
    torch.manual_seed(0)
    x = torch.randn(case.rows, case.inputs).to(DTYPES[case.dtype])
    weight = torch.randn(case.outputs, case.inputs).to(DTYPES[case.dtype])
    sides = {}
    for who, run in contenders(x, weight).items():
        wrong = fault(run(), x, weight)
        if wrong and who == OURS:
            raise SystemExit(f"{case}: {OURS} {wrong}")
        if wrong:
            print(f"{case}: {who} {wrong}: not timed", file=sys.stderr)
        else:
            sides[who] = sampler(run, case, limit)
    rows, by_side = [], measure.take_turns(sides, samples, limit)
    for who, turns in by_side.items():
        if turns.samples:
            (row,) = measure.rows(who, turns.samples)
            operations = 2 * case.rows * case.inputs * case.outputs
            more = {"gflops": round(operations / row["median_s"] / 1e9, 1) if row["median_s"] else None}
            rows.append(row | more | {"dropped": turns.dropped, "peak_bytes": None})
    return rows, measure.not_timed(str(case), by_side)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times faster than each peer we are in each case."""
    lines = []
    for ours in (row for row in rows if row["who"] == OURS and row["median_s"]):
        peers = {r["who"]: r["median_s"] for r in rows if r["case"] == ours["case"] and r["who"] != OURS}
        times = {who: round(seconds / ours["median_s"], 2) for who, seconds in peers.items()}
        lines.append({"case": ours["case"], "times_faster_than": times})
    return lines


def markdown(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a Markdown table."""
    times = {line["case"]: line["times_faster_than"] for line in ratios(rows)}
    lines = ["| case | who | median us | min | max | GFLOP/s | ours is faster, times |", "|---" * 7 + "|"]
    for row in rows:
        figures = " | ".join(f"{1e6 * row[key]:.0f}" for key in ("median_s", "min_s", "max_s"))
        ratio = times.get(row["case"], {}).get(row["who"], "")
        lines.append(f"| {row['case']} | {row['who']} | {figures} | {row['gflops']} | {ratio} |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matmul", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--samples", type=int, default=5, help="samples per contender that must be clean")
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no guard: shows only that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/matmul-cpu.json)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.foreign_limit, arguments.samples, arguments.rows = math.inf, 1, [3]
        arguments.shapes = ["100x1000"]
    elif arguments.output is None:
        arguments.output = ROOT / "benchmarks" / "results" / "matmul-cpu.json"
    return arguments


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON, which after every case holds what there is by then."""
    arguments = parse_arguments(argv)
    limit = arguments.foreign_limit if math.isfinite(arguments.foreign_limit) else None
    command = " ".join(["python -m benchmarks.matmul", *(sys.argv[1:] if argv is None else argv)])
    rows: list[dict[str, Any]] = []
    not_timed: list[str] = []
    for dtype in arguments.dtypes:
        for shape in arguments.shapes:
            for count in arguments.rows:
                case = Case(count, *map(int, shape.split("x")), dtype)
                found, missing = run_case(case, arguments.samples, arguments.foreign_limit)
                rows += found
                not_timed += missing
                if arguments.output:
                    more = {"foreign_limit": limit, "ratios": ratios(rows), "not_timed": not_timed, "notes": NOTES}
                    measure.write_result(arguments.output, command, rows, **more)
    print(markdown(rows), *not_timed, sep="\n")
    if not_timed or any(row["samples"] < arguments.samples for row in rows):
        raise SystemExit("too few clean samples: stop what else runs, or raise --foreign-limit and say so")


if __name__ == "__main__":
    main()

"""Time steps of supervised fine-tuning, beside TRL's SFTTrainer, on a Llama with random weights.

    python -m benchmarks.sft [--peer] [--size 15m] [--case texts completions equal] [--dtype fp32 bf16] [--output FILE]

Every side runs in a process of its own and takes a step only when asked, each in turn; the batches are the same, one
after the other. Times are for 1,000 tokens of the documents, padding not counted, so that steps of any size compare.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.side import ROOT, Side
from benchmarks.step import SIZES, write_model

PEER, ENVIRONMENT = "trl-1.16.0", ".venv-trl116"
CASES = ("texts", "completions", "equal")
LOSS_BAR, GATE_STEPS = 1e-3, 4
NOTES = [
    "median_s, min_s and max_s: seconds for 1,000 tokens of the documents, padding not counted, in optimiser steps",
    "texts: documents of 1/8 to 1 of the longest; completions: of these the second half is learned; equal: no padding",
    "gradient checkpointing off and AdamW in both; bf16: autocast over fp32 weights in both",
    "peak_bytes: high-water mark of the side's process, model, optimiser state and libraries included",
]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft", description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="time TRL too; `make bench-peers` installs it")
    parser.add_argument("--size", choices=SIZES, default="15m")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch_size", type=int, default=16, help="documents of a step")
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest document")
    parser.add_argument("--iterations", type=int, default=5, help="samples per side that must be clean")
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    return parser.parse_args(argv)


def commands(model_dir: str, case: str, dtype: str, steps: int, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command line of each side."""
    numbers = {"batch_size": arguments.batch_size, "longest": arguments.longest, "steps": steps}
    numbers["vocab_size"] = SIZES[arguments.size][-1]
    flags = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    sides = {"fastppo": [sys.executable, "-m", "benchmarks.fastppo_sft"]}
    if arguments.peer:
        python = ROOT / ENVIRONMENT / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{PEER} is not installed: {ENVIRONMENT} is missing. Run `make bench-peers` first.")
        sides[PEER] = [str(python), str(ROOT / "benchmarks" / "peers" / "trl_sft.py")]
    return {name: [*command, model_dir, case, dtype, *flags] for name, command in sides.items()}


def gate(case: str, dtype: str, given: dict[str, list[str]]) -> dict[str, list[float]]:
    """Return the losses of the first steps of each side; exit when they differ in fp32, for then no time counts."""
    losses = {}
    for name, command in given.items():
        side = Side(name, [*command, "--gate"])
        losses[name] = [float(loss) for loss in side.hello["losses"]]
        side.close()
    gaps = [max(values) - min(values) for values in zip(*losses.values(), strict=True)]
    if dtype == "fp32" and not max(gaps) <= LOSS_BAR:
        raise SystemExit(f"{case} {dtype}: losses differ by {max(gaps):.2g}, more than {LOSS_BAR}: {losses}; not timed")
    return losses


def run_case(model_dir: str, case: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one case: the rows of its sides, in seconds for 1,000 tokens, and what was checked."""
    losses = gate(case, dtype, commands(model_dir, case, dtype, GATE_STEPS, arguments))
    # Two to warm up, and as many again as could be dropped.
    sides = [
        Side(name, command)
        for name, command in commands(model_dir, case, dtype, 2 + 3 * arguments.iterations, arguments).items()
    ]
    limit = arguments.foreign_limit
    for _ in range(2):
        for side in sides:
            side.iterate(None, math.inf)
    takers = {side.name: lambda side=side: side.iterate(None, limit) for side in sides}
    turns = measure.take_turns(takers, arguments.iterations, limit)
    for side in sides:
        side.close()
    rows = [row for who, its in turns.items() if its.samples for row in measure.rows(who, its.samples)]
    named = [row | {"case": f"{case} {dtype}"} for row in rows]
    dropped = {side.name: turns[side.name].dropped for side in sides}
    versions = {side.name: side.hello["versions"] for side in sides}
    return {"rows": named, "losses": losses, "dropped": dropped, "versions": versions}


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each case with our tokens a second and peak memory in the peer's."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        by_name = {row["who"]: row for row in rows if row["case"] == case}
        if len(by_name) == 2:
            ours, peer = by_name["fastppo"], by_name[PEER]
            speed, memory = peer["median_s"] / ours["median_s"], ours["peak_bytes"] / peer["peak_bytes"]
            lines.append(f"{case}: {speed:.2f} times the tokens a second, {memory:.2f} of the peak memory")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as model_dir:
        write_model(Path(model_dir), arguments.size)
        for case in arguments.case:
            for dtype in arguments.dtype:
                found[f"{case} {dtype}"] = run_case(model_dir, case, dtype, arguments)
    rows = [row for each in found.values() for row in each.pop("rows")]
    for row in rows:
        print(
            f"{row['case']:18} {row['who']:12} {1000 / row['median_s']:9.0f} tokens/s {row['peak_bytes'] / 1e6:7.0f} MB"
        )
    print("\n".join(ratios(rows)))
    if arguments.output:
        limit = arguments.foreign_limit
        more = {"notes": NOTES, "ratios": ratios(rows), "checks": found}
        more |= {"foreign_limit": limit if math.isfinite(limit) else None}
        measure.write_result(arguments.output, " ".join(["python -m benchmarks.sft", *argv]), rows, **more)
    if any(row["samples"] < arguments.iterations for row in rows):
        raise SystemExit("too few clean samples: stop what else runs, or raise --foreign-limit and say so")


if __name__ == "__main__":
    main()

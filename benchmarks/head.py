"""Time the loss head: PPO's loss with an entropy bonus, forward and backward, from hidden states to gradients.

    python -m benchmarks.head [--cases 32k 152k] [--dtypes fp32 bf16] [--heads trained frozen] [--output FILE]

Compared with plain torch and every peer that the running environment can import; `make bench-peers` makes .venv-head,
which has them. First everybody is compared with fp64. Then all run in turn in this process, with the bare matmuls
among them. Memory is measured in a process for each.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import head_memory, measure
from benchmarks.head_contenders import FLOOR, OURS, Contender, bare_matmuls, contenders, run_ours
from benchmarks.head_gate import Verdict, run_gate
from benchmarks.head_problem import DTYPES, Case, Problem, make_problem
from benchmarks.head_report import markdown, ratios
from benchmarks.matmul_count import counting
from fastppo import ops

ROOT = Path(__file__).resolve().parent.parent
# V, T, H, B: the vocabularies of Llama 2 and of Qwen 2.5 on a small model; Llama 3.1 8B for a GPU.
CASES = {
    "32k": Case(32_000, 4096, 768, 32),
    "152k": Case(151_936, 1024, 768, 8),
    "128k": Case(128_256, 8192, 4096, 16),
}
# Too small to say anything about speed; it shows in seconds that the benchmark itself works.
QUICK = {"tiny": Case(503, 96, 24, 4)}
DEFAULTS = {
    "cpu": {"cases": ["32k", "152k"], "dtypes": ["fp32", "bf16"], "heads": ["trained", "frozen"]},
    "cuda": {"cases": ["128k"], "dtypes": ["bf16"], "heads": ["frozen"]},
}
NOTES = [
    "loss: PPO's clipped loss with an entropy bonus, about a quarter of the rows clipped; same inputs for everybody",
    "gate: errors against fp64, ours at most 2 and a peer's at most 10 times those of plain torch in the same dtype;"
    " a peer that fails is timed, but not as an equal",
    "matmuls only: logits, dH and, for a trained head, dW, into buffers that exist; no sum of dW over chunks",
    "peak_bytes: growth of the process's memory over a run; extra_bytes: the same without the gradients",
    "trl: ChunkedLogProbFunction folds its tiles with Triton on CUDA and with torch elsewhere, as in TRL itself;"
    " trl.kernels.selective_log_softmax_and_entropy needs CUDA, elsewhere TRL's trainers use plain torch, timed here",
]


def seconds_of(run: Callable[[Problem], object], problem: Problem, repeats: int) -> float:
    """Return the mean seconds of a run, over `repeats` of them; dropping old gradients does not count on a CPU."""
    if problem.hidden.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run(problem)  # out of the idle clocks
        start.record()
        for _ in range(repeats):
            problem.clear_gradients()
            run(problem)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / repeats
    total = 0.0
    for _ in range(repeats):
        problem.clear_gradients()
        begin = time.perf_counter()
        run(problem)
        total += time.perf_counter() - begin
    return total / repeats


def sampler(
    run: Callable[[Problem], object], problem: Problem, case: Case, limit: float
) -> Callable[[], measure.Sample]:
    """Return what takes one sample and leaves no gradients behind."""

    def mean_seconds(repeats: int) -> float:
        seconds = seconds_of(run, problem, repeats)
        problem.clear_gradients()
        return seconds

    return measure.sampler(mean_seconds, str(case), problem.hidden.device.type, limit)


def time_case(
    everybody: list[Contender], case: Case, problem: Problem, verdicts: dict[tuple[str, bool], Verdict], samples: int,
    limit: float,
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """Time everybody and the bare matmuls in turn; return a row each, and a line for each who has no clean sample."""
    problem.weight.requires_grad_(case.is_trained)
    running = [one for one in everybody if not verdicts[one.who, case.is_trained].could_not_run]
    about: dict[str, dict[str, Any]] = {}
    for one in running:
        verdict = verdicts[one.who, case.is_trained]
        about[one.who] = {"gives": one.gives, "gate": str(verdict), "has_passed": verdict.has_passed}
    sides = {one.who: sampler(one.run, problem, case, limit) for one in running}
    for name, rows in (
        ("whole", case.tokens),
        ("in our chunks", ops.chunk_rows(case.vocabulary, problem.hidden.device)),
    ):
        who = f"torch {torch.__version__} matmuls, {name}"
        about[who] = {"gives": FLOOR, "gate": "", "has_passed": True}
        sides[who] = sampler(bare_matmuls(problem, rows), problem, case, limit)
    rows_found, by_side = [], measure.take_turns(sides, samples, limit)
    for who, turns in by_side.items():
        if turns.samples:
            (row,) = measure.rows(who, turns.samples)
            rows_found.append(row | about[who] | {"dropped": turns.dropped, "peak_bytes": None})
    return rows_found, measure.not_timed(str(case), by_side)


def count_matmuls(case: Case, problem: Problem) -> dict[str, Any]:
    """Count our matmul FLOPs in units of 2 T H V, and the share of them left when half the rows have no weight."""
    problem.weight.requires_grad_(case.is_trained)
    weights = problem.weights.clone()
    weights[::2] = 0
    units = []
    for of_these in (problem, replace(problem, weights=weights)):
        of_these.clear_gradients()
        with counting() as count:
            run_ours(of_these)
        units.append(count.flops / (2 * case.tokens * case.hidden * case.vocabulary))
    problem.clear_gradients()
    found = {"units_of_2THV": round(units[0], 4), "share_with_half_the_rows_weightless": round(units[1] / units[0], 4)}
    # Fewer than the gradients take: then a matmul went through an operation that the counter does not know.
    return found | {"is_complete": units[0] > (3 if case.is_trained else 2) - 0.01}


def add_memory(rows: list[dict[str, Any]], case: Case) -> dict[str, int]:
    """Measure the memory of every row's contender into the row; return ours at T and at 2 T, if it was timed."""
    for row in rows:
        if row["gives"] != FLOOR:
            row |= head_memory.measure(row["who"], case)
            print(f"{row['who']}: peak {row['peak_bytes'] / 2**20:.0f} MiB", file=sys.stderr)
    once = next((row["extra_bytes"] for row in rows if row["who"] == OURS), None)
    if once is None:
        return {}
    return {"T": once, "2T": head_memory.measure(OURS, case.with_twice_the_tokens())["extra_bytes"]}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="the sizes (32k 152k; 128k on a GPU)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(both; bf16 on a GPU)")
    parser.add_argument("--heads", nargs="+", choices=["trained", "frozen"], help="(both; frozen on a GPU)")
    parser.add_argument("--samples", type=int, default=3, help="samples per contender that must be clean")
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out, and the processes it takes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and no guard: shows only that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/head-<cpu|gpu>.json)")
    arguments = parser.parse_args(argv)
    for name, default in DEFAULTS[arguments.device].items():
        setattr(arguments, name, getattr(arguments, name) or default)
    if arguments.quick:
        arguments.foreign_limit = math.inf
    elif arguments.output is None:
        kind = "gpu" if arguments.device == "cuda" else "cpu"
        arguments.output = ROOT / "benchmarks" / "results" / f"head-{kind}.json"
    return arguments


def run_size(
    size: Case, arguments: argparse.Namespace, everybody: list[Contender], found: dict[str, Any],
    save: Callable[[], None],
) -> bool:  # fmt: skip
    """Run the gate and all measurements of one size in one dtype into `found`; return whether ours passed.

    `save` is called whenever there is more in `found`.
    """
    problem = make_problem(size)
    modes = [head == "trained" for head in arguments.heads]
    print(f"gate: V {size.vocabulary}, {size.dtype}", file=sys.stderr)
    verdicts = run_gate(everybody, problem, modes, lambda line: print(f"  {line}", file=sys.stderr))
    for is_trained in modes:
        case = replace(size, is_trained=is_trained)
        found["gate"][str(case)] = {one.who: verdicts[one.who, is_trained].as_json() for one in everybody}
        if not verdicts[OURS, is_trained].has_passed:
            continue
        rows, missing = time_case(everybody, case, problem, verdicts, arguments.samples, arguments.foreign_limit)
        found["rows"] += rows
        found["not_timed"] += missing
        found["flops"][str(case)] = count_matmuls(case, problem)
        save()
        if not arguments.no_memory:
            found["extra_bytes"][str(case)] = add_memory(rows, case)
            save()
    return all(verdicts[OURS, is_trained].has_passed for is_trained in modes)


def save_result(found: dict[str, Any], arguments: argparse.Namespace, argv: list[str]) -> None:
    """Write the JSON of what has been found so far, if it is to be written at all."""
    if arguments.output:
        limit = arguments.foreign_limit if math.isfinite(arguments.foreign_limit) else None
        command = " ".join(["python -m benchmarks.head", *argv])
        more = {name: value for name, value in found.items() if name != "rows"} | {"ratios": ratios(found["rows"])}
        measure.write_result(arguments.output, command, found["rows"], foreign_limit=limit, **more)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON, which after every case holds what there is by then."""
    arguments = parse_arguments(argv)
    everybody, absent = contenders()
    for name, reason in absent.items():
        print(f"not here: {name} ({reason})", file=sys.stderr)
    found: dict[str, Any] = {"rows": [], "gate": {}, "flops": {}, "extra_bytes": {}, "not_timed": []}
    found |= {"absent": absent, "notes": NOTES}

    def save() -> None:
        save_result(found, arguments, sys.argv[1:] if argv is None else argv)

    sizes = QUICK.values() if arguments.quick else [CASES[name] for name in arguments.cases]
    passed = [
        run_size(replace(size, dtype=dtype, device=arguments.device), arguments, everybody, found, save)
        for size in sizes
        for dtype in arguments.dtypes
    ]
    save()  # also where ours passed in no case
    rows = found["rows"]
    print(markdown(rows, ratios(rows), found["flops"], found["extra_bytes"]), *found["not_timed"], sep="\n")
    if not all(passed):
        raise SystemExit("ours is further from fp64 than the gate allows: those cases were not timed")
    if found["not_timed"] or any(row["samples"] < arguments.samples for row in rows):
        raise SystemExit("too few clean samples: stop what else runs, or raise --foreign-limit and say so")


if __name__ == "__main__":
    main()

"""The planner against runs: predicted and measured peak of live tensors, and whether the largest that fits fits.

Each run is a process of its own on random weights: two iterations of `generate` and `step` on the CPU. `resident` is
by how much the process grew, with the allocator's thresholds pinned.

    python -m benchmarks.plan --output benchmarks/results/plan-cpu.json
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import measure, plan_side
from benchmarks.head_memory import PINNED
from benchmarks.plan_cases import CASES, Case

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.07
# Runs whose memory depends on the length of the responses, and so has a largest one.
LIMITED = ("llama, full, long", "llama, LoRA, many short samples")


def run(case: Case, limit: int | None = None) -> dict[str, Any] | None:
    """Return the figures of one run, or None if it went over the limit."""
    command = [sys.executable, "-m", "benchmarks.plan_side", json.dumps(asdict(case))]
    command += [] if limit is None else [str(limit)]
    environment = os.environ | PINNED | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)
    if "MemoryError: tensors take" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(f"{case.name} ended with code {done.returncode}:\n{done.stderr[-1500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(case: Case) -> dict[str, Any]:
    """Return the row of a case."""
    found = run(case)
    assert found is not None
    planned = found["predicted_bytes"]
    errors = {"error": planned / found["measured_bytes"] - 1, "resident_error": planned / found["resident_bytes"] - 1}
    sizes = "".join(f"{found[f'{name}_bytes'] / 1e6:10.1f}" for name in ("predicted", "measured", "resident"))
    print(f"{case.name:42}{sizes}" + "".join(f"{error:9.2%}" for error in errors.values()), flush=True)
    errors = {name: round(error, 5) for name, error in errors.items()}
    return {"case": case.name, "who": "fastppo", **errors, **found, "setting": asdict(case)}


def limit(case: Case) -> dict[str, Any]:
    """Find the longest responses that fit into 1.5 times a case's memory, and run them, and a quarter more."""
    from fastppo.planner import advice

    memory = plan_side.predict(case).peak * 3 // 2
    context = case.model.get("max_position_embeddings", 2048)
    longest = advice.largest(
        lambda n: advice.needed(plan_side.predict(replace(case, response=n))), memory, context - case.prompt
    )
    lengths = {"largest": longest, "a quarter more": longest + -(-longest // 4)}
    outcomes = {name: run(replace(case, response=n), memory) is not None for name, n in lengths.items()}
    print(f"{case.name}: {memory} bytes, responses of {lengths}: runs {outcomes}")
    return {"case": case.name, "memory_bytes": memory, "response": lengths, "runs": outcomes}


def main(argv: list[str] | None = None) -> None:
    """Run all cases, print errors and write the JSON; fail if one is over the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="*", help="parts of the names of the cases to run; by default all")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    chosen = [case for case in CASES if not arguments.cases or any(part in case.name for part in arguments.cases)]
    print(f"{'case':42}{'planned MB':>10}{'measured':>10}{'resident':>10}{'error':>9}{'of res.':>9}")
    rows = [compare(case) for case in chosen]
    limits = [limit(case) for case in chosen if case.name in LIMITED]
    worst = max(rows, key=lambda row: abs(row["error"]))
    print(f"worst: {worst['error']:.2%} ({worst['case']})")
    if arguments.output:
        command = " ".join(["python -m benchmarks.plan", *(sys.argv[1:] if argv is None else argv)])
        measure.write_result(arguments.output, command, rows, limits=limits, bar=BAR)
    if abs(worst["error"]) > BAR or any(one["runs"] != {"largest": True, "a quarter more": False} for one in limits):
        raise SystemExit("the planner is off: see above")


if __name__ == "__main__":
    main()

"""Peak memory of one contender of the loss-head benchmark, in a process of its own: `measure` starts one.

In that process: python -m benchmarks.head_memory WHO CASE, CASE in JSON; it prints one line of JSON.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.head_contenders import Contender, find
from benchmarks.head_problem import Case, Problem, make_problem

ROOT = Path(__file__).resolve().parent.parent
# glibc moves both thresholds as it learns from what is freed; memory it then keeps would count as in use.
PINNED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def measure(who: str, case: Case) -> dict[str, Any]:
    """Return peak_bytes (above the state before), gradient_bytes and extra_bytes (peak without gradients)."""
    command = [sys.executable, "-m", "benchmarks.head_memory", who, json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | PINNED)
    if done.returncode:
        raise RuntimeError(f"{who} ended with code {done.returncode}; its last words:\n{done.stderr[-1500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _reset_peak(device: str) -> bool:
    """Forget the peak so far; return whether that could be done."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") - _status("VmRSS") < 2**20


def _used(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _gradient_bytes(problem: Problem) -> int:
    gradients = [tensor.grad for tensor in (problem.hidden, problem.weight)]
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients if gradient is not None)


def grown(contender: Contender, case: Case) -> dict[str, Any]:
    """Run a contender once in this process and read how far the peak rose."""
    # The libraries' code and its lazy parts must not count: a small run first.
    tokens = 2 * case.sequences
    contender.run(make_problem(replace(case, vocabulary=min(1000, case.vocabulary), tokens=tokens)))
    problem = make_problem(case)
    gc.collect()
    is_reset = _reset_peak(case.device)
    before = _used(case.device)
    contender.run(problem)
    peak = max(0, _peak(case.device) - before)
    gradients = _gradient_bytes(problem)
    return {
        "peak_bytes": peak,
        "gradient_bytes": gradients,
        "extra_bytes": max(0, peak - gradients),
        "peak_was_reset": is_reset,
    }


def main(who: str, case: str) -> None:
    """Measure the contender of this name and print the figures."""
    print(json.dumps(grown(find(who), Case(**json.loads(case)))))


if __name__ == "__main__":
    main(*sys.argv[1:])

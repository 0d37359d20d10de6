"""What every benchmark needs: machine and versions beside the figures, a guard against other load, the JSON form."""

import importlib.metadata
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A sample taken while other processes used more of a core than this says more about them than about us.
FOREIGN_LIMIT = 0.12
# A shorter sample says as much about the clock as about the code; on a CPU others' use is read from one of 0.01 s.
SAMPLE_SECONDS = {"cpu": 0.3, "cuda": 0.1}
PACKAGES = ("fastppo", "torch", "transformers", "accelerate", "peft", "triton", "numpy", "trl", "liger-kernel")


def processor() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores this process may use, memory in bytes, GPUs, system, threads of torch."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """List the versions of Python and of the packages that decide speed, of this environment."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def busy_seconds() -> float | None:
    """Return the processor time that the whole machine has spent, in core seconds, or None where nobody counts it."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    """Return the processor time of one process with all its threads, in core seconds."""
    # The name of the program, in parentheses, may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class ForeignLoad:
    """Measure how much of a core processes other than the given ones use."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.pids = (os.getpid(), *pids)
        self.restart()

    def restart(self) -> None:
        """Start the measurement again from now."""
        self._start, self._busy, self._own = time.perf_counter(), busy_seconds(), self._own_seconds()

    def _own_seconds(self) -> float:
        return 0.0 if busy_seconds() is None else sum(process_seconds(pid) for pid in self.pids)

    def read(self) -> float | None:
        """Return the mean use of others since the start, in cores, or None where it cannot be known."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return None
        foreign = busy - self._busy - (self._own_seconds() - self._own)
        return max(0.0, foreign / (time.perf_counter() - self._start))

    def wait_for_idle(self, limit: float, patience_s: float) -> None:
        """Return once others used less than `limit` cores for half a second, or after `patience_s` seconds."""
        end = time.perf_counter() + patience_s
        while time.perf_counter() < end:
            self.restart()
            time.sleep(0.5)
            foreign = self.read()
            if foreign is None or foreign < limit:
                break


@dataclass(frozen=True)
class Sample:
    """One timed run: seconds of each case, peak memory, and what others used of the machine meanwhile."""

    seconds: dict[str, float]
    peak_bytes: int
    foreign: float | None

    def is_clean(self, limit: float) -> bool:
        """Tell whether other processes left the machine to us."""
        return self.foreign is None or self.foreign <= limit


def sampler(seconds_of: Callable[[int], float], case: str, device: str, limit: float) -> Callable[[], Sample]:
    """Return what takes one sample of a case; it warms up now and finds how many runs make one.

    `seconds_of(n)` runs n times and returns the mean seconds. A limit of infinity makes a sample of one run. On CUDA
    there is no guard: what is timed is the device, and the count of others' use is that of the whole host.
    """
    seconds_of(1)
    repeats = math.ceil(SAMPLE_SECONDS[device] / seconds_of(1)) if math.isfinite(limit) else 1
    is_guarded = math.isfinite(limit) and device == "cpu"
    load = ForeignLoad([])

    def take() -> Sample:
        if is_guarded:
            load.wait_for_idle(limit, patience_s=10)
        load.restart()
        seconds = seconds_of(repeats)
        return Sample({case: seconds}, 0, load.read() if is_guarded else None)

    return take


@dataclass
class Turns:
    """What one side gathered in its turns: the samples that count, and how many did not."""

    samples: list[Sample]
    dropped: int = 0


def take_turns(sides: dict[str, Callable[[], Sample]], wanted: int, limit: float) -> dict[str, Turns]:
    """Let the sides take one sample each in turn until all have `wanted` clean ones or took three times as many."""
    turns = {who: Turns([]) for who in sides}
    for _ in range(3 * wanted):
        for who, take in sides.items():
            if len(turns[who].samples) == wanted:
                continue
            sample = take()
            clean = sample.is_clean(limit)
            seconds = ", ".join(f"{value:.4g} s" for value in sample.seconds.values())
            note = "" if clean else f" (dropped: others used {sample.foreign:.2f} of a core)"
            print(f"{who}: {seconds}{note}", file=sys.stderr)
            if clean:
                turns[who].samples.append(sample)
            else:
                turns[who].dropped += 1
    return turns


def not_timed(case: str, turns: dict[str, Turns]) -> list[str]:
    """Return a line for everybody in a case who has not one sample that counts."""
    return [f"{case}: {who}: {its.dropped} samples, none clean" for who, its in turns.items() if not its.samples]


def rows(who: str, samples: list[Sample]) -> list[dict[str, Any]]:
    """Summarise the samples of one side, a row for each case."""
    result = []
    for case in samples[0].seconds:
        values = [sample.seconds[case] for sample in samples]
        figures = {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
        row: dict[str, Any] = {"case": case, "who": who} | {key: round(value, 6) for key, value in figures.items()}
        row["peak_bytes"] = max(sample.peak_bytes for sample in samples)
        row["samples"] = len(samples)
        result.append(row)
    return result


def table(result_rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a Markdown table, a line for each case."""
    lines = ["| case | who | median s | min | max | peak MB | n |", "|---|---|---|---|---|---|---|"]
    for row in result_rows:
        figures = " | ".join(f"{row[key]:.3f}" for key in ("median_s", "min_s", "max_s"))
        peak = row["peak_bytes"] / 1e6
        lines.append(f"| {row['case']} | {row['who']} | {figures} | {peak:.0f} | {row['samples']} |")
    return "\n".join(lines)


def write_result(path: Path, command: str, result_rows: list[dict[str, Any]], **more: Any) -> None:
    """Write the benchmark's JSON with the machine, the versions and the command that made it."""
    import json

    from fastppo.atomic import write_text

    document = {"machine": machine(), "versions": versions(), "command": command, "rows": result_rows} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_found(path: Path, command: str, found: dict[str, Any], foreign_limit: float) -> None:
    """Write all that a benchmark found, its rows among it, with the limit if there was one."""
    more = {name: value for name, value in found.items() if name != "rows"}
    limit = foreign_limit if math.isfinite(foreign_limit) else None
    write_result(path, command, found["rows"], foreign_limit=limit, **more)

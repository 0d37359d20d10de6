"""Time generation: tokens and their log-probs at temperature 1 from Llamas with random weights.

    python -m benchmarks.generate [--cases 15m 110m lognormal samples schedules cycles] [--dtypes fp32 bf16]
                                  [--peers transformers generate_batch llama.cpp] [--output FILE]

Compared with transformers' `generate` and `generate_batch` and with llama.cpp, which `make bench-peers` installs. Each
runs in a process of its own, one run each in turn, after the log-probs of its first run were held against whole
forwards in fp32. `schedules` and `cycles` check the engine without a clock.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fastppo
from benchmarks import generate_checks, measure, recompute
from benchmarks.generate_cases import PEERS, Case, cases_of
from benchmarks.roofline import Rates, measure_rates
from benchmarks.side import ROOT, Side
from benchmarks.step import write_model

LLAMA = ROOT / ".venv-generate" / "bin" / "python"
OURS = f"fastppo {fastppo.__version__}"
CASES = ["15m", "110m", "lognormal", "samples", "schedules", "cycles"]
# Ours against whole forwards in fp32: the largest difference in fp32, the mean in bf16. A peer whose largest is beyond
# PEER_BAR in fp32 runs another model.
BARS = {"fp32": ("max", 5e-5), "bf16": ("mean", 0.05)}
PEER_BARS = {"fp32": ("max", 1e-2), "bf16": ("mean", 0.05)}
# So many sequences of a contender's first run are held against whole forwards.
GATED = 32
NOTES = [
    "no response ends before its length; temperature 1, no top-k, no top-p",
    "gives: `tokens only` runs compute no log-probs, which is less work than ours",
    "logprob_gap: of the first run, at most 32 sequences, against whole forwards in fp32 of the same, rounded weights",
    "roofline_share: the least seconds by the roofline over the median; prefill and decode each take the longer of"
    " FLOPs and bytes, at the rates measured in this run; weights that stay in a cache can be read faster than that",
    "peak_bytes: high-water mark of the side's process, model and libraries included",
    "llama.cpp keeps keys and values in fp16, its default; generate_batch has as many KV blocks as the sequences need",
]


def commands(case: Case, peers: list[str]) -> dict[str, list[str]]:
    """Return the command line of everybody in a case, less its workload, by name."""
    found = {name: [sys.executable, "-m", "benchmarks.generate_side", name] for name in case.ours}
    for peer in peers if case.has_peers else []:
        for name in PEERS[peer]:
            script = [str(LLAMA), str(ROOT / "benchmarks" / "peers" / "llama_cpp_side.py"), name]
            found[name] = script if peer == "llama.cpp" else [sys.executable, "-m", "benchmarks.generate_side", name]
    return found


def verdict(side: Side, case: Case, model: Any, bars: dict[str, tuple[str, float]]) -> tuple[dict[str, float], str]:
    """Return how far the log-probs of a side's first run are off, if it gives any, and what is wrong with them."""
    responses, recorded = side.hello["responses"], side.hello["logprobs"]
    if [len(each) for each in responses] != [count for count in case.new_tokens for _ in range(case.samples)]:
        return {}, "generated other numbers of tokens than asked for"
    if recorded is None:
        return {}, ""
    prompts = [prompt for prompt in case.ids() for _ in range(case.samples)]
    some = slice(None, None, max(1, len(prompts) // GATED))
    gaps = recompute.gaps(model, prompts[some], responses[some], recorded[some])
    which, bar = bars[case.dtype]
    fault = "" if gaps[which] <= bar else f"log-probs are off by {gaps[which]:.1e} ({which}), over {bar}"
    return gaps, fault


def start_sides(case: Case, folder: Path, peers: list[str], found: dict[str, Any]) -> dict[str, Side]:
    """Start everybody whose log-probs are right; note in `found` who is not here and why. Exits if ours is wrong."""
    path = folder / "workload.json"
    path.write_text(json.dumps(case.workload(str(folder))))
    model = recompute.load(str(folder), case.dtype)
    sides = {}
    for name, command in commands(case, peers).items():
        try:
            if name.startswith("llama.cpp") and not LLAMA.exists():
                raise FileNotFoundError(f"{LLAMA.relative_to(ROOT)} is missing: run `make bench-peers`")
            side = Side(name, [*command, str(path)])
        except (OSError, RuntimeError) as error:
            if name in case.ours:
                raise
            found["absent"][f"{case}: {name}"] = str(error).strip().splitlines()[-1]
            print(f"not here: {name} ({found['absent'][f'{case}: {name}']})", file=sys.stderr)
            continue
        gaps, fault = verdict(side, case, model, BARS if name in case.ours else PEER_BARS)
        who = side.hello["who"]
        found["gate"].setdefault(str(case), {})[who] = {"logprob_gap": gaps, "fault": fault}
        print(f"gate: {case}: {who}: {gaps or 'no log-probs'} {fault}", file=sys.stderr)
        if fault:
            side.close()
            if name in case.ours:
                raise SystemExit(f"{case}: {who} {fault}: not timed")
        else:
            sides[who] = side
    return sides


def time_case(
    case: Case, sides: dict[str, Side], rates: Rates, found: dict[str, Any], samples: int, limit: float
) -> None:
    """Let the sides generate in turn; add a row each to `found`."""
    takers = {who: lambda side=side: side.iterate(case.tokens, limit) for who, side in sides.items()}
    turns = measure.take_turns(takers, samples, limit)
    found["not_timed"] += measure.not_timed(str(case), turns)
    for who, its in turns.items():
        if its.samples:
            (row,) = measure.rows(who, its.samples)
            row |= {
                "case": str(case),
                "gives": "tokens only" if "tokens only" in who else "tokens, log-probs",
                "tokens_per_s": round(case.tokens / row["median_s"], 1),
                "roofline_share": round(case.floor_seconds(rates) / row["median_s"], 4),
                "dropped": its.dropped,
            }
            found["rows"].append(row)


def count_shared(case: Case, sides: dict[str, Side]) -> dict[str, Any]:
    """Return the tokens read and the blocks held by each of ours, and what they are with and without sharing."""
    once = sum(case.prompts)
    expected = {
        "prefill_tokens": {"shared": once, "not shared": case.samples * once},
        "kv_blocks_peak": {"shared": case.kv_blocks(True), "not shared": case.kv_blocks(False)},
    }
    return {"expected": expected} | {who: side.hello["metrics"] for who, side in sides.items()}


def run_case(case: Case, arguments: argparse.Namespace, rates: Rates, found: dict[str, Any]) -> None:
    """Check and time everybody in one case."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), case.size)
        sides = start_sides(case, Path(folder), arguments.peers, found)
        if case.samples > 1:
            found["samples"][str(case)] = count_shared(case, sides)
        time_case(case, sides, rates, found, arguments.samples, arguments.foreign_limit)
        for side in sides.values():
            side.close()


def run_checks(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run what has no clock; a check whose model is not here is noted as absent."""
    wanted = [name for name in ("schedules", "cycles") if name in arguments.cases]
    folder = generate_checks.model_folder()
    if folder is None:
        found["absent"] |= dict.fromkeys(wanted, f"no {generate_checks.MODEL} in $FASTPPO_SHARED or ../shared")
        return
    if "schedules" in wanted:
        count = 3 if arguments.quick else 200
        found["schedules"] = {dtype: generate_checks.run_schedules(folder, dtype, count) for dtype in arguments.dtypes}
    if "cycles" in wanted:
        found["cycles"] = generate_checks.run_cycles(folder, 5 if arguments.quick else 50)


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, for each case, how many times the tokens per second of each other row our first one has."""
    found: dict[str, dict[str, float]] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["who"]: row["median_s"] for row in rows if row["case"] == case}
        if OURS in here:
            found[case] = {who: round(seconds / here[OURS], 2) for who, seconds in here.items() if who != OURS}
    return found


def markdown(found: dict[str, Any]) -> str:
    """Lay out the rows as a Markdown table, and what the checks found below it."""
    titles = "| case | who | tokens/s | median s | min | max | of roofline | peak MB | n | ours is faster, times |"
    lines, times_faster = [titles, "|---" * 10 + "|"], ratios(found["rows"])
    for row in found["rows"]:
        times = " | ".join(f"{row[key]:.3f}" for key in ("median_s", "min_s", "max_s"))
        rest = f"{row['roofline_share']:.2f} | {row['peak_bytes'] / 1e6:.0f} | {row['samples']}"
        faster = times_faster.get(row["case"], {}).get(row["who"], "")
        lines.append(f"| {row['case']} | {row['who']} | {row['tokens_per_s']:.0f} | {times} | {rest} | {faster} |")
    lines += [f"{case}: {shared}" for case, shared in found["samples"].items()]
    lines += [f"schedules, {dtype}: {gaps}" for dtype, gaps in found.get("schedules", {}).items()]
    if "cycles" in found:
        grown = {name: value for name, value in found["cycles"].items() if not isinstance(value, list)}
        lines.append(f"cycles: {grown}")
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--dtypes", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="(all)")
    parser.add_argument("--samples", type=int, default=5, help="samples per contender that must be clean")
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and no guard: shows only that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/generate-cpu.json)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.foreign_limit, arguments.samples = math.inf, 1
    elif arguments.output is None:
        arguments.output = ROOT / "benchmarks" / "results" / "generate-cpu.json"
    return arguments


def saver(arguments: argparse.Namespace, argv: list[str], found: dict[str, Any]) -> Callable[[], None]:
    """Return what writes the JSON of all that is in `found` by then, if it is to be written at all."""

    def save() -> None:
        if arguments.output:
            limit = arguments.foreign_limit if math.isfinite(arguments.foreign_limit) else None
            more = {name: value for name, value in found.items() if name != "rows"} | {"ratios": ratios(found["rows"])}
            command = " ".join(["python -m benchmarks.generate", *argv])
            measure.write_result(arguments.output, command, found["rows"], foreign_limit=limit, **more)

    return save


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON, which after every case holds what there is by then."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    found: dict[str, Any] = {"rows": [], "gate": {}, "samples": {}, "absent": {}, "not_timed": [], "notes": NOTES}
    rates = {dtype: measure_rates(dtype, arguments.quick) for dtype in arguments.dtypes}
    found["rates"] = {dtype: asdict(rate) for dtype, rate in rates.items()}
    save = saver(arguments, argv, found)
    for dtype in arguments.dtypes:
        for name in arguments.cases:
            for case in cases_of(name, dtype, arguments.quick):
                run_case(case, arguments, rates[dtype], found)
                save()
    run_checks(arguments, found)
    save()
    print(markdown(found), *found["not_timed"], sep="\n")
    if found["not_timed"] or any(row["samples"] < arguments.samples for row in found["rows"]):
        raise SystemExit("too few clean samples: stop what else runs, or raise --foreign-limit and say so")


if __name__ == "__main__":
    main()

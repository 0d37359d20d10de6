"""Time the draw of a token from each row of logits, with its log-prob: plain, top-k and top-p.

    python -m benchmarks.sampling [--sizes 32x32000 64x151936] [--dtypes fp32 bf16] [--output FILE]

Compared with torch's softmax + multinomial + gather, its exponential race, and transformers' top-k and top-p. First
every draw is checked in fp64: the token's interval of the cumulative distribution holds its random number, or for a
peer the token is a possible one, and the log-prob is right. Then all run in turn in this process.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastppo
from benchmarks import measure
from fastppo import ops, reference_sampling

ROOT = Path(__file__).resolve().parent.parent
OURS = f"fastppo {fastppo.__version__}"
BASELINE = f"torch {torch.__version__} softmax + multinomial + gather"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS: dict[str, dict[str, Any]] = {"plain": {}, "top-k 50": {"top_k": 50}, "top-p 0.9": {"top_p": 0.9}}
# In fp64, how far a sum of single-precision probabilities, and a log-prob, may be off.
INTERVAL_BAR, LOGPROB_BAR = 1e-5, 1e-5
NOTES = [
    "flat: normal logits; peaked: probabilities that fall as the rank to the power -1.6, with noise, in random order",
    "fastppo gives token, log-prob and entropy of the whole distribution, and the kept mass; all peers give token and"
    " log-prob, with top-k and top-p that of the truncated distribution, as transformers' generate does",
]

Draw = tuple[Tensor, Tensor]  # tokens, log-probs, (N,) each


@dataclass(frozen=True)
class Case:
    """What is drawn from: N rows of V logits, and what limits the draw."""

    rows: int
    vocabulary: int
    dtype: str
    shape: str
    limit: str

    def __str__(self) -> str:
        return f"{self.limit}, {self.shape}, {self.rows}x{self.vocabulary}, {self.dtype}"


def make_logits(case: Case, device: str) -> Tensor:
    """Return the logits (N, V) of a case, always the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case.rows, case.vocabulary, generator=generator)
    if case.shape == "peaked":
        ranks = torch.randperm(case.vocabulary, generator=generator) + 1.0
        logits = 0.5 * logits - 1.6 * ranks.log()
    return logits.to(device, DTYPES[case.dtype])


def draw_ours(logits: Tensor, limit: dict[str, Any]) -> Draw:
    """Draw as the engine does, requests 0, 1, ... at position 0."""
    requests = torch.arange(len(logits), device=logits.device)
    tokens, logprobs, _, _ = ops.sample_tokens(logits, 1, requests, torch.zeros_like(requests), **limit)
    return tokens, logprobs


def warped(logits: Tensor, limit: dict[str, Any]) -> Tensor:
    """Apply transformers' processors, which set what may not be drawn to -inf."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = logits.float()
    if "top_k" in limit:
        scores = TopKLogitsWarper(limit["top_k"])(None, scores)
    if "top_p" in limit:
        scores = TopPLogitsWarper(limit["top_p"])(None, scores)
    return scores


def draw_multinomial(logits: Tensor, limit: dict[str, Any]) -> Draw:
    """Draw as transformers' generate does."""
    probs = torch.softmax(warped(logits, limit), -1)
    tokens = torch.multinomial(probs, 1)
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


def draw_race(logits: Tensor, limit: dict[str, Any]) -> Draw:
    """Draw the winner of a race of exponential clocks, which spares the search of the cumulative distribution."""
    probs = torch.softmax(warped(logits, limit), -1)
    tokens = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


def contenders(case: Case) -> dict[str, Callable[[Tensor, dict[str, Any]], Draw]]:
    """Return who draws in this case, by name and version."""
    if case.limit == "plain":
        race = f"torch {torch.__version__} softmax + exponential race + gather"
        return {OURS: draw_ours, BASELINE: draw_multinomial, race: draw_race}
    version = measure.versions().get("transformers", "")
    name = f"transformers {version} {case.limit.split()[0]} + {BASELINE}"
    return {OURS: draw_ours, name: draw_multinomial}


def allowed_in_fp64(logp: Tensor, limit: dict[str, Any]) -> Tensor:
    """Return which tokens (N, V) may be drawn: by one sort, ties of the k-th included."""
    if "top_k" in limit:
        return logp >= logp.topk(limit["top_k"], -1).values[:, -1:]
    if "top_p" not in limit:
        return torch.ones_like(logp, dtype=torch.bool)
    ordered, order = logp.exp().sort(dim=-1, descending=True, stable=True)
    is_inside = ordered.cumsum(-1) - ordered < limit["top_p"]
    return torch.zeros_like(is_inside).scatter(-1, order, is_inside)


def fault(who: str, draw: Draw, logits: Tensor, limit: dict[str, Any]) -> str:
    """Return what is wrong with a draw, or nothing."""
    tokens, logprobs = draw[0][:, None], draw[1].double()
    logp = torch.log_softmax(logits.double(), -1)
    is_allowed = allowed_in_fp64(logp, limit)
    if not bool(is_allowed.gather(-1, tokens).all()):
        return "drew a token that may not be drawn"
    probs = (logp.exp() * is_allowed).div_((logp.exp() * is_allowed).sum(-1, keepdim=True))
    expected = (logp if who == OURS else probs.log()).gather(-1, tokens)[:, 0]
    gap = float((logprobs - expected).abs().max())
    if not gap <= LOGPROB_BAR:
        return f"log-probs are off by {gap:.1e}, over {LOGPROB_BAR}"
    if who == OURS:
        requests = torch.arange(len(logits), device=logits.device)
        uniform = reference_sampling.uniforms(1, requests, torch.zeros_like(requests))[:, None]
        above = probs.cumsum(-1).gather(-1, tokens)
        outside = torch.maximum(uniform - above, above - probs.gather(-1, tokens) - uniform)
        if float(outside.max()) > INTERVAL_BAR:
            return f"a token is {float(outside.max()):.1e} from where its random number lies, over {INTERVAL_BAR}"
    return ""


def sampler(draw: Callable[[], Draw], case: Case, arguments: argparse.Namespace) -> Callable[[], measure.Sample]:
    """Return what takes one sample."""
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None

    def seconds_of(repeats: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            draw()
        wait()
        return (time.perf_counter() - begin) / repeats

    return measure.sampler(seconds_of, str(case), arguments.device, arguments.foreign_limit)


def run_case(case: Case, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Check everybody, time who passed, and return a row each, and a line for each who has no clean sample.

    Exits if ours did not pass.
    """
    logits, limit = make_logits(case, arguments.device), LIMITS[case.limit]
    sides, faults = {}, {}
    for who, draw in contenders(case).items():
        faults[who] = fault(who, draw(logits, limit), logits, limit)
        if faults[who]:
            print(f"{case}: {who} {faults[who]}: not timed", file=sys.stderr)
        else:
            sides[who] = sampler(lambda draw=draw: draw(logits, limit), case, arguments)
    if faults[OURS]:
        raise SystemExit(f"{case}: {OURS} {faults[OURS]}")
    rows, by_side = [], measure.take_turns(sides, arguments.samples, arguments.foreign_limit)
    for who, turns in by_side.items():
        if turns.samples:
            rows += [row | {"dropped": turns.dropped, "peak_bytes": None} for row in measure.rows(who, turns.samples)]
    return rows, measure.not_timed(str(case), by_side)


def ratios(rows: list[dict[str, Any]], cases: list[Case]) -> list[dict[str, Any]]:
    """Return how many times faster than each peer we are in each case, and our time over that of plain sampling."""
    found = []
    for case in cases:
        here = {row["who"]: row["median_s"] for row in rows if row["case"] == str(case)}
        if OURS not in here:
            continue
        ours = here.pop(OURS)
        line: dict[str, Any] = {
            "case": str(case),
            "times_faster_than": {w: round(s / ours, 2) for w, s in here.items()},
        }
        plain = str(replace(case, limit="plain"))
        medians = [row["median_s"] for row in rows if (row["case"], row["who"]) == (plain, OURS)]
        found.append(line | {"over_plain": round(ours / medians[0], 3) if medians and case.limit != "plain" else None})
    return found


def markdown(rows: list[dict[str, Any]], ratio_lines: list[dict[str, Any]]) -> str:
    """Lay rows and ratios out as one Markdown table."""
    by_case = {line["case"]: line for line in ratio_lines}
    lines = ["| case | who | median ms | min | max | n | ours is faster, times | ours / plain |", "|---" * 8 + "|"]
    for row in rows:
        line = by_case.get(row["case"], {"times_faster_than": {}, "over_plain": None})
        times = " | ".join(f"{1e3 * row[key]:.3f}" for key in ("median_s", "min_s", "max_s"))
        over = line["over_plain"] if row["who"] == OURS else None
        figures = [str(row["samples"]), str(line["times_faster_than"].get(row["who"], "")), str(over or "")]
        lines.append(" | ".join(["| " + row["case"], row["who"], times, *figures]) + " |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", default=["32x32000", "64x151936"], help="rows x vocabulary")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", choices=["flat", "peaked"], default=["flat", "peaked"])
    parser.add_argument("--limits", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--samples", type=int, default=5, help="samples per contender that must be clean")
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no guard: shows only that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/sampling-<cpu|gpu>.json)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.foreign_limit, arguments.samples, arguments.sizes = math.inf, 1, ["3x1000"]
    elif arguments.output is None:
        kind = "gpu" if arguments.device == "cuda" else "cpu"
        arguments.output = ROOT / "benchmarks" / "results" / f"sampling-{kind}.json"
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON, which after every case holds what there is by then."""
    arguments = parse_arguments(argv)
    cases = [
        Case(*map(int, size.split("x")), dtype, shape, limit)
        for size in arguments.sizes
        for dtype in arguments.dtypes
        for shape in arguments.shapes
        for limit in arguments.limits
    ]
    limit = arguments.foreign_limit if math.isfinite(arguments.foreign_limit) else None
    command = " ".join(["python -m benchmarks.sampling", *(sys.argv[1:] if argv is None else argv)])
    rows: list[dict[str, Any]] = []
    not_timed: list[str] = []
    for case in cases:
        found, missing = run_case(case, arguments)
        rows += found
        not_timed += missing
        if arguments.output:
            more = {"foreign_limit": limit, "ratios": ratios(rows, cases), "not_timed": not_timed, "notes": NOTES}
            measure.write_result(arguments.output, command, rows, **more)
    print(markdown(rows, ratios(rows, cases)), *not_timed, sep="\n")
    if not_timed or any(row["samples"] < arguments.samples for row in rows):
        raise SystemExit("too few clean samples: stop what else runs, or raise --foreign-limit and say so")


if __name__ == "__main__":
    main()

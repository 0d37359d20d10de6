"""Time attention: training on packed sequences, decoding and prefill over a paged cache.

    python -m benchmarks.attention [--cases train decode] [--dtypes fp32 bf16] [--output FILE]

Compared with torch's scaled_dot_product_attention on padded tensors. First every output and every gradient is checked
against plain torch in fp64; then all run in turn in this process.
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
import torch.nn.functional as F
from torch import Tensor

import fastppo
from benchmarks import measure
from fastppo import reference_attention
from fastppo.ops.attention import BLOCK, paged_attention, paged_write, ragged_attention

ROOT = Path(__file__).resolve().parent.parent
OURS = f"fastppo {fastppo.__version__}"
PEER = f"torch {torch.__version__} scaled_dot_product_attention, padded"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the largest number of a tensor: what single precision, and results rounded to bfloat16, may differ from fp64.
BARS = {"fp32": 1e-5, "bf16": 2e-2}
NOTES = [
    "train: attention and the gradients by queries, keys and values; the peer's tensors are padded to the longest"
    " sequence, which costs it nothing here: neither padding nor unpadding is timed",
    "decode: one query for each sequence; the peer reads keys that lie side by side, and a mask where lengths differ",
    "prefill: all queries of the sequences over the paged cache, against causal attention",
]


@dataclass(frozen=True)
class Case:
    """Sequences of `shortest` to `longest` tokens, the first `shared` of which are the same in all."""

    kind: str
    sequences: int
    shortest: int
    longest: int
    heads: int
    kv_heads: int
    size: int
    shared: int = 0
    dtype: str = "fp32"

    def __str__(self) -> str:
        lengths = f"{self.shortest}-{self.longest}" if self.shortest < self.longest else str(self.longest)
        shared = f" ({self.shared} shared)" if self.shared else ""
        heads = f"{self.heads}/{self.kv_heads} x {self.size}"
        return f"{self.kind}, {self.sequences} x {lengths}{shared}, {heads}, {self.dtype}"

    def lengths(self) -> list[int]:
        """Return how many tokens each sequence has."""
        return torch.linspace(self.shortest, self.longest, self.sequences).long().tolist()  # type: ignore[no-any-return]


CASES = [
    Case("train", 32, 40, 80, 6, 6, 48),
    Case("train", 8, 512, 512, 6, 6, 48),
    Case("train", 32, 40, 80, 12, 12, 64),
    Case("train", 4, 400, 512, 8, 2, 128),
    Case("decode", 32, 50, 100, 6, 6, 48),
    Case("decode", 32, 300, 400, 6, 6, 48),
    Case("decode", 32, 512, 512, 6, 6, 48, shared=448),
    Case("decode", 32, 300, 400, 8, 2, 128),
    Case("prefill", 4, 512, 512, 6, 6, 48),
]
QUICK = [
    Case("train", 3, 4, 9, 2, 1, 8),
    Case("decode", 3, 4, 20, 2, 1, 8, shared=4),
    Case("prefill", 2, 9, 9, 2, 2, 8),
]

Run = Callable[[], tuple[Tensor, ...]]


def make_parts(case: Case) -> tuple[Tensor, ...]:
    """Return q (T, H, D), k and v (T, Hkv, D) of the packed sequences and an upstream gradient (T, H, D)."""
    generator = torch.Generator().manual_seed(0)
    lengths, tokens = case.lengths(), sum(case.lengths())
    heads = case.heads, case.kv_heads, case.kv_heads, case.heads
    parts = [torch.randn(tokens, count, case.size, generator=generator).to(DTYPES[case.dtype]) for count in heads]
    for part in parts[1:3]:
        for own in part.split(lengths):
            own[: case.shared] = part[: case.shared]
    return tuple(parts)


def offsets_of(lengths: list[int]) -> Tensor:
    """Return where each sequence begins (B + 1,) int32."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def queries_of(case: Case) -> list[int]:
    """Return how many of the last tokens of each sequence ask."""
    return [1] * case.sequences if case.kind == "decode" else case.lengths()


def last_queries(case: Case, q: Tensor) -> Tensor:
    """Return the queries (Q, H, D) of a case."""
    parts = zip(q.split(case.lengths()), queries_of(case), strict=True)
    return torch.cat([own[len(own) - count :] for own, count in parts])


def train_run(attend: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> Run:
    """Return what computes the attention and the gradients by all inputs."""
    inputs = [part.detach().requires_grad_() for part in inputs]

    def run() -> tuple[Tensor, ...]:
        out = attend(*inputs)
        return out, *torch.autograd.grad(out, inputs, upstream)

    return run


def our_run(case: Case) -> Run:
    """Return what runs the case with ours."""
    (q, k, v, upstream), lengths, scale = make_parts(case), case.lengths(), case.size**-0.5
    offsets = offsets_of(lengths)
    if case.kind == "train":
        return train_run(lambda q, k, v: ragged_attention(q, k, v, offsets, scale=scale), [q, k, v], upstream)
    width = -(-case.longest // BLOCK)
    order = torch.randperm(case.sequences * width, generator=torch.Generator().manual_seed(1))
    tables = order.view(case.sequences, width).int()
    tables[:, : case.shared // BLOCK] = tables[0, : case.shared // BLOCK]
    shape = len(order), case.kv_heads
    pool = q.new_zeros(*shape, case.size, BLOCK), q.new_zeros(*shape, BLOCK, case.size)
    sequences = torch.arange(case.sequences).repeat_interleave(torch.tensor(lengths)).int()
    positions = torch.cat([torch.arange(length) for length in lengths]).int()
    paged_write(k, v, pool, sequences, positions, tables)
    where = [last_queries(case, part) for part in (sequences, positions)]
    asked = last_queries(case, q)
    return lambda: (paged_attention(asked, pool, *where, tables, scale=scale),)


def peer_run(case: Case) -> Run:
    """Return what runs the case with torch on tensors (B, heads, longest, D)."""
    (q, k, v, upstream), lengths = make_parts(case), case.lengths()
    more: dict[str, Any] = {"scale": case.size**-0.5, "enable_gqa": case.heads != case.kv_heads}
    padded = [
        torch.nn.utils.rnn.pad_sequence(list(part.split(lengths)), batch_first=True).transpose(1, 2).contiguous()
        for part in (q, k, v, upstream)
    ]
    if case.kind == "train":
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, **more)  # noqa: E731
        return train_run(attend, padded[:3], padded[3])
    if case.kind == "prefill":
        return lambda: (F.scaled_dot_product_attention(*padded[:3], is_causal=True, **more),)
    asked = last_queries(case, q)[:, :, None]
    mask = torch.arange(case.longest) < torch.tensor(lengths)[:, None, None, None]
    more["attn_mask"] = mask if case.shortest < case.longest else None
    return lambda: (F.scaled_dot_product_attention(asked, *padded[1:3], **more),)


def packed(case: Case, part: Tensor) -> Tensor:
    """Return what the peer made (B, heads, queries, D) as packed rows."""
    counts = queries_of(case)
    return torch.cat([own[:, :count].transpose(0, 1) for own, count in zip(part, counts, strict=True)])


def truth(case: Case) -> tuple[Tensor, ...]:
    """Return the output, and in training the gradients, in fp64 by plain torch."""
    *inputs, upstream = (part.double() for part in make_parts(case))
    more: dict[str, Any] = {"key_offsets": offsets_of(case.lengths()), "scale": case.size**-0.5}
    offsets = offsets_of(queries_of(case))
    if case.kind == "train":
        attend = lambda q, k, v: reference_attention.ragged_attention(q, k, v, offsets, **more)  # noqa: E731
        return train_run(attend, inputs, upstream)()
    return (reference_attention.ragged_attention(last_queries(case, inputs[0]), *inputs[1:], offsets, **more),)


def fault(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], bar: float) -> str:
    """Return what is wrong with the results, or nothing."""
    for name, part, right in zip(("output", "dq", "dk", "dv"), found, expected, strict=False):
        gap = float((part.detach().double() - right.detach()).abs().max() / right.detach().abs().max())
        if not gap <= bar:
            return f"{name} is off by {gap:.1e} of its largest number, over {bar}"
    return ""


def sampler(run: Run, case: Case, arguments: argparse.Namespace) -> Callable[[], measure.Sample]:
    """Return what takes one sample."""

    def seconds_of(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats

    return measure.sampler(seconds_of, str(case), "cpu", arguments.foreign_limit)


def run_case(case: Case, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Check both, time them in turn, and return a row each and a line for each who has no clean sample."""
    expected, sides = truth(case), {OURS: our_run(case), PEER: peer_run(case)}
    results = {OURS: sides[OURS](), PEER: tuple(packed(case, part) for part in sides[PEER]())}
    for who, found in results.items():
        problem = fault(found, expected, BARS[case.dtype])
        if problem:
            raise SystemExit(f"{case}: {who}: {problem}")
    takers = {who: sampler(run, case, arguments) for who, run in sides.items()}
    by_side, rows = measure.take_turns(takers, arguments.samples, arguments.foreign_limit), []
    for who, turns in by_side.items():
        if turns.samples:
            rows += [row | {"dropped": turns.dropped, "peak_bytes": None} for row in measure.rows(who, turns.samples)]
    return rows, measure.not_timed(str(case), by_side)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return how many times faster than the peer we are in each case."""
    medians = {(row["case"], row["who"]): row["median_s"] for row in rows}
    both = [case for case, who in medians if who == OURS and (case, PEER) in medians]
    return {case: round(medians[case, PEER] / medians[case, OURS], 2) for case in both}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    kinds = ["train", "decode", "prefill"]
    parser.add_argument("--cases", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--samples", type=int, default=5, help="samples per contender that must be clean")
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no guard: shows only that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/attention-cpu.json)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.foreign_limit, arguments.samples = math.inf, 1
    elif arguments.output is None:
        arguments.output = ROOT / "benchmarks" / "results" / "attention-cpu.json"
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON, which after every case holds what there is by then."""
    arguments = parse_arguments(argv)
    chosen = [case for case in (QUICK if arguments.quick else CASES) if case.kind in arguments.cases]
    limit = arguments.foreign_limit if math.isfinite(arguments.foreign_limit) else None
    command = " ".join(["python -m benchmarks.attention", *(sys.argv[1:] if argv is None else argv)])
    rows: list[dict[str, Any]] = []
    not_timed: list[str] = []
    for case in chosen:
        for dtype in arguments.dtypes:
            found, missing = run_case(Case(**(vars(case) | {"dtype": dtype})), arguments)
            rows += found
            not_timed += missing
            if arguments.output:
                more = {"foreign_limit": limit, "times_faster": ratios(rows), "not_timed": not_timed, "notes": NOTES}
                measure.write_result(arguments.output, command, rows, **more)
    for row in rows:
        times = ", ".join(f"{key[:-2]} {1e3 * row[key]:.3f} ms" for key in ("median_s", "min_s", "max_s"))
        faster = f", {ratios(rows).get(row['case'])} times as fast as the peer" if row["who"] == OURS else ""
        print(f"{row['case']}: {row['who']}: {times}{faster}")
    print(*not_timed, sep="\n")
    if not_timed or any(row["samples"] < arguments.samples for row in rows):
        raise SystemExit("too few clean samples: stop what else runs, or raise --foreign-limit and say so")


if __name__ == "__main__":
    main()

"""Time a whole PPO iteration: generation, scoring and the update, on a Llama with random weights.

    python -m benchmarks.step [--peers] [--size 15m|110m] [--dtype fp32 bf16] [--iterations N] [--output FILE]

Every side runs in a process of its own and works only when asked, one iteration each in turn, so that all of them meet
the same machine. `--peers` adds the libraries that `make bench-peers` installed, in fp32.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.side import ROOT, Side

PEERS = {
    "trl-0.11.4": (".venv-trl0114", "trl_0_11_step.py"),
    "trl-1.12.0": (".venv-trl112", "trl_1_12_step.py"),
}
# hidden size, layers, heads, intermediate size, vocabulary
SIZES = {
    # Too small to say anything about speed; it shows in seconds that the benchmark itself works.
    "tiny": (64, 2, 2, 128, 512),
    "15m": (288, 6, 6, 768, 32000),
    "110m": (768, 12, 12, 2048, 32000),
}
NOTES = [
    "scoring: everything between the sampled tokens and the first optimiser epoch, as each library divides it",
    "trl-0.11.4 trains a value head on the policy and keeps one reference copy, as fastppo does; scores are given",
    "trl-1.12.0 has value and reward models of their own, of the policy's size: more work for the same iteration",
    "fastppo bf16: weights, forward and backward in bf16, fp32 masters in the optimiser; the peers compute in fp32",
    "peak_bytes: high-water mark of the side's process, models and libraries included",
]
# Log-probs against transformers' in fp32: the largest difference in fp32, the mean in bf16.
LOGPROB_BARS = {"fp32": 1e-4, "bf16": 0.05}
PROMPT_LENGTH, RESPONSE_LENGTH = 16, 64


def write_model(directory: Path, size: str) -> None:
    """Write the model that every side loads: a Llama of the size, tied embeddings, seed 0, with no end token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    hidden, layers, heads, intermediate, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


def workload_arguments(model_dir: str, arguments: argparse.Namespace) -> list[str]:
    """Spell the workload for a side's command line."""
    values = {
        "batch_size": arguments.batch_size,
        "prompt_length": PROMPT_LENGTH,
        "response_length": RESPONSE_LENGTH,
        "vocab_size": SIZES[arguments.size][-1],
        # One to warm up and as many again as could be dropped.
        "max_iterations": 1 + 3 * arguments.iterations,
    }
    return [model_dir, *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def peer_commands(arguments: argparse.Namespace, workload: list[str]) -> dict[str, list[str]]:
    """Return the command line of each peer that was asked for."""
    commands = {}
    for name, (environment, script) in PEERS.items():
        if name not in arguments.peers:
            continue
        python = ROOT / environment / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{name} is not installed: {environment} is missing. Run `make bench-peers` first.")
        commands[name] = [str(python), str(ROOT / "benchmarks" / "peers" / script), *workload]
    return commands


def our_command(workload: list[str], dtype: str) -> list[str]:
    """Return the command line of our side."""
    return [sys.executable, "-m", "benchmarks.fastppo_step", "--dtype", dtype, *workload]


def check_logprobs(workload: list[str], dtype: str) -> dict[str, float]:
    """Return how far our log-probs are from transformers'; exit when it is beyond the bar, for then no time counts."""
    side = Side(f"fastppo {dtype}", [*our_command(workload, dtype), "--gate"])
    side.close()
    gaps = {name: float(gap) for name, gap in side.hello["logprob_gaps"].items()}
    measured, bar = "max" if dtype == "fp32" else "mean", LOGPROB_BARS[dtype]
    if not gaps[measured] <= bar:
        raise SystemExit(
            f"{side.name}: log-probs differ from transformers' by {gaps}; {measured} over {bar}: not timed"
        )
    return gaps


def check_same_model(sides: list[Side], dtypes: list[str]) -> None:
    """Exit when the sides do not compute the same mean log-prob for the same tokens."""
    prints = {side.name: side.hello["fingerprint"] for side in sides}
    if max(prints.values()) - min(prints.values()) > max(LOGPROB_BARS[dtype] for dtype in dtypes):
        raise SystemExit(f"the sides do not run the same model: mean log-probs {prints}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=[], help="time these too, or all of them if none is named"
    )
    parser.add_argument("--no-fastppo", action="store_true", help="time the peers only")
    parser.add_argument("--size", choices=SIZES, default="15m")
    parser.add_argument("--dtype", nargs="+", choices=LOGPROB_BARS, default=["fp32"], help="of fastppo's computation")
    parser.add_argument("--batch_size", type=int, help="sequences per iteration (32; 16 for 110m)")
    parser.add_argument("--iterations", type=int, default=5, help="samples per side that must be clean")
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not arguments.peers and "--peers" in (sys.argv[1:] if argv is None else argv):
        arguments.peers = list(PEERS)
    arguments.batch_size = arguments.batch_size or (16 if arguments.size == "110m" else 32)
    return arguments


def start_sides(model_dir: str, arguments: argparse.Namespace, more: dict[str, Any]) -> list[Side]:
    """Check our log-probs and start everybody, warmed up; what was checked goes into `more`."""
    write_model(Path(model_dir), arguments.size)
    workload = workload_arguments(model_dir, arguments)
    commands = peer_commands(arguments, workload)
    if not arguments.no_fastppo:
        more["logprob_gaps"] = {dtype: check_logprobs(workload, dtype) for dtype in arguments.dtype}
        names = {dtype: "fastppo" if dtype == "fp32" else f"fastppo {dtype}" for dtype in arguments.dtype}
        commands = {name: our_command(workload, dtype) for dtype, name in names.items()} | commands
    sides = [Side(name, command) for name, command in commands.items()]
    check_same_model(sides, arguments.dtype)
    for side in sides:
        side.iterate(arguments.batch_size * RESPONSE_LENGTH, arguments.foreign_limit)
    return sides


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON."""
    arguments = parse_arguments(argv)
    limit, tokens = arguments.foreign_limit, arguments.batch_size * RESPONSE_LENGTH
    more: dict[str, Any] = {"notes": NOTES, "foreign_limit": limit if math.isfinite(limit) else None}
    with tempfile.TemporaryDirectory() as model_dir:
        sides = start_sides(model_dir, arguments, more)
        takers = {side.name: lambda side=side: side.iterate(tokens, limit) for side in sides}
        turns = measure.take_turns(takers, arguments.iterations, limit)
        for side in sides:
            side.close()
    rows = [row for who, its in turns.items() if its.samples for row in measure.rows(who, its.samples)]
    print(measure.table(rows))
    more["sides"] = {side.name: side.hello["versions"] | {"dropped": turns[side.name].dropped} for side in sides}
    if arguments.output:
        command_line = " ".join(["python -m benchmarks.step", *(sys.argv[1:] if argv is None else argv)])
        measure.write_result(arguments.output, command_line, rows, **more)
    if any(len(its.samples) < arguments.iterations for its in turns.values()):
        raise SystemExit("too few clean samples: stop what else runs, or raise --foreign-limit and say so")


if __name__ == "__main__":
    main()

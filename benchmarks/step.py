"""Time a whole PPO iteration: generation, scoring and the update, on a Llama with random weights.

    python -m benchmarks.step [--peers] [--size 15m|110m] [--iterations N] [--output FILE]

Every side runs in a process of its own and works only when asked, one iteration each in turn, so that all of them meet
the same machine. `--peers` adds the libraries that `make bench-peers` installed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure

ROOT = Path(__file__).resolve().parent.parent
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
    "peak_bytes: high-water mark of the side's process, models and libraries included",
]
LOGPROB_BAR = 1e-4
PROMPT_LENGTH, RESPONSE_LENGTH = 16, 64


class Side:
    """One library in its own process, which answers a line with the figures of one iteration."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        self.samples: list[measure.Sample] = []
        self.dropped = 0
        self.hello = self.read()

    def read(self) -> dict[str, Any]:
        """Return the next answer; raise with the end of the side's error output when it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self.process.wait()
        self._errors.seek(0)
        tail = "".join(self._errors.readlines()[-15:])
        raise RuntimeError(f"{self.name} ended with code {self.process.returncode}; its last words:\n{tail}")

    def iterate(self, tokens: int) -> measure.Sample:
        """Run one iteration; raise if it generated another number of tokens than `tokens`."""
        load = measure.ForeignLoad([self.process.pid])
        load.wait_for_idle(measure.FOREIGN_LIMIT, patience_s=10)
        load.restart()
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.read()
        foreign = load.read()
        if answer["tokens"] != tokens:
            raise RuntimeError(f"{self.name} generated {answer['tokens']} tokens, not {tokens}: not the same work")
        return measure.Sample(answer["seconds"], answer["peak_bytes"], foreign)

    def close(self) -> None:
        """Let the process end by closing its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


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
        max_position_embeddings=512,
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


def check_logprobs(workload: list[str]) -> float:
    """Return how far our log-probs are from transformers'; exit when it is beyond the bar, for then no time counts."""
    command = [sys.executable, "-m", "benchmarks.fastppo_step", "--gate", *workload]
    side = Side("fastppo", command)
    side.close()
    gap = float(side.hello["logprob_gap"])
    if not gap <= LOGPROB_BAR:
        raise SystemExit(f"fastppo's log-probs differ from transformers' by {gap:.2e}, over {LOGPROB_BAR}: not timed")
    return gap


def check_same_model(sides: list[Side]) -> None:
    """Exit when the sides do not compute the same mean log-prob for the same tokens."""
    prints = {side.name: side.hello["fingerprint"] for side in sides}
    if max(prints.values()) - min(prints.values()) > LOGPROB_BAR:
        raise SystemExit(f"the sides do not run the same model: mean log-probs {prints}")


def take_turns(sides: list[Side], arguments: argparse.Namespace) -> None:
    """Let the sides run one iteration each in turn until all have enough samples or the attempts are used up."""
    tokens = arguments.batch_size * RESPONSE_LENGTH
    for side in sides:
        side.iterate(tokens)
    for _ in range(3 * arguments.iterations):
        for side in sides:
            if len(side.samples) == arguments.iterations:
                continue
            sample = side.iterate(tokens)
            clean = sample.is_clean(arguments.foreign_limit)
            note = "" if clean else f" (dropped: others used {sample.foreign:.2f} of a core)"
            print(f"{side.name}: {sample.seconds['iteration']:.2f} s{note}", file=sys.stderr)
            if clean:
                side.samples.append(sample)
            else:
                side.dropped += 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=[], help="time these too, or all of them if none is named"
    )
    parser.add_argument("--no-fastppo", action="store_true", help="time the peers only")
    parser.add_argument("--size", choices=SIZES, default="15m")
    parser.add_argument("--batch_size", type=int, help="sequences per iteration (32; 16 for 110m)")
    parser.add_argument("--iterations", type=int, default=5, help="samples per side that must be clean")
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    if "--peers" in sys.argv and not arguments.peers:
        arguments.peers = list(PEERS)
    arguments.batch_size = arguments.batch_size or (16 if arguments.size == "110m" else 32)
    return arguments


def main() -> None:
    """Run the benchmark, print its table and write its JSON."""
    arguments = parse_arguments()
    sides: list[Side] = []
    more: dict[str, Any] = {"notes": NOTES, "foreign_limit": arguments.foreign_limit}
    with tempfile.TemporaryDirectory() as model_dir:
        write_model(Path(model_dir), arguments.size)
        workload = workload_arguments(model_dir, arguments)
        commands = peer_commands(arguments, workload)
        if not arguments.no_fastppo:
            more["logprob_gap"] = check_logprobs(workload)
            commands = {"fastppo": [sys.executable, "-m", "benchmarks.fastppo_step", *workload]} | commands
        for name, command in commands.items():
            sides.append(Side(name, command))
        check_same_model(sides)
        take_turns(sides, arguments)
        for side in sides:
            side.close()
    rows = [row for side in sides if side.samples for row in measure.rows(side.name, side.samples)]
    print(measure.table(rows))
    more["sides"] = {side.name: side.hello["versions"] | {"dropped": side.dropped} for side in sides}
    if arguments.output:
        command_line = " ".join(["python -m benchmarks.step", *sys.argv[1:]])
        measure.write_result(arguments.output, command_line, rows, **more)
    if any(len(side.samples) < arguments.iterations for side in sides):
        raise SystemExit("too few clean samples: stop what else runs, or raise --foreign-limit and say so")


if __name__ == "__main__":
    main()

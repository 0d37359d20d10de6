"""What every side of benchmarks/step.py and generate.py shares: talking to the driver, and the workload of a step.

Runs under each side's own environment: talking needs nothing but Python, a step's workload torch and tokenizers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PAD, EOS = 0, 2
LEARNING_RATE = 1e-5
PPO_EPOCHS = 4


@dataclass(frozen=True)
class Workload:
    """What one iteration does, in sequences and tokens."""

    model_dir: str
    batch_size: int
    prompt_length: int
    response_length: int
    vocab_size: int
    max_iterations: int

    def prompts(self, iteration: int) -> torch.Tensor:
        """Draw the prompts of one iteration, (batch_size, prompt_length), the same on every side."""
        import torch

        generator = torch.Generator().manual_seed(iteration)
        return torch.randint(3, self.vocab_size, (self.batch_size, self.prompt_length), generator=generator)

    def scores(self, iteration: int) -> list[torch.Tensor]:
        """Draw one score for each sample."""
        import torch

        return list(torch.randn(self.batch_size, generator=torch.Generator().manual_seed(1000 + iteration)))


def parse_workload(argv: list[str] | None = None) -> Workload:
    """Read the workload from the command line, as `Workload` spells it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    for name in ("batch_size", "prompt_length", "response_length", "vocab_size", "max_iterations"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return Workload(**vars(parser.parse_args(argv)))


def stub_tokenizer(vocab_size: int) -> Any:
    """Build a tokenizer that knows the ids of padding and end; nothing is decoded in the benchmark."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": PAD, "<unk>": 1, "<eos>": EOS} | {f"w{i}": i for i in range(3, vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def fingerprint(model: torch.nn.Module, workload: Workload) -> float:
    """Compute the mean log-prob of a few fixed tokens, to show that every side has the same weights."""
    import torch

    ids = workload.prompts(0)[:4]
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return float(logprobs.gather(-1, ids[:, 1:, None]).mean())


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    # A child's ru_maxrss starts at its parent's on Linux; the high-water mark of /proc does not.
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


class Channel:
    """One line in asks for an iteration, one JSON line out answers; whatever libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, message: dict[str, Any]) -> None:
        """Write one JSON line."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def ready(self, model: torch.nn.Module, workload: Workload, **versions: str) -> None:
        """Tell the driver that the model is loaded, with the versions in use and the model's fingerprint."""
        import torch

        versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
        threads = torch.get_num_threads()
        self.send({"versions": versions, "threads": threads, "fingerprint": fingerprint(model, workload)})

    def wait(self) -> None:
        """Block until the driver asks for the next iteration; exit when it has closed the pipe."""
        if not sys.stdin.readline():
            raise SystemExit(0)

    def answer(self, generation: float, scoring: float, update: float, total: float, tokens: int) -> None:
        """Send one iteration's stage times in seconds and the number of tokens generated."""
        seconds = {"generation": generation, "scoring": scoring, "update": update, "iteration": total}
        self.send({"seconds": seconds, "tokens": tokens, "peak_bytes": peak_bytes()})


def serve_step_api(trainer: Any, workload: Workload, channel: Channel, generation: dict[str, Any]) -> None:
    """Answer with iterations of a trainer that has TRL's `generate` and `step`, until the driver is done."""
    iteration = 0
    while True:
        channel.wait()
        start = time.perf_counter()
        queries = list(workload.prompts(iteration))
        responses = trainer.generate(queries, return_prompt=False, **generation)
        generated = time.perf_counter()
        stats = trainer.step(queries, responses, workload.scores(iteration))
        end = time.perf_counter()
        before_update = ("forward_pass", "compute_rewards", "compute_advantages")
        scoring = sum(float(stats[f"time/ppo/{stage}"]) for stage in before_update)
        update = float(stats["time/ppo/optimize_step"])
        channel.answer(generated - start, scoring, update, end - start, sum(len(r) for r in responses))
        iteration += 1

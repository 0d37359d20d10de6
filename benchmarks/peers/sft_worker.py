"""What both sides of benchmarks/sft.py share: documents, settings, and steps at the driver's pace.

Runs under each side's own environment: torch, transformers and tokenizers, no library that is measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import worker
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar

IGNORED = -100


@dataclass(frozen=True)
class Workload:
    """What a side trains on: batches of documents, the same everywhere."""

    model_dir: str
    case: str
    dtype: str
    batch_size: int
    longest: int
    vocab_size: int
    steps: int

    def rows(self) -> list[dict[str, list[int]]]:
        """Return the documents of all steps, in order: `equal` ones, or texts of an eighth of the length and more.

        Of `completions` only the second half is learned.
        """
        draw = torch.Generator().manual_seed(0)
        shape = (self.steps * self.batch_size,)
        lengths = torch.randint(self.longest // 8, self.longest + 1, shape, generator=draw)
        if self.case == "equal":
            lengths.fill_(self.longest)
        rows = []
        for length in lengths.tolist():
            ids = torch.randint(3, self.vocab_size, (length,), generator=draw).tolist()
            prompt = length // 2 if self.case == "completions" else 1
            rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
        return rows


def parse_workload() -> tuple[Workload, bool]:
    """Read the workload from the command line, and whether losses are asked for instead of times."""
    parser = argparse.ArgumentParser()
    for name in ("model_dir", "case", "dtype"):
        parser.add_argument(name)
    for name in ("batch_size", "longest", "vocab_size", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--gate", action="store_true")
    values = vars(parser.parse_args())
    is_gate = values.pop("gate")
    return Workload(**values), is_gate


def load(workload: Workload) -> Any:
    """Return the model, in fp32."""
    disable_progress_bar()
    warnings.simplefilter("ignore")
    return AutoModelForCausalLM.from_pretrained(workload.model_dir, dtype=torch.float32)


def settings(workload: Workload, folder: str) -> dict[str, Any]:
    """Return what both configurations are made with."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": workload.batch_size,
        "max_steps": workload.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": workload.dtype == "bf16",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Pace(TrainerCallback):
    """Let a trainer take one step for each request, and answer with its time; in a gate, note the losses only."""

    def __init__(self, workload: Workload, channel: worker.Channel, is_gate: bool) -> None:
        self.workload, self.channel, self.is_gate = workload, channel, is_gate
        self.lengths = [len(row["input_ids"]) for row in workload.rows()]
        self.losses: list[float] = []
        self.start = 0.0

    def watch(self, trainer: Any) -> None:
        """Note the losses of the trainer's steps, and join its callbacks."""
        step = trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

        trainer.training_step = watched
        trainer.add_callback(self)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first request, if there are any."""
        self.next_request()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Answer and wait for the next request."""
        end, size = time.perf_counter(), self.workload.batch_size
        if not self.is_gate:
            tokens = sum(self.lengths[(state.global_step - 1) * size : state.global_step * size])
            seconds = {"1,000 tokens": 1000 * (end - self.start) / tokens}
            self.channel.send({"seconds": seconds, "tokens": tokens, "peak_bytes": worker.peak_bytes()})
            self.next_request()

    def next_request(self) -> None:
        """Block until the driver asks for a step, and start its clock."""
        if not self.is_gate:
            self.channel.wait()
        self.start = time.perf_counter()


def serve(trainer: Any, workload: Workload, channel: worker.Channel, is_gate: bool, **versions: str) -> None:
    """Train at the driver's pace; a gate trains at once and sends the losses."""
    if trainer.model.is_gradient_checkpointing:
        raise RuntimeError("gradient checkpointing is on: not the same work")
    pace = Pace(workload, channel, is_gate)
    pace.watch(trainer)
    if is_gate:
        trainer.train()
        channel.send({"losses": pace.losses})
        return
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    channel.send({"versions": versions, "threads": torch.get_num_threads()})
    trainer.train()

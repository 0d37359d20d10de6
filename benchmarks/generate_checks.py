"""What benchmarks/generate.py checks without a clock: log-probs under any schedule, and memory over many cycles."""

import gc
import os
import random
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks import recompute
from benchmarks.side import ROOT

MODEL = "models/stories260k"


def model_folder() -> Path | None:
    """Return the small real model beside the project, or None where it is not."""
    shared = os.environ.get("FASTPPO_SHARED")
    folder = (Path(shared) if shared else ROOT.parent / "shared") / MODEL
    return folder if (folder / "config.json").exists() else None


def schedule(random_numbers: random.Random, vocabulary: int) -> dict[str, Any]:
    """Draw rows, prompts, limits and samples of one call."""
    count, samples = random_numbers.randint(1, 9), random_numbers.choice([1, 1, 2, 3])
    lengths = [random_numbers.randint(1, 70) for _ in range(count)]
    return {
        "max_rows": random_numbers.randint(1, 12),
        "prompts": [[random_numbers.randrange(3, vocabulary) for _ in range(length)] for length in lengths],
        "limits": [random_numbers.randint(1, 50) for _ in range(count)],
        "n": samples,
    }


def run_schedules(folder: Path, dtype: str, count: int) -> dict[str, float]:
    """Generate by `count` random schedules; return how far recorded log-probs are from those of others.

    `max` and `mean`: transformers' whole forwards in the same dtype; `update_max` and `update_mean`: the forward passes
    that an update makes.
    """
    from transformers import AutoModelForCausalLM

    from fastppo import Engine, SamplingConfig

    truth = recompute.load(str(folder), dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=recompute.DTYPES[dtype]).eval()
    numbers = random.Random(0)
    largest, means, tokens = 0.0, 0.0, 0
    updates: list[torch.Tensor] = []
    for seed in range(count):
        plan = schedule(numbers, model.config.vocab_size)
        engine = Engine(model, max_rows=plan["max_rows"], seed=seed)
        sampling = SamplingConfig(max_new_tokens=max(plan["limits"]))
        rollout = engine.generate(plan["prompts"], sampling, n=plan["n"], max_new_tokens=plan["limits"])
        gaps = recompute.gaps(truth, rollout.queries, rollout.responses, rollout.split(rollout.logprobs))
        scores = engine.score(list(rollout.queries), list(rollout.responses))
        updates.append((scores.logprobs - rollout.logprobs).abs())
        largest, tokens = max(largest, gaps["max"]), tokens + len(rollout.tokens)
        means += gaps["mean"] * len(rollout.tokens)
    ours = torch.cat(updates)
    whole = {"schedules": count, "tokens": tokens, "max": largest, "mean": means / tokens}
    return whole | {"update_max": float(ours.max()), "update_mean": float(ours.mean())}


def resident_bytes() -> int:
    """Return the memory that this process has in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    """Count the tensors that something still refers to."""
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def growth(series: list[int]) -> int:
    """Return how much the median of the last fifth is above that of the second, the first being for warming up."""
    fifth = max(1, len(series) // 5)
    return int(statistics.median(series[-fifth:]) - statistics.median(series[fifth : 2 * fifth]))


def run_cycles(folder: Path, count: int) -> dict[str, Any]:
    """Generate and update `count` times; return memory and live tensors after each cycle, and how they grew."""
    from transformers import AutoTokenizer

    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    batch = 8
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = PPOTrainer(PPOConfig(batch_size=batch, mini_batch_size=4, ppo_epochs=1), model, tokenizer=tokenizer)
    numbers = random.Random(0)
    memory, tensors = [], []
    for _ in range(count):
        queries = [
            torch.tensor([1] + [numbers.randrange(3, 500) for _ in range(numbers.randint(3, 40))]) for _ in range(batch)
        ]
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=numbers.randint(8, 48))
        trainer.step(queries, responses, [torch.tensor(numbers.random()) for _ in range(batch)])
        del queries, responses
        tensors.append(live_tensors())
        memory.append(resident_bytes())
    return {
        "cycles": count,
        "resident_bytes": memory,
        "resident_growth_bytes": growth(memory),
        "live_tensors": tensors,
        "live_tensor_growth": growth(tensors),
    }

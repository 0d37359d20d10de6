"""How much of the returns each critic explains, on one small task; nothing is timed.

    python -m benchmarks.critics [--iterations N] [--seeds N] [--output FILE]

A random Llama with an adapter learns to say one token often. The score of a response counts that token, so the tokens
so far tell a part of it. Afterwards each critic's values are compared with the scores of fresh responses, token
by token: explained variance = 1 - var(score - value) / var(score). There is no penalty and no discount, so that a
token's return is its response's score.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure

CRITICS: dict[str, dict[str, Any]] = {
    "head": {},
    "head, detached": {"critic_detach": True},
    "adapter": {"critic": "adapter"},
    "full": {"critic": "full"},
    "head, 5 steps of warm-up": {"critic_warmup_steps": 5},
    "adapter, 5 steps of warm-up": {"critic": "adapter", "critic_warmup_steps": 5},
}
TARGET, VOCABULARY, LENGTH, BATCH = 7, 40, 16, 64


def make_trainer(seed: int, settings: dict[str, Any]) -> Any:
    """Make a trainer of the same random model and adapter for every critic."""
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 64, "initializer_range": 0.1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **size, **ends))
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=adapter)
    config = {"batch_size": BATCH, "mini_batch_size": BATCH, "learning_rate": 3e-4, "critic_learning_rate": 1e-2}
    config |= {
        "init_kl_coef": 0.0,
        "adap_kl_ctrl": False,
        "seed": seed,
        "rescore_every": 10**6,
        "cliprange_value": 2.0,
        "lam_critic": 1.0,
    }
    return PPOTrainer(PPOConfig(**config, **settings), model)


def generate(trainer: Any, seed: int) -> tuple[list[Tensor], Any, list[float]]:
    """Return prompts, responses and their scores."""
    draw = torch.Generator().manual_seed(seed)
    prompts = list(torch.randint(1, VOCABULARY, (BATCH, 4), generator=draw))
    rollout = trainer.generate(prompts, return_prompt=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    return prompts, rollout, [float((response == TARGET).sum()) for response in rollout]


def explained_variance(trainer: Any, seed: int) -> tuple[float, float]:
    """Return the explained variance on fresh responses, and their mean score."""
    from fastppo.trainers.evaluate import evaluate
    from fastppo.trainers.samples import check_samples

    prompts, rollout, scores = generate(trainer, seed)
    place = {
        "vocabulary": VOCABULARY,
        "context": None,
        "end_ids": (),
        "temperature": 1.0,
        "device": torch.device("cpu"),
    }
    samples = check_samples(prompts, rollout, torch.tensor(scores), None, **place)
    kind = trainer.config.critic
    evaluation = evaluate(
        trainer.model, trainer.reference, samples, rollout, max_size=BATCH, exact_kl=False, critic=kind
    )
    returns = torch.tensor(scores).repeat_interleave(samples.offsets.diff())
    return float(1 - (returns - evaluation.values).var() / returns.var()), statistics.fmean(scores)


def run(name: str, seed: int, iterations: int) -> dict[str, Any]:
    """Train with one critic; return what it explains at the end, and the mean score."""
    trainer = make_trainer(seed, CRITICS[name])
    for step in range(iterations):
        trainer.step(*generate(trainer, 1000 * seed + step))
    explained, score = explained_variance(trainer, 10**6 + seed)
    return {"case": name, "who": "fastppo", "seed": seed, "explained_variance": explained, "mean_score": score}


def table(rows: list[dict[str, Any]]) -> str:
    """Lay the means over the seeds out as a Markdown table, with the smallest and largest of each."""
    lines = ["| critic | explained variance | mean score |", "|---|---|---|"]
    for name in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == name]
        cells = []
        for column in ("explained_variance", "mean_score"):
            values = [row[column] for row in own]
            cells.append(f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run every critic with every seed, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    rows = [run(name, seed, arguments.iterations) for name in CRITICS for seed in range(arguments.seeds)]
    print(table(rows))
    if arguments.output:
        command = " ".join(["python -m benchmarks.critics", *(sys.argv[1:] if argv is None else argv)])
        measure.write_result(arguments.output, command, rows, iterations=arguments.iterations)


if __name__ == "__main__":
    main()

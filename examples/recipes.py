"""What the examples share: flags, how a policy is loaded, PPO's settings for small models, two rewards, a measure."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fastppo import AutoModelForCausalLMWithValueHead, Engine, PPOConfig


def read_flags(description: str, given: list[str] | None, **defaults: Any) -> argparse.Namespace:
    """Parse flags that are named like `defaults` and of their types, None being an optional text."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in defaults.items():
        kind = {type(None): str, bool: lambda text: {"true": True, "false": False}[text.lower()]}.get(type(default))
        parser.add_argument(f"--{name}", type=kind or type(default), default=default, help=" ")
    return parser.parse_args(given)


def ppo_config(args: argparse.Namespace, **settings: Any) -> PPOConfig:
    """Return PPO's settings for a small model, all of whose weights are trained, but for those given here."""
    usual = {
        "mini_batch_size": args.batch_size,
        "ppo_epochs": 3,
        "lam": 1.0,
        "critic_learning_rate": 1e-2,  # the value head starts at random, and is one vector
        "lr_scheduler_type": "linear",
        "adap_kl_ctrl": False,
        "vf_coef": 0.01,  # the critic shares a small trunk: a larger share of it would drown the policy's gradient
    }
    flags = {name: getattr(args, name) for name in ("seed", "batch_size", "learning_rate", "init_kl_coef")}
    return PPOConfig(**(usual | flags | settings))


def run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `PPOTrainer.train` that come from flags."""
    names = ("max_steps", "max_new_tokens", "output_dir")
    return {name: getattr(args, name) for name in names} | {"overwrite": True}


def report(folder: str | Path, **more: float) -> dict[str, Any]:
    """Print what a run did to its held-out prompts; return its summary with `more` in it."""
    path = Path(folder) / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | more
    path.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    for name in [name.removesuffix("_before") for name in summary if name.endswith("_before")]:
        print(f"{name:>12}: {summary[name + '_before']:8.3f} -> {summary[name + '_after']:8.3f}")
    return summary


def load_policy(args: argparse.Namespace) -> AutoModelForCausalLMWithValueHead:
    """Load the model to train: all of it, or with a `lora_rank` an adapter alone, whose base may be in 8 bits."""
    lora = None
    if args.lora_rank:
        from peft import LoraConfig

        lora = LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    torch.manual_seed(args.seed)  # the value head and the adapter start at random
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        args.model_name_or_path, peft_config=lora, load_in_8bit=args.load_in_8bit
    )


def variety(completions: list[str]) -> list[float]:
    """Each completion's share in the batch's distinct word pairs: low for what many others say too."""
    pairs = [list(pairwise(text.split())) for text in completions]
    counts = Counter(pair for text in pairs for pair in text)
    return [sum(1 / counts[pair] for pair in text) / max(1, len(text)) for text in pairs]


def long_enough(completions: list[str], words: int = 12) -> list[float]:
    """1 for each completion of at least so many words, its share of them for a shorter one."""
    return [min(1.0, len(text.split()) / words) for text in completions]


def perplexity(engine: Engine, prompt_ids: Sequence[Any], completion_ids: Sequence[Any]) -> float:
    """Return how many tokens the engine's model hesitates between, on average, where the completions took one."""
    return math.exp(-engine.score(prompt_ids, completion_ids).logprobs.double().mean().item())

"""Teach a language model to continue texts in a good mood: PPO with VADER sentiment as the reward.

    python examples/sentiment.py --model_name_or_path MODEL [--dataset_name FILE_OR_HUB_ID] [--seed N]

Without a dataset the prompts are cut from texts that the model itself writes.
"""

import argparse
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from fastppo import AutoModelForCausalLMWithValueHead, Engine, PPOConfig, PPOTrainer, SamplingConfig

HELD_OUT = 256


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="lvwerra/gpt2-imdb")
    parser.add_argument("--dataset_name", help="file (.jsonl, .csv, .txt) or hub id with a `text` column")
    parser.add_argument("--num_prompts", type=int, default=768)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--max_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--init_kl_coef", type=float, default=0.05)
    parser.add_argument("--variety", type=float, default=0.4, help="weight of the reward for not repeating others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="runs/sentiment")
    return parser.parse_args(arguments)


def cut_prompts(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[list[int]]:
    """Return pieces of texts, as token ids: of the dataset's, or of what the model writes by itself."""
    count = args.num_prompts + HELD_OUT
    if args.dataset_name is None:
        start = [[tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]] * count
        length = args.prompt_tokens
        sampling = SamplingConfig(max_new_tokens=length, min_new_tokens=length, seed=args.seed)
        rollout = Engine(model, tokenizer).generate(start, sampling)
        return [[*query.tolist(), *response.tolist()] for query, response in zip(rollout.queries, rollout, strict=True)]
    from datasets import load_dataset

    kind = {"jsonl": "json", "json": "json", "csv": "csv", "txt": "text"}.get(args.dataset_name.rsplit(".", 1)[-1])
    data = load_dataset(kind, data_files=args.dataset_name) if kind else load_dataset(args.dataset_name)
    texts = data["train"].shuffle(seed=args.seed)["text"][: count * 2]
    ids = [tokenizer(text)["input_ids"][: args.prompt_tokens] for text in texts]
    return [prompt for prompt in ids if len(prompt) == args.prompt_tokens][:count]


ANALYZER = SentimentIntensityAnalyzer()


def sentiment(completions: list[str]) -> list[float]:
    """VADER's compound score of each completion, from -1 to 1."""
    return [ANALYZER.polarity_scores(text)["compound"] for text in completions]


def variety(completions: list[str]) -> list[float]:
    """Each completion's share in the batch's distinct word pairs: low for what many others say too."""
    pairs = [list(pairwise(text.split())) for text in completions]
    counts = Counter(pair for text in pairs for pair in text)
    return [sum(1 / counts[pair] for pair in text) / max(1, len(text)) for text in pairs]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model_name_or_path)
    prompts = cut_prompts(args, model, tokenizer)
    config = PPOConfig(
        seed=args.seed,
        batch_size=args.batch_size,
        mini_batch_size=args.batch_size,
        ppo_epochs=3,
        lam=1.0,
        learning_rate=args.learning_rate,
        critic_learning_rate=1e-2,  # the value head starts at random, and is one vector
        lr_scheduler_type="linear",
        init_kl_coef=args.init_kl_coef,
        adap_kl_ctrl=False,
        vf_coef=0.01,  # the critic shares a small trunk: a larger share of it would drown the policy's gradient
    )
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)
    trainer.train(
        prompts[HELD_OUT:],
        [sentiment, variety],
        reward_weights=[1.0, args.variety],
        max_steps=args.max_steps,
        max_new_tokens=args.max_new_tokens,
        eval_prompts=prompts[:HELD_OUT],
        eval_reward=sentiment,
        output_dir=args.output_dir,
        overwrite=True,
    )
    summary = json.loads((Path(args.output_dir) / "summary.json").read_text())
    for name in ("reward", "kl", "distinct_2", "length"):
        print(f"{name:>10}: {summary[name + '_before']:7.3f} -> {summary[name + '_after']:7.3f}")
    return summary


if __name__ == "__main__":
    main()

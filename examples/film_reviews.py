"""Film reviews on real data, from nothing: a language model, two classifiers that share no review, and PPO.

    python examples/film_reviews.py [--data FILE] [--seed N] [--output_dir DIR]

The first classifier's logit is the reward. The second, of another kind and taught by other reviews, is the judge: it
says what share of the reviews written to held-out openings is praise, and takes no part in the training.
"""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from film_data import WordJudge, divide, find_reviews, openings
from film_models import train_classifier, train_language_model
from recipes import long_enough, perplexity, ppo_config, read_flags, report, run_settings, variety
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastppo import AutoModelForCausalLMWithValueHead, Engine, PPOTrainer

FLAGS = {
    "data": None,  # .jsonl with `text` and `label`, 1 for praise and 0 for blame
    "epochs": 8,  # of the language model's training
    "passes": 2,  # of the classifier's
    "vocabulary": 6000,
    "held_out": 512,  # openings to measure on, at most
    "max_steps": 72,
    "batch_size": 128,
    "max_new_tokens": 32,
    "learning_rate": 5e-4,
    "init_kl_coef": 0.2,
    "variety": 1.5,  # weight of the reward for not repeating others
    "length": 1.5,  # of the one for at least twelve words
    "seed": 0,
    "output_dir": "runs/film_reviews",
}


def improve(args: Namespace, training: list[str], held_out: list[str], judge: WordJudge) -> list[float]:
    """Train by PPO; return the perplexities, under the model it started from, of what it writes before and after."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.written)
    tokenizer = AutoTokenizer.from_pretrained(args.written)
    first, perplexities = Engine(AutoModelForCausalLM.from_pretrained(args.written), tokenizer), []

    def praise(prompts: list[str], completions: list[str], prompt_ids: Any, completion_ids: Any) -> list[float]:
        perplexities.append(perplexity(first, prompt_ids, completion_ids))
        return judge([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])

    PPOTrainer(ppo_config(args, missing_eos_penalty=0.5), model, tokenizer=tokenizer).train(
        training,
        [AutoModelForSequenceClassification.from_pretrained(args.classifier), variety, long_enough],
        reward_weights=[1.0, args.variety, args.length],
        eval_prompts=held_out,
        eval_reward=praise,
        **run_settings(args),
    )
    return perplexities


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, began = read_flags(__doc__, arguments, **FLAGS), time.perf_counter()
    args.written, args.classifier = (Path(args.output_dir) / name for name in ("language_model", "classifier"))
    rows = divide(find_reviews(args.data, args.seed), args.seed)
    everything, judge = [*rows.first, *rows.second], WordJudge(rows.second)
    train_language_model(everything, args.written, args.epochs, args.vocabulary, args.seed)
    train_classifier(args.written, rows.first, args.classifier, args.passes, args.seed)
    taught = time.perf_counter() - began
    before, after = improve(args, openings(everything), openings(rows.held_out)[: args.held_out], judge)
    return report(
        args.output_dir,
        perplexity_before=before,
        perplexity_after=after,
        judge_accuracy=judge.accuracy([*rows.held_out, *rows.first]),
        seconds_models=taught,
        seconds=time.perf_counter() - began,
    )


if __name__ == "__main__":
    main()

"""Sentiment on demand: the word in front of a prompt says in which mood it should go on.

    python examples/sentiment_control.py [--model_name_or_path MODEL] [--reward_model MODEL] [--dataset_name FILE_OR_ID]

One prompt in three begins with [positive], [neutral] or [negative]. The classifier sees neither word nor wish: its
logit x of the text pays as x, as 4 - 2|x| or as -x. The models of examples/film_reviews.py serve too, with its data.
"""

from typing import Any

import torch
from recipes import load_policy, ppo_config, read_flags, report, run_settings
from sentiment import FLAGS, cut_prompts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastppo import PPOTrainer
from fastppo.rewards import ModelReward

WISHES = ("positive", "neutral", "negative")
OWN = {
    "reward_model": "lvwerra/distilbert-imdb",
    "prompt_tokens": 5,
    "max_new_tokens": 20,
    "max_steps": 100,
    "output_dir": "runs/sentiment_control",
}


def wished(logits: torch.Tensor, wishes: list[str]) -> list[float]:
    """Return the reward for the logits (B,) of texts that should be positive, neutral or negative."""
    paid = {"positive": logits, "neutral": 4 - 2 * logits.abs(), "negative": -logits}
    return [paid[wish][row].item() for row, wish in enumerate(wishes)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = read_flags(__doc__, arguments, **(FLAGS | OWN))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = load_policy(args)
    classify = ModelReward(AutoModelForSequenceClassification.from_pretrained(args.reward_model))
    texts = tokenizer.batch_decode(cut_prompts(args, model, tokenizer), skip_special_tokens=True)
    rows = [
        {"prompt": f"[{wish}] {text}", "opening": text, "wish": wish}
        for text, wish in zip(texts, WISHES * len(texts), strict=False)
    ]

    def reward(completions: list[str], opening: list[str], wish: list[str]) -> list[float]:
        return wished(classify(opening, completions), wish)

    config = ppo_config(args)
    PPOTrainer(config, model, tokenizer=tokenizer).train(
        rows[args.held_out :], reward, eval_prompts=rows[: args.held_out], **run_settings(args)
    )
    return report(args.output_dir)


if __name__ == "__main__":
    main()

"""A less toxic GPT-J: a model of six billion weights, whose lower layers policy and reference share.

    python examples/toxicity.py [--num_shared_layers N | --lora_rank R] [--dataset_name FILE_OR_HUB_ID]

Prompts are openings of toxic texts, and the reward is the logit with which a classifier calls the text harmless. With
`lora_rank` nothing but an adapter is trained, and there is no second set of weights at all. A file of one's own has
the columns `text` and `label`, 0 for what should be avoided, as film reviews have them.
"""

from argparse import Namespace
from itertools import islice
from typing import Any

import torch
from film_data import find_reviews
from recipes import load_policy, ppo_config, read_flags, report, run_settings
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastppo import PPOTrainer, create_reference_model
from fastppo.rewards import ModelReward

LARGE = {"critic_learning_rate": 1e-4, "vf_coef": 0.1}  # a wide trunk bears more of the critic's gradient
FLAGS = {
    "model_name_or_path": "EleutherAI/gpt-j-6b",
    "reward_model": "facebook/roberta-hate-speech-dynabench-r4-target",
    "harmless_label": 0,
    "dataset_name": "allenai/real-toxicity-prompts",
    "num_shared_layers": 20,
    "lora_rank": 0,
    "load_in_8bit": False,
    "num_prompts": 4096,
    "held_out": 256,
    "prompt_tokens": 30,
    "max_new_tokens": 30,
    "max_steps": 100,
    "batch_size": 32,
    "mini_batch_size": 4,
    "learning_rate": 1.5e-5,
    "init_kl_coef": 0.05,
    "seed": 0,
    "output_dir": "runs/toxicity",
}


def toxic_texts(args: Namespace) -> list[str]:
    """Return texts to begin: those of the hub's data set with a toxicity above 0.3, or a file's of label 0."""
    if args.dataset_name.endswith(".jsonl"):
        return [row["text"] for row in find_reviews(args.dataset_name, args.seed) if row["label"] == 0]
    from datasets import load_dataset

    rows = load_dataset(args.dataset_name, split="train").shuffle(seed=args.seed)
    toxic = (row for row in rows if (row["prompt"]["toxicity"] or 0) > 0.3)
    return [row["prompt"]["text"] + row["continuation"]["text"] for row in islice(toxic, args.num_prompts)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = read_flags(__doc__, arguments, **FLAGS)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = load_policy(args)
    reference = None if args.lora_rank else create_reference_model(model, args.num_shared_layers)
    classifier = AutoModelForSequenceClassification.from_pretrained(args.reward_model)
    config = ppo_config(args, **LARGE, mini_batch_size=args.mini_batch_size, bf16=torch.cuda.is_available())
    ids = [tokenizer(text)["input_ids"][: args.prompt_tokens] for text in toxic_texts(args)[: args.num_prompts]]
    PPOTrainer(config, model, reference, tokenizer=tokenizer).train(
        ids[args.held_out :],
        ModelReward(classifier, label=args.harmless_label),
        eval_prompts=ids[: args.held_out],
        **run_settings(args),
    )
    return report(args.output_dir)


if __name__ == "__main__":
    main()

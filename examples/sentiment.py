"""Teach a language model to continue texts in a good mood: PPO with the logit of a classifier, or VADER, as the reward.

    python examples/sentiment.py [--model_name_or_path MODEL] [--reward_model MODEL] [--dataset_name FILE_OR_HUB_ID]

By default GPT-2 on film reviews; `--reward_model lvwerra/distilbert-imdb` is the classifier for it, VADER needs none.
Without a dataset the prompts are cut from texts that the model itself writes.
"""

from argparse import Namespace
from typing import Any

from recipes import load_policy, ppo_config, read_flags, report, run_settings, variety
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from fastppo import Engine, PPOTrainer, SamplingConfig

ANALYZER = SentimentIntensityAnalyzer()
FLAGS = {
    "model_name_or_path": "lvwerra/gpt2-imdb",
    "reward_model": None,
    "dataset_name": None,  # file (.jsonl, .csv, .txt) or hub id with a `text` column
    "num_prompts": 768,
    "held_out": 256,
    "prompt_tokens": 32,
    "max_new_tokens": 32,
    "max_steps": 50,
    "batch_size": 64,
    "learning_rate": 5e-4,
    "init_kl_coef": 0.05,
    "variety": 0.4,  # weight of the reward for not repeating others
    "lora_rank": 0,  # above 0: train an adapter of this rank only
    "load_in_8bit": False,
    "seed": 0,
    "output_dir": "runs/sentiment",
}


def cut_prompts(args: Namespace, model: Any, tokenizer: Any) -> list[list[int]]:
    """Return pieces of texts, as token ids: of the dataset's, or of what the model writes by itself."""
    count, length = args.num_prompts + args.held_out, args.prompt_tokens
    if args.dataset_name is None:
        start = [[tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]] * count
        sampling = SamplingConfig(max_new_tokens=length, min_new_tokens=length, seed=args.seed)
        rollout = Engine(model, tokenizer).generate(start, sampling)
        return [[*query.tolist(), *response.tolist()] for query, response in zip(rollout.queries, rollout, strict=True)]
    from datasets import load_dataset

    kind = {"jsonl": "json", "json": "json", "csv": "csv", "txt": "text"}.get(args.dataset_name.rsplit(".", 1)[-1])
    data = load_dataset(kind, data_files=args.dataset_name) if kind else load_dataset(args.dataset_name)
    texts = data["train"].shuffle(seed=args.seed)["text"][: count * 2]
    ids = [tokenizer(text)["input_ids"][:length] for text in texts]
    return [prompt for prompt in ids if len(prompt) == length][:count]


def mood(completions: list[str]) -> list[float]:
    """VADER's compound score of each completion, from -1 to 1."""
    return [ANALYZER.polarity_scores(text)["compound"] for text in completions]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = read_flags(__doc__, arguments, **FLAGS)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = load_policy(args)
    prompts = cut_prompts(args, model, tokenizer)
    reward = AutoModelForSequenceClassification.from_pretrained(args.reward_model) if args.reward_model else mood
    PPOTrainer(ppo_config(args), model, tokenizer=tokenizer).train(
        prompts[args.held_out :],
        [reward, variety],
        reward_weights=[1.0, args.variety],
        eval_prompts=prompts[: args.held_out],
        eval_reward=reward,
        **run_settings(args),
    )
    return report(args.output_dir)


if __name__ == "__main__":
    main()

"""Best of n: without any training, the text that a reward likes best of several, beside what one text gets.

    python examples/best_of_n.py [--model_name_or_path MODEL] [--reward_model MODEL] [--dataset_name FILE_OR_HUB_ID]

A model that was trained on a reward pays for it once; this pays for each text, and never leaves the model's own words.
"""

import statistics
import time
from typing import Any

from recipes import load_policy, read_flags
from sentiment import FLAGS, cut_prompts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastppo import BestOfNSampler
from fastppo.rewards import ModelReward

OWN = {"reward_model": "lvwerra/distilbert-imdb", "num_prompts": 64, "prompt_tokens": 5, "sample_sizes": "1,2,4,8,16"}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = read_flags(__doc__, arguments, **(FLAGS | OWN))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = load_policy(args)
    reward = ModelReward(AutoModelForSequenceClassification.from_pretrained(args.reward_model), batch_size=128)
    prompts = cut_prompts(args, model, tokenizer)[: args.num_prompts]
    means = {}
    for size in map(int, args.sample_sizes.split(",")):
        sampler = BestOfNSampler(
            model, tokenizer, reward, lambda: args.max_new_tokens, sample_size=size, seed=args.seed
        )
        start = time.process_time()
        texts, scores = sampler.generate(prompts, return_scores=True)
        means[f"best_of_{size}"] = statistics.mean(best for (best,) in scores)
        seconds = (time.process_time() - start) / len(prompts)
        print(f"best of {size:2}: reward {means[f'best_of_{size}']:6.3f}, {seconds:.3f} s a text: {texts[0][0]!r}")
    return means


if __name__ == "__main__":
    main()

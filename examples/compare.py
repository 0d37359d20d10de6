"""PPO beside supervised fine-tuning and best of n, on the models of examples/film_reviews.py: quality, noise, cost.

    python examples/compare.py [--run runs/film_reviews] [--data FILE]

Every way starts from the run's language model and is paid by its first classifier. What is reported is the share that
the second one takes for praise, and what no classifier sees. The cost is processor time of this process.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import film_reviews
from film_data import WordJudge, divide, find_reviews, openings
from film_models import fine_tune
from measures import measure
from recipes import read_flags
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastppo import BestOfNSampler, Engine
from fastppo.atomic import write_json
from fastppo.rewards import ModelReward

FLAGS = film_reviews.FLAGS | {"run": "runs/film_reviews", "num_prompts": 2048, "output_dir": "runs/compare"}
Writer = Callable[[list[str]], tuple[list[str], list[float]]]


def ways(args: Any, rows: Any, judge: WordJudge, reward: Any, tokenizer: Any) -> Iterator[tuple[str, Writer]]:
    """Make one way of writing after the other ready, which costs what it costs."""
    training, load = openings([*rows.first, *rows.second]), AutoModelForCausalLM.from_pretrained

    def writer(model: Any, n: int = 1) -> Writer:
        sampler = BestOfNSampler(model, tokenizer, reward, lambda: args.max_new_tokens, sample_size=n, seed=args.seed)

        def write(prompts: list[str]) -> tuple[list[str], list[float]]:
            texts, scores = sampler.generate(prompts, return_scores=True)
            return [text for (text,) in texts], [score for (score,) in scores]

        return write

    yield "language model", writer(load(args.written))
    for n in (4, 16):
        yield f"best of {n}", writer(load(args.written), n)
    praise = [row["text"] for row in rows.first if row["label"]]
    yield "SFT on praise", writer(fine_tune(load(args.written), tokenizer, praise, args.output_dir, args.seed))
    best, _ = writer(load(args.written), 8)(training[: args.num_prompts])
    yield "SFT on best of 8", writer(fine_tune(load(args.written), tokenizer, best, args.output_dir, args.seed))
    film_reviews.improve(args, training, openings(rows.held_out)[: args.held_out], judge)
    yield "PPO", writer(load(Path(args.output_dir)))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = read_flags(__doc__, arguments, **FLAGS)
    args.written, args.classifier = (Path(args.run) / name for name in ("language_model", "classifier"))
    rows = divide(find_reviews(args.data, args.seed), args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.written)
    first = Engine(AutoModelForCausalLM.from_pretrained(args.written), tokenizer)
    reward = ModelReward(AutoModelForSequenceClassification.from_pretrained(args.classifier), batch_size=128)
    judge, prompts = WordJudge(rows.second), openings(rows.held_out)[: args.held_out]
    known = [row["text"] for row in (*rows.first, *rows.second)]
    table: list[dict[str, Any]] = []
    start = time.process_time()
    for name, write in ways(args, rows, judge, reward, tokenizer):
        ready = time.process_time()
        write(prompts)
        cost = {"train_s": ready - start, "s_per_1000": (time.process_time() - ready) / len(prompts) * 1000}
        table.append({"who": name, **measure(write, prompts, judge, known, first, args.seed), **cost})
        gain = table[-1]["reward"] - table[0]["reward"]
        table[-1]["gain_per_s"] = gain / (cost["train_s"] + cost["s_per_1000"])
        print(
            "  ".join(f"{key} {value:.3f}" if isinstance(value, float) else value for key, value in table[-1].items())
        )
        write_json(Path(args.output_dir) / "compare.json", table)
        start = time.process_time()
    return table


if __name__ == "__main__":
    main()

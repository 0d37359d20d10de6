"""Held-out accuracy of a reward model on pairs of a positive and a negative film review, beside logistic regression.

    python -m benchmarks.reward_pairs DATA [--seeds N] [--epochs N] [--texts N] [--output FILE]

DATA is a .jsonl file of `text` and `label` (1 or 0). A small Llama, made from nothing with a vocabulary of the training
texts' words, is trained by RewardTrainer, saved, loaded, and scores the held-out texts as PPO's reward would. The
regression sees the same texts' word counts; its penalty is the best of several on a part of the training texts. The
accuracy is over all pairs of a positive and a negative held-out text, a tie being no success; nothing is timed.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure

BAR = 0.01  # how far below the regression the reward model may be
SHARE_HELD_OUT = 5  # one text in so many
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)
LONGEST = 64

Texts = list[tuple[str, int]]


def read(path: Path, limit: int | None) -> tuple[Texts, Texts]:
    """Return the texts to train on and the held-out ones, each with its label, in an order drawn once."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [(row["text"], int(row["label"])) for row in rows]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    held = len(order) // SHARE_HELD_OUT
    return [texts[i] for i in order[held:]], [texts[i] for i in order[:held]]


def words(text: str) -> list[str]:
    """Return the words of a text, and its other signs, in small letters."""
    return re.findall(r"[\w']+|[^\w\s]", text.lower())


def vocabulary(texts: Texts) -> dict[str, int]:
    """Number the words that stand in two texts at least; 0 to 2 are padding, end and all other words."""
    counts: dict[str, int] = {}
    for text, _ in texts:
        for word in set(words(text)):
            counts[word] = counts.get(word, 0) + 1
    known = sorted(word for word, count in counts.items() if count > 1)
    return {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: number for number, word in enumerate(known, start=3)}


def pair_accuracy(scores: Tensor, texts: Texts) -> float:
    """Return the share of pairs in which the positive text has strictly more than the negative one."""
    labels = torch.tensor([label for _, label in texts])
    positive, negative = scores[labels == 1], scores[labels == 0]
    return float((positive[:, None] > negative[None]).double().mean())


class Regression:
    """Logistic regression on word counts with a penalty of half its weights' squares, in units of one text's loss."""

    def __init__(self, known: dict[str, int]) -> None:
        self.known, self.weight = known, torch.zeros(len(known) + 1, dtype=torch.float64)

    def scores(self, texts: Sequence[str], weight: Tensor) -> Tensor:
        """Return the logits (N,) of texts; the last weight is the constant."""
        ids = [[self.known.get(word, 2) for word in words(text)] for text in texts]
        bounds = torch.tensor([0, *map(len, ids)]).cumsum(0)[:-1]
        flat = torch.tensor([number for row in ids for number in row])
        summed = torch.nn.functional.embedding_bag(flat, weight[:-1, None], bounds, mode="sum")
        return summed[:, 0] + weight[-1]

    def fit(self, texts: Texts, penalty: float) -> "Regression":
        """Find the weights by L-BFGS."""
        weight = torch.zeros_like(self.weight, requires_grad=True)
        labels = torch.tensor([label for _, label in texts], dtype=torch.float64)
        rows = [text for text, _ in texts]
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = self.scores(rows, weight)
            total = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            total = total + penalty / 2 * weight[:-1].square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        self.weight = weight.detach()
        return self


def regression_accuracy(train: Texts, held_out: Texts, known: dict[str, int]) -> dict[str, float]:
    """Return the regression's accuracy, with the penalty that is best on a tenth of the training texts."""
    inner, judged = train[len(train) // 10 :], train[: len(train) // 10]

    def accuracy(fitted: Regression, texts: Texts) -> float:
        return pair_accuracy(fitted.scores([text for text, _ in texts], fitted.weight), texts)

    penalty = max(PENALTIES, key=lambda value: accuracy(Regression(known).fit(inner, value), judged))
    return {"accuracy": accuracy(Regression(known).fit(train, penalty), held_out), "penalty": penalty}


def make_tokenizer(known: dict[str, int]) -> Any:
    """Return a tokenizer of whole words."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w']+|[^\w\s]"), "removed", invert=True)
    ends = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=LONGEST, **ends)


def make_model(known: dict[str, int], seed: int) -> Any:
    """Return a Llama of one layer whose last token begins as the mean over all: its queries are zero."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_labels": 1}
    config = LlamaConfig(vocab_size=len(known), max_position_embeddings=LONGEST, **sizes, **ids)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    return model


def make_pairs(texts: Texts, epochs: int, seed: int) -> list[dict[str, str]]:
    """Pair every positive text with a negative one, with other ones in each epoch, as far as there are both."""
    draw = torch.Generator().manual_seed(seed)
    sides = [[text for text, label in texts if label == wanted] for wanted in (1, 0)]
    pairs = []
    for _ in range(epochs):
        orders = [torch.randperm(len(side), generator=draw).tolist() for side in sides]
        pairs += [{"chosen": sides[0][i], "rejected": sides[1][j]} for i, j in zip(*orders, strict=False)]
    return pairs


def reward_accuracy(train: Texts, held_out: Texts, known: dict[str, int], seed: int, epochs: int) -> dict[str, float]:
    """Train a reward model, load it again, and return its accuracy."""
    from transformers import AutoModelForSequenceClassification

    from fastppo import RewardConfig, RewardTrainer
    from fastppo.reward_models import ModelReward

    tokenizer = make_tokenizer(known)
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=2e-3,
            weight_decay=4.0,
            lr_scheduler_type="linear",
            center_rewards_coefficient=0.01,
            max_length=LONGEST,
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        pairs = make_pairs(train, epochs, seed)
        trainer = RewardTrainer(make_model(known, seed), args, train_dataset=pairs, tokenizer=tokenizer)
        trainer.train()
        trainer.save_model()
        reward = ModelReward(AutoModelForSequenceClassification.from_pretrained(folder), tokenizer)
    texts = [text for text, _ in held_out]
    return {"accuracy": pair_accuracy(reward([""] * len(texts), texts), held_out), "seed": seed}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON; fail where the bar is missed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_pairs", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="times that a training text is seen")
    parser.add_argument("--texts", type=int, help="use so many texts only")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    train, held_out = read(arguments.data, arguments.texts)
    known = vocabulary(train)
    case = f"{len(train)} texts to train on, {len(held_out)} held out"
    rows = [{"case": case, "who": "logistic regression"} | regression_accuracy(train, held_out, known)]
    for seed in range(arguments.seeds):
        found = reward_accuracy(train, held_out, known, seed, arguments.epochs)
        rows.append({"case": case, "who": "fastppo"} | found)
    for row in rows:
        print(f"{row['who']:20} {row['accuracy']:.4f}")
    if arguments.output:
        command = " ".join(["python -m benchmarks.reward_pairs", arguments.data.name, *argv[1:]])
        measure.write_result(arguments.output, command, rows, bar=f"regression - {BAR}")
    if arguments.texts is None and min(row["accuracy"] for row in rows) < rows[0]["accuracy"] - BAR:
        raise SystemExit("the reward model is below the bar")


if __name__ == "__main__":
    main()

"""RewardTrainer: its loss and accuracy against numbers worked out by hand, and a model that learns a preference."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EvalPrediction, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fastppo.trainers.reward import PairPadding, RewardConfig, RewardTrainer, encode_pairs, pair_loss, pair_metrics

WORDS = ["<s>", "</s>", "<pad>", "good", "bad", "film", "very", "plot"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def new_model(num_labels: int = 1) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            num_labels=num_labels,
            pad_token_id=2,
        )
    )


def config(folder: Path, **fields: object) -> RewardConfig:
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    return RewardConfig(output_dir=str(folder), **{**quiet, **fields})


def test_the_loss_of_two_pairs_with_margins():
    # TRL's margin (B,) met rewards (B, 1) and became (B, B) for more than one pair.
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 1.5])
    margin = torch.tensor([0.25, 1.0])
    gaps = (2.0 - 1.0 - 0.25, 0.5 - 1.5 - 1.0)
    expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 2
    assert pair_loss(chosen, rejected, margin).item() == pytest.approx(expected, rel=1e-6)
    centred = pair_loss(chosen, rejected, margin, 0.1).item()
    assert centred == pytest.approx(expected + 0.1 * (3.0**2 + 2.0**2) / 2, rel=1e-6)


def test_a_tie_is_no_success():
    rewards = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [2.0, 1.0]])
    assert pair_metrics(EvalPrediction(rewards, np.zeros(4))) == {"accuracy": 0.5, "margin": 0.25}


def test_a_batch_holds_all_chosen_texts_then_all_rejected_ones(tokenizer: PreTrainedTokenizerFast):
    rows = [{"chosen": "good film", "rejected": "bad", "margin": 0.5}, {"chosen": "good", "rejected": "very bad film"}]
    batch = PairPadding(2)(encode_pairs(rows, tokenizer, 32))
    assert batch["input_ids"].tolist() == [[3, 5, 1, 2], [3, 1, 2, 2], [4, 1, 2, 2], [6, 4, 5, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 2, 4]
    assert batch["margin"].tolist() == [0.5, 0.0]


def test_the_trainer_s_loss_is_that_of_single_texts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    rows = [
        {"chosen": "good film", "rejected": "bad", "margin": 0.5},
        {"chosen": "good", "rejected": "very bad film", "margin": 0.0},
    ]
    model = new_model().eval()
    with torch.no_grad():
        reward = {
            text: model(torch.tensor([tokenizer(text)["input_ids"] + [1]])).logits.item()
            for row in rows
            for text in (row["chosen"], row["rejected"])
        }
    gaps = [reward[row["chosen"]] - reward[row["rejected"]] - row["margin"] for row in rows]
    expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 2
    metrics = RewardTrainer(model, config(tmp_path), eval_dataset=rows, tokenizer=tokenizer).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_it_learns_a_preference_and_saves_a_model_that_agrees(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    rows = [
        {"chosen": f"{start} good {end}", "rejected": f"{start} bad {end}"}
        for start in ("film", "very", "plot", "film very")
        for end in ("film", "plot", "very plot", "film plot")
    ]
    fields = {"max_steps": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    args = config(tmp_path, center_rewards_coefficient=0.01, **fields)
    trainer = RewardTrainer(new_model(), args, train_dataset=rows[:12], eval_dataset=rows[12:], tokenizer=tokenizer)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_margin"] > 1.0
    trainer.save_model()
    assert {file.suffix for file in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path)
    text = torch.tensor([tokenizer("film good plot")["input_ids"] + [1]])
    with torch.no_grad():
        assert loaded(text).logits.item() == trainer.model.eval()(text).logits.item()


def test_accumulated_steps_equal_one_large_step(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    rows = [{"chosen": "good film", "rejected": "bad film"}, {"chosen": "very good", "rejected": "very bad plot"}]
    weights = []
    for batch_size, accumulation in ((2, 1), (1, 2)):
        torch.manual_seed(0)
        args = config(
            tmp_path,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
        )
        trainer = RewardTrainer(new_model(), args, train_dataset=rows, tokenizer=tokenizer)
        trainer.train()
        weights.append(trainer.model.score.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


def test_misuse_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    with pytest.raises(ValueError, match="2 labels, expected 1"):
        RewardTrainer(new_model(num_labels=2), config(tmp_path), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="missing: \\['rejected'\\]"):
        RewardTrainer(new_model(), config(tmp_path), train_dataset=[{"chosen": "good"}], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="expected False"):
        config(tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match="expected one"):
        RewardTrainer(new_model(), config(tmp_path), tokenizer=tokenizer, processing_class=tokenizer)

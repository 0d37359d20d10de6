"""RewardTrainer: its loss and accuracy against numbers worked out by hand, and a model that learns a preference."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    EvalPrediction,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fastppo.reward_models import ModelReward
from fastppo.trainers.pairs import PairEncoder, Pairs, pairs_side_by_side
from fastppo.trainers.reward import RewardConfig, RewardTrainer, pair_loss, pair_metrics

WORDS = ["<s>", "</s>", "<pad>", "good", "bad", "film", "very", "plot"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def new_model(num_labels: int = 1, **settings: int) -> LlamaForSequenceClassification:
    fields = {"hidden_size": 16, "intermediate_size": 32} | settings
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(WORDS),
            **fields,
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


def encode(rows, tokenizer, max_length=32, adds_eos=True):
    return PairEncoder(tokenizer, max_length, adds_eos).encode(rows)


def test_a_batch_holds_all_chosen_texts_then_all_rejected_ones_without_padding(tokenizer: PreTrainedTokenizerFast):
    rows = [{"chosen": "good film", "rejected": "bad", "margin": 0.5}, {"chosen": "good", "rejected": "very bad film"}]
    batch = pairs_side_by_side(encode(rows, tokenizer))
    assert batch["input_ids"].tolist() == [[3, 5, 1, 3, 1, 4, 1, 6, 4, 5, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 3]]
    assert batch["margin"].tolist() == [0.5, 0.0]
    padded = {
        "input_ids": torch.tensor([[3, 5, 1, 1], [3, 1, 1, 1], [4, 1, 1, 1], [6, 4, 5, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]),
    }
    for each in (batch, padded):
        pairs = Pairs.of(each)
        assert [ids.tolist() for ids in pairs.chosen] == [[3, 5, 1], [3, 1]]
        assert [ids.tolist() for ids in pairs.rejected] == [[4, 1], [6, 4, 5, 1]]


CHAT = [{"role": "user", "content": "film"}]
FORMS = {
    "texts": {"chosen": "film good", "rejected": "film bad"},
    "texts after a prompt": {"prompt": "film", "chosen": " good", "rejected": " bad"},
    "chats": {
        "chosen": [*CHAT, {"role": "assistant", "content": "good"}],
        "rejected": [*CHAT, {"role": "assistant", "content": "bad"}],
    },
    "chats after a prompt": {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    },
    "ids, padded": {
        "input_ids_chosen": torch.tensor([2, 5, 3, 1]),
        "attention_mask_chosen": [0, 1, 1, 1],
        "input_ids_rejected": [5, 4, 1, 2],
        "attention_mask_rejected": [1, 1, 1, 0],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_a_pair_mean_the_same(tokenizer: PreTrainedTokenizerFast, form: str):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    assert encode([FORMS[form] | {"margin": 2}], tokenizer) == [
        {"chosen": [5, 3, 1], "rejected": [5, 4, 1], "margin": 2.0}
    ]


def test_long_texts_keep_their_beginning(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture):
    rows = [{"chosen": "film very good", "rejected": "film bad"}, {"chosen": "film good", "rejected": "film good very"}]
    assert encode(rows, tokenizer, 2) == [
        {"chosen": [5, 6], "rejected": [5, 4]},
        {"chosen": [5, 3], "rejected": [5, 3]},
    ]
    assert "1 of 2 pairs do not differ within 2 tokens" in caplog.text
    with pytest.raises(ValueError, match="none of 2 pairs differs within 1 tokens"):
        encode(rows, tokenizer, 1)


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


def losses_alone(model, rows, tokenizer, coefficient=0.0):
    """Return the losses of pairs by transformers, one text at a time."""
    losses = []
    for row in rows:
        ids = [torch.tensor([tokenizer(row[side])["input_ids"] + [1]]) for side in ("chosen", "rejected")]
        chosen, rejected = (model(each).logits[0, 0].double() for each in ids)
        gap = chosen - rejected - row.get("margin", 0.0)
        losses.append(torch.log1p(torch.exp(-gap)) + coefficient * (chosen + rejected) ** 2)
    return losses


ROWS = [
    {"chosen": "good film", "rejected": "bad film", "margin": 0.25},
    {"chosen": "very good", "rejected": "very bad plot"},
    {"chosen": "plot very very good", "rejected": "bad", "margin": 1.0},
    {"chosen": "good", "rejected": "film film film bad plot"},
    {"chosen": "very very good plot", "rejected": "plot very bad"},
]


class Recorder(TrainerCallback):
    """Keep the gradients of the last optimiser step, before it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class OwnForward(LlamaForSequenceClassification):
    """A classifier whose head is not where a decoder's is."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.classifier, self.score = self.score, None

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        ends = torch.full((len(input_ids),), -1) if attention_mask is None else attention_mask.sum(1) - 1
        return SequenceClassifierOutput(logits=self.classifier(hidden[torch.arange(len(hidden)), ends]))


@pytest.mark.parametrize(
    ("kind", "batch_size", "accumulation"),
    [("packed", 5, 1), ("packed", 2, 3), ("own forward", 2, 3)],
)
def test_gradients_are_those_of_all_pairs_alone_however_they_are_batched(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str, batch_size: int, accumulation: int
):
    model = new_model() if kind == "packed" else OwnForward(new_model().config)
    expected = sum(losses_alone(model, ROWS, tokenizer, 0.1)) / len(ROWS)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    args = config(
        tmp_path,
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        center_rewards_coefficient=0.1,
    )
    seen = Recorder()
    trainer = RewardTrainer(model, args, None, ROWS, ROWS, tokenizer, callbacks=[seen])
    assert trainer.reads_last_token == (kind == "packed")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.train().training_loss == pytest.approx(expected.item(), rel=1e-5)
    assert seen.gradients.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(seen.gradients[name], grad, rtol=1e-4, atol=1e-6)


def test_an_end_that_is_the_padding_token_is_not_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    # transformers reads the last token that is not its padding token: what is trained has to be what is read.
    tokenizer.pad_token = tokenizer.eos_token
    model = new_model().eval()
    model.config.pad_token_id = tokenizer.eos_token_id
    trainer = RewardTrainer(model, config(tmp_path), eval_dataset=ROWS, tokenizer=tokenizer)
    assert trainer.eval_dataset[0]["chosen"] == [3, 5]
    found = trainer.predict(trainer.eval_dataset).predictions
    texts = [row[side] for side in ("chosen", "rejected") for row in ROWS]
    with torch.no_grad():
        own = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(torch.tensor(found).T.flatten(), own)
    trainer.save_model()
    reward = ModelReward(LlamaForSequenceClassification.from_pretrained(tmp_path), tokenizer)
    torch.testing.assert_close(reward([""] * len(texts), texts), own)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_an_adapter_on_a_quantised_classifier_named_by_its_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, bits: int
):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    new_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
    rows = [{"chosen": f"{a} good {b}", "rejected": f"{a} bad {b}"} for a in ("film", "very") for b in ("plot", "film")]
    trainer = RewardTrainer(
        str(tmp_path / "base"),
        config(tmp_path / "out", max_steps=40, learning_rate=2e-2),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=lora,
        model_init_kwargs={f"load_in_{bits}bit": True},
    )
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    assert trainer.reads_last_token
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_misuse_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    with pytest.raises(ValueError, match="2 labels, expected 1"):
        RewardTrainer(new_model(num_labels=2), config(tmp_path), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="with rejected=None and prompt=None"):
        RewardTrainer(new_model(), config(tmp_path), train_dataset=[{"chosen": "good"}], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="expected False"):
        config(tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match="expected one"):
        RewardTrainer(new_model(), config(tmp_path), tokenizer=tokenizer, processing_class=tokenizer)
    with pytest.raises(ValueError, match="are for a model given by its name"):
        RewardTrainer(new_model(), config(tmp_path), tokenizer=tokenizer, model_init_kwargs={"dtype": "auto"})
    missing = [{"chosen": "good", "rejected": "bad", "margin": float("nan")}]  # as pandas has it
    with pytest.raises(ValueError, match="margin=nan, expected a finite number"):
        RewardTrainer(new_model(), config(tmp_path), train_dataset=missing, tokenizer=tokenizer)


def test_a_folder_may_be_given_as_a_path(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    new_model().save_pretrained(tmp_path / "base")
    trainer = RewardTrainer(tmp_path / "base", config(tmp_path), eval_dataset=ROWS, tokenizer=tokenizer)
    assert trainer.evaluate()["eval_loss"] > 0

"""Rewards: what a function is called with, and classification models, whose scores are those of each text alone."""

import functools
import json

import pytest
import tiny
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers import PreTrainedTokenizerFast as Fast

from fastppo.rewards import ModelReward, Reward
from fastppo.trainers.reward import RewardConfig, RewardTrainer

PROMPTS, COMPLETIONS = ["w3 w4", "w5", "w6 w7 w8"], [" w9", " w10 w11 w12 w13", " w14 w15"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def classifier(pad=None, context=16, **settings):
    torch.manual_seed(2)
    settings = {"num_labels": 1, "initializer_range": 0.3, "pad_token_id": pad, **settings}
    config = LlamaConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=context, **SIZES, **settings)
    return LlamaForSequenceClassification(config).eval()


def tokenizer(**special):
    """One that has no special tokens but those given."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return Fast(tokenizer_object=inner, **special)


def alone(model, texts, last=()):
    """The scores of the texts one by one, without any padding."""
    rows = [[int(word[1:]) for word in text.split()] + list(last) for text in texts]
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[:, -1] for row in rows])


def score(reward, prompts=PROMPTS, completions=COMPLETIONS, **columns):
    return Reward(reward)(prompts, completions, columns)


TEXTS = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]


@pytest.mark.parametrize("pad", [None, 0, 39])
@pytest.mark.parametrize("special", [{}, {"pad_token": "<pad>", "padding_side": "left"}, {"eos_token": "</s>"}])
def test_a_model_scores_each_text_as_if_it_were_alone(pad, special):
    # 39 is not the tokenizer's pad: the model looks for the last token that is not its own.
    model = classifier(pad)
    got = score(ModelReward(model, tokenizer(**special), batch_size=2))
    torch.testing.assert_close(got, alone(model, TEXTS), atol=1e-5, rtol=0)
    assert model.config.pad_token_id == pad


def test_a_text_that_ends_in_token_0_is_not_taken_for_padded():
    model = classifier(None)
    got = score(ModelReward(model, tokenizer(unk_token="<pad>")), ["w3 <pad>", "w4"], [" <pad>", " w5 w6 w7"])
    torch.testing.assert_close(got, alone(model, ["w3 w0 w0", "w4 w5 w6 w7"]), atol=1e-5, rtol=0)


def test_a_model_with_absolute_positions_and_several_labels():
    """What does not fit loses its beginning: the completion is what the score is of."""
    torch.manual_seed(3)
    config = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 3, "initializer_range": 0.3}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=tiny.VOCABULARY, **config)).eval()
    torch.testing.assert_close(score(ModelReward(model, tokenizer())), alone(model, TEXTS), atol=1e-5, rtol=0)
    long = score(ModelReward(model, tokenizer()), ["w3 " * 10], ["w4 " * 10])
    torch.testing.assert_close(long, alone(model, ["w3 " * 6 + "w4 " * 10]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", [0, 1])
def test_positions_that_stand_for_padding_are_no_room_for_tokens(padding):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=64, max_position_embeddings=12, pad_token_id=padding, **sizes)
    reward = ModelReward(RobertaForSequenceClassification(config), tiny.tokenizer(64))
    words = [f"w{5 + i}" for i in range(20)]
    whole, cut = reward(["", ""], [" ".join(words), " ".join(words[-(11 - padding) :])]).tolist()
    assert whole == pytest.approx(cut, abs=1e-6)
    assert whole != pytest.approx(reward([""], [" ".join(words[-(10 - padding) :])]).item(), abs=1e-6)


def test_eos_is_added_where_the_model_was_trained_with_it(tmp_path):
    words = tokenizer(eos_token="</s>", pad_token="<pad>")
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    rows = [{"chosen": "w3 w4", "rejected": "w5"}] * 2
    args = RewardConfig(output_dir=str(tmp_path), max_steps=1, **quiet)
    trainer = RewardTrainer(classifier(0), args, train_dataset=rows, processing_class=words)
    trainer.train()
    trainer.save_model()
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    ended, plain = alone(loaded, TEXTS, last=[2]), alone(loaded, TEXTS)
    torch.testing.assert_close(score(ModelReward(loaded, words)), ended, atol=1e-5, rtol=0)
    torch.testing.assert_close(score(ModelReward(loaded, words, add_eos=False)), plain, atol=1e-5, rtol=0)
    other = classifier(0)
    torch.testing.assert_close(score(ModelReward(other, words)), alone(other, TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        score(ModelReward(other, words, add_eos=True)), alone(other, TEXTS, last=[2]), atol=1e-5, rtol=0
    )
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 0


def test_reward_pairs_are_cut_at_the_models_context(tmp_path):
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    rows = [{"chosen": "w3 " * 40, "rejected": "w5 " * 30}]
    args = RewardConfig(output_dir=str(tmp_path), **quiet)
    words = tokenizer(eos_token="</s>", pad_token="<pad>")
    trainer = RewardTrainer(classifier(0, context=16), args, train_dataset=rows, processing_class=words)
    assert [len(trainer.train_dataset[0][name]) for name in ("chosen", "rejected")] == [16, 16]


def test_a_text_without_tokens_has_no_score():
    got = score(ModelReward(classifier(), tokenizer()), ["", "w3"], ["", " w4"])
    assert got.isnan().tolist() == [True, False]


def test_networks_that_are_no_classification_models_are_refused():
    with pytest.raises(ValueError, match=r"Linear has no config.num_labels, expected .*prompts, completions"):
        Reward(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"logits of shape \(3, 5, 40\), .*AutoModelForSequenceClassification"):
        score(ModelReward(tiny.llama(), tokenizer()))
    with pytest.raises(ValueError, match="gives no logits, expected"):
        score(ModelReward(tiny.with_value_head(tiny.llama()), tokenizer()))
    with pytest.raises(ValueError, match=r"made in memory names no tokenizer; pass ModelReward\(model, tokenizer\)"):
        Reward(classifier())


def lengths(completions):
    return [float(len(text)) for text in completions]


class Scorer:
    def __call__(self, prompts, completions):
        return lengths(completions)


FORMS = {
    "names of its own": lambda p, c: lengths(c),
    "only some names": lambda completions: lengths(completions),
    "other order": lambda completions, prompts: lengths(completions),
    "everything": lambda **everything: lengths(everything["completions"]),
    "arguments": lambda *both: lengths(both[1]),
    "a column": lambda label, completions: [float(n) for n in label],
    "names of its own and a column": lambda p, c, label: [float(n) for n in label],
    "names of its own and a default": lambda p, c, scale=1.0: [scale * n for n in lengths(c)],
    "an object": Scorer(),
    "a partial": functools.partial(lambda scale, prompts, completions: lengths(completions), 2.0),
}


def by_position(prompts, completions, /, **columns):
    assert set(columns) == {"label"}
    return lengths(completions)


@pytest.mark.parametrize("form", FORMS)
def test_a_function_may_be_written_in_many_ways(form):
    expected = [4.0, 5.0, 6.0] if form in ("a column", "names of its own and a column") else lengths(COMPLETIONS)
    assert score(FORMS[form], label=[4, 5, 6]).tolist() == expected
    assert Reward(FORMS[form], columns=["label"])(PROMPTS, COMPLETIONS, {"label": [4, 5, 6]}).tolist() == expected


def test_positional_parameters_are_filled_by_position():
    assert score(by_position, label=[1, 2, 3]).tolist() == lengths(COMPLETIONS)


def test_a_parameter_that_nothing_fills_is_refused():
    with pytest.raises(ValueError, match=r"reward needs_answer has the parameters \['answer'\].*columns \['label'\]"):
        Reward(needs_answer, columns=["label"])
    reward = Reward(needs_answer)
    assert reward(PROMPTS, COMPLETIONS, {"answer": [1, 2, 3]}).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"\['answer'\].*columns \['label'\]; name its parameters"):
        reward(PROMPTS, COMPLETIONS, {"label": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"\['texts'\]"):
        score(lambda texts: lengths(texts))
    with pytest.raises(ValueError, match=r"\['third'\]"):
        Reward(three)


def needs_answer(completions, answer):
    return [float(n) for n in answer]


def three(first, second, third, /):
    return [0.0] * len(second)


def test_a_pipeline_is_its_model_and_tokenizer():
    from transformers import TextClassificationPipeline, TextGenerationPipeline

    names = {"id2label": {0: "BAD", 1: "FAIR", 2: "GOOD"}, "label2id": {"BAD": 0, "FAIR": 1, "GOOD": 2}}
    model, words = classifier(0, num_labels=3, **names), tokenizer(pad_token="<pad>")
    pipeline = TextClassificationPipeline(model=model, tokenizer=words, device="cpu")
    raw = [[row["score"] for row in rows] for rows in pipeline(TEXTS, top_k=None, function_to_apply="none")]
    labels = [[row["label"] for row in rows] for rows in pipeline(TEXTS, top_k=None, function_to_apply="none")]
    logits = [dict(zip(*pair, strict=True)) for pair in zip(labels, raw, strict=True)]
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(score(pipeline), torch.tensor([row["GOOD"] for row in logits]), **close)
    by_name = score(ModelReward(model, words, label="FAIR"))
    torch.testing.assert_close(by_name, torch.tensor([row["FAIR"] for row in logits]), **close)
    shares = [{row["label"]: row["score"] for row in rows} for rows in pipeline(TEXTS, top_k=None)]
    share = score(ModelReward(model, words, label="BAD", probability=True))
    torch.testing.assert_close(share, torch.tensor([row["BAD"] for row in shares]), **close)
    with pytest.raises(ValueError, match=r"no label 'good'; the model has 3, named \['BAD', 'FAIR', 'GOOD'\]"):
        ModelReward(model, words, label="good")
    with pytest.raises(ValueError, match="there is no label 3; the model has 3"):
        ModelReward(model, words, label=3)
    writer = TextGenerationPipeline(model=tiny.llama(), tokenizer=words, device="cpu")
    with pytest.raises(
        ValueError, match="a TextGenerationPipeline gives no scores; pass one for 'text-classification'"
    ):
        Reward(writer)


def test_the_probability_of_a_single_label_is_the_pipelines():
    from transformers import TextClassificationPipeline

    model, words = classifier(0), tokenizer(pad_token="<pad>")
    pipeline = TextClassificationPipeline(model=model, tokenizer=words, device="cpu")
    expected = torch.tensor([row["score"] for row in pipeline(TEXTS)])
    got = score(ModelReward(model, words, probability=True))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

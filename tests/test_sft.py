"""SFTTrainer: what is learned (EOS, completions), what is not (padding, prompts, other documents), what is written."""

from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo.trainers.sft import IGNORED, RightPadding, SFTConfig, SFTTrainer, encode, pack

WORDS = ["<s>", "</s>", "<pad>", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away", "."]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=32
    )


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def config(folder: Path, **fields: object) -> SFTConfig:
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    return SFTConfig(output_dir=str(folder), **{**quiet, **fields})


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_a_text_is_learned_with_its_end(tokenizer: PreTrainedTokenizerFast):
    [row] = encode([{"text": "the cat sat"}], tokenizer, 32)
    assert row == {"input_ids": ids("the cat sat </s>"), "labels": [IGNORED, *ids("cat sat </s>")]}


def test_a_cut_text_is_not_taught_to_end(tokenizer: PreTrainedTokenizerFast):
    [row] = encode([{"text": "the cat sat"}], tokenizer, 3)
    assert row["input_ids"] == ids("the cat sat")


def test_an_end_in_the_text_is_not_doubled(tokenizer: PreTrainedTokenizerFast):
    [row] = encode([{"text": "the cat </s>"}], tokenizer, 32)
    assert row["input_ids"] == ids("the cat </s>")
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_a_real_end_is_learned_when_padding_uses_the_same_token(tokenizer: PreTrainedTokenizerFast):
    # TRL's SFT masked every EOS when pad was EOS, so models never stopped.
    tokenizer.pad_token = tokenizer.eos_token
    rows = encode([{"text": "the cat sat on"}, {"text": "a dog"}], tokenizer, 32)
    batch = RightPadding(tokenizer)(rows)
    end = tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [ids("the cat sat on </s>"), [*ids("a dog </s>"), end, end]]
    assert batch["labels"].tolist()[1] == [IGNORED, *ids("dog </s>"), IGNORED, IGNORED]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 0, 0]


def test_only_the_completion_is_learned(tokenizer: PreTrainedTokenizerFast):
    [row] = encode([{"prompt": "the cat", "completion": " ran away"}], tokenizer, 32)
    assert row["input_ids"] == ids("the cat ran away </s>")
    assert row["labels"] == [IGNORED, IGNORED, *ids("ran away </s>")]


def test_rows_without_anything_to_learn_are_left_out_or_refused(tokenizer: PreTrainedTokenizerFast):
    long_prompt = {"prompt": "the cat sat on a mat", "completion": " ran"}
    assert len(encode([long_prompt, {"text": "a dog"}], tokenizer, 4)) == 1
    with pytest.raises(ValueError, match="max_seq_length"):
        encode([long_prompt], tokenizer, 4)


def test_unknown_columns_and_formatters_are_refused(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ValueError, match=r"columns \['review'\], expected 'text'"):
        encode([{"review": "the cat"}], tokenizer, 32)
    with pytest.raises(ValueError, match="formatting_func returned list"):
        encode([{"review": "the cat"}], tokenizer, 32, formatting_func=lambda row: [row["review"]])
    [row] = encode([{"review": "the cat"}], tokenizer, 32, formatting_func=lambda row: row["review"])
    assert row["input_ids"] == ids("the cat </s>")


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM):
    texts = ["the cat sat on a mat", "a dog ran", "the dog sat", "cat ran far away"]
    rows = encode([{"text": text} for text in texts], tokenizer, 32)
    packed = pack(rows, 12)
    assert [len(row["input_ids"]) for row in packed] == [11, 9]
    batch = RightPadding(tokenizer)(packed)
    together = model.eval()(**batch, use_cache=False).logits
    alone = [model(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    torch.testing.assert_close(together[0, :11], torch.cat(alone[:2]))
    torch.testing.assert_close(together[1, :9], torch.cat(alone[2:]))


def test_packing_does_not_change_the_loss(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path):
    rows = [{"text": "the cat sat on a mat"}, {"text": "a dog ran"}, {"text": "the dog sat"}]
    trainers = [
        SFTTrainer(model, config(tmp_path), eval_dataset=rows, tokenizer=tokenizer, packing=packing)
        for packing in (False, True)
    ]
    alone, packed = (trainer.evaluate()["eval_loss"] for trainer in trainers)
    assert packed == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("as_dataset", [False, True])
def test_it_learns_a_sentence_and_its_end(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path, as_dataset: bool
):
    rows = [{"story": "the cat sat on a mat ."}] * 8
    dataset = datasets.Dataset.from_list(rows) if as_dataset else rows
    args = config(tmp_path, per_device_train_batch_size=8, max_steps=60, learning_rate=2e-2)
    SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, dataset_text_field="story").train()
    written = model.generate(torch.tensor([ids("the cat")]), do_sample=False, max_new_tokens=12)
    assert tokenizer.decode(written[0]) == "the cat sat on a mat . </s>"


def test_no_pickle_is_written_or_read(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path):
    args = config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = SFTTrainer(model, args, train_dataset=[{"text": "the cat sat"}] * 4, tokenizer=tokenizer)
    trainer.train()
    trainer.save_model()
    written = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert "model.safetensors" in written
    assert {Path(name).suffix for name in written} <= {".safetensors", ".json", ".jinja"}
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="from_pretrained"):
        trainer.train(resume_from_checkpoint=True)


# PEFT 0.21 asks transformers 5.23 for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_trained_and_saved_alone(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path
):
    peft = pytest.importorskip("peft")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = [{"text": "the cat sat"}] * 4
    args = config(tmp_path, max_steps=2)
    trainer = SFTTrainer(model, args, train_dataset=rows, tokenizer=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    unwrapped = trainer.model.unload().state_dict()
    torch.testing.assert_close(unwrapped, base, rtol=0, atol=0)


def test_an_unknown_argument_is_refused(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM):
    with pytest.raises(TypeError, match="chars_per_token"):
        SFTTrainer(model, tokenizer=tokenizer, chars_per_token=3.6)


def test_packing_with_a_cache_is_refused(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path):
    with pytest.raises(ValueError, match="see each other"):
        SFTTrainer(model, config(tmp_path, use_cache=True, packing=True), tokenizer=tokenizer)


def test_rows_fit_the_models_context_by_default(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **sizes))
    rows = [{"text": "the cat " * 20}]
    trainer = SFTTrainer(model, config(tmp_path, max_steps=1), train_dataset=rows, tokenizer=tokenizer)
    assert len(trainer.train_dataset[0]["input_ids"]) == 16
    trainer.train()
    longer = SFTTrainer(model, config(tmp_path), train_dataset=rows, tokenizer=tokenizer, max_seq_length=20)
    assert len(longer.train_dataset[0]["input_ids"]) == 20


def test_texts_without_an_end_token_have_none(tokenizer: PreTrainedTokenizerFast):
    tokenizer.eos_token = None
    rows = encode([{"text": "the cat sat"}, {"prompt": "the cat", "completion": " ran"}], tokenizer, 32)
    assert [row["input_ids"] for row in rows] == [ids("the cat sat"), ids("the cat ran")]
    assert [row["labels"] for row in rows] == [[IGNORED, *ids("cat sat")], [IGNORED, IGNORED, *ids("ran")]]
    with pytest.raises(ValueError, match="none of 2 rows"):
        encode([{"prompt": "the cat", "completion": ""}, {"text": ""}], tokenizer, 32)

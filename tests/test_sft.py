"""SFTTrainer: its loss and gradients against plain cross entropy of each document by itself, and what is written."""

import json
from pathlib import Path

import datasets
import pytest
import tiny
import tiny_seq2seq
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, TrainerCallback, TrainingArguments

from fastppo import AutoModelForCausalLMWithValueHead, DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer, ops
from fastppo.models.passes import passing
from fastppo.trainers.documents import IGNORED, Documents
from fastppo.trainers.token_loss import token_loss

QUIET = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True, "report_to": "none"}


def config(folder: Path, **fields: object) -> SFTConfig:
    return SFTConfig(output_dir=str(folder), **{**QUIET, **fields})


def rows(count: int = 7, seed: int = 0, longest: int = 11) -> list[dict[str, list[int]]]:
    """Return tokenised documents of 1 to `longest` tokens, some of whose tokens are not to be learned."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for ids in tiny.queries(count, seed, longest):
        is_learned = torch.rand(len(ids), generator=generator) < 0.7
        result.append({"input_ids": ids.tolist(), "labels": ids.where(is_learned, torch.tensor(IGNORED)).tolist()})
    result[0] = {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}
    return [row for row in result if any(label != IGNORED for label in row["labels"][1:])]


def oracle(model, documents) -> torch.Tensor:
    """Return the mean loss over all tokens to learn, each document run by itself by transformers, logits and all."""
    total, count = 0.0, 0
    for row in documents:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        total = total + cross_entropy(logits.double(), labels, reduction="sum", ignore_index=IGNORED)
        count += int((labels != IGNORED).sum())
    return total / count


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Recorder(TrainerCallback):
    """Keep the gradients of every optimiser step, before the step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append(gradients(model))


MODELS = {
    "llama": lambda: tiny.llama(),
    "llama, tied": lambda: tiny.llama(tie=True),
    "gpt2": lambda: tiny.gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}


@pytest.mark.parametrize(
    ("kind", "packing"), [("llama", False), ("llama", True), ("llama, tied", True), ("gpt2", False)]
)
def test_gradients_of_an_accumulated_step_are_those_of_each_document_alone(kind, packing, tmp_path):
    documents, model = rows(), MODELS[kind]()
    expected = oracle(model, documents)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    seen = Recorder()
    sizes = {"per_device_train_batch_size": 1 if packing else 2, "gradient_accumulation_steps": 8, "max_steps": 1}
    trainer = SFTTrainer(
        model,
        config(tmp_path, packing=packing, max_seq_length=16, max_grad_norm=0.0, **sizes),
        train_dataset=documents,
        eval_dataset=documents,
        tokenizer=tiny.tokenizer(),
        callbacks=[seen],
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    result = trainer.train()
    assert result.training_loss == pytest.approx(expected.item(), rel=1e-5)
    [found] = seen.steps
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_evaluation_does_not_depend_on_how_many_rows_a_batch_has(tmp_path):
    documents, model = rows(9), tiny.llama()
    expected = oracle(model, documents).item()
    for size in (1, 4, 20):
        args = config(tmp_path, per_device_eval_batch_size=size)
        trainer = SFTTrainer(model, args, eval_dataset={"a": documents}, tokenizer=tiny.tokenizer())
        assert trainer.evaluate()["eval_a_loss"] == pytest.approx(expected, rel=1e-5)


def test_no_logits_of_all_tokens_exist(tmp_path, monkeypatch):
    model, seen = tiny.llama(context=256), []
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: pytest.fail("the head was run on all tokens"))
    plain = ops.linear_loss

    def watched(hidden, weight, labels, *rest, **named):
        seen.append(int((labels != IGNORED).sum()))
        return plain(hidden, weight, labels, *rest, **named)

    monkeypatch.setattr(ops, "linear_loss", watched)
    ids = torch.randint(3, tiny.VOCABULARY, (40, 30)).tolist()
    documents = [{"input_ids": row, "labels": [IGNORED] * 25 + row[25:]} for row in ids]
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=40)
    monkeypatch.setattr("fastppo.trainers.sft.verify_head", lambda model: None)
    trainer = SFTTrainer(model, args, train_dataset=documents, tokenizer=tiny.tokenizer())
    trainer.train()
    # 1,200 tokens: two passes of at most 640, of each document the five tokens to learn.
    assert seen == [21 * 5, 19 * 5]


def test_models_that_cannot_be_packed_are_padded(tmp_path):
    # Attention dropout is the model's own to do: with p = 0 in effect, the padded layout has the same loss.
    documents, model = rows(), tiny.gpt2(attn_pdrop=1e-9, resid_pdrop=0.0, embd_pdrop=0.0)
    expected = oracle(model, documents).item()
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=8, learning_rate=0.0)
    trainer = SFTTrainer(model, args, train_dataset=documents, tokenizer=tiny.tokenizer())
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", ["packed", pytest.param("padded", marks=pytest.mark.slow)])
def test_checkpointed_layers_have_the_same_gradients(layout, tmp_path):
    documents, steps = rows(), []
    for is_checkpointed in (False, True):
        model = tiny.gpt2(attn_pdrop=1e-9 if layout == "padded" else 0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        seen = Recorder()
        args = config(tmp_path, max_steps=1, per_device_train_batch_size=8, activation_checkpointing=is_checkpointed)
        SFTTrainer(model, args, train_dataset=documents, tokenizer=tiny.tokenizer(), callbacks=[seen]).train()
        steps += seen.steps
    for name, grad in steps[0].items():
        torch.testing.assert_close(steps[1][name], grad, rtol=1e-4, atol=1e-6)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    documents, model, seen = rows(), tiny.llama(), Recorder()
    expected = oracle(model, documents)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    args = config(tmp_path, bf16=True, max_steps=1, per_device_train_batch_size=8)
    trainer = SFTTrainer(model, args, train_dataset=documents, tokenizer=tiny.tokenizer(), callbacks=[seen])
    loss = trainer.train().training_loss
    assert loss != pytest.approx(expected.item(), rel=1e-6)  # it is bf16
    assert loss == pytest.approx(expected.item(), rel=2e-2)
    for name, grad in wanted.items():
        assert seen.steps[0][name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(seen.steps[0][name].flatten(), grad.flatten(), dim=0) > 0.99
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("attn_pdrop", [0.0, 1e-9], ids=["packed", "padded"])
def test_neftune_s_noise_follows_each_document_s_length(attn_pdrop, tmp_path):
    documents = [{"input_ids": [3, 4, 5]}, {"input_ids": list(range(20, 32))}]
    model = tiny.gpt2(attn_pdrop=attn_pdrop, resid_pdrop=0.0, embd_pdrop=0.0)
    entered = []
    layer = model.transformer.drop
    plain = layer.forward
    layer.forward = lambda embedded: (entered.append(embedded.detach()), plain(embedded))[1]
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=0.0)
    trainer = SFTTrainer(model, args, train_dataset=documents, tokenizer=tiny.tokenizer(), neftune_noise_alpha=5.0)
    trainer.train()
    del layer.forward
    noisy = entered[-1].flatten(0, 1)
    for row in documents:
        length = len(row["input_ids"])
        ids, places = torch.tensor(row["input_ids"]), torch.arange(length)
        clean = (model.transformer.wte(ids) + model.transformer.wpe(places)).detach()
        # The batch holds the document somewhere, with noise up to alpha / sqrt(L·H).
        size = 5.0 / (length * clean.shape[1]) ** 0.5
        best = min(float((noisy[i : i + length] - clean).abs().max()) for i in range(len(noisy) - length + 1))
        assert 0.8 * size < best <= size
    assert not model.transformer.wte._forward_hooks
    quiet = SFTTrainer(
        model, config(tmp_path), eval_dataset=documents, tokenizer=tiny.tokenizer(), neftune_noise_alpha=5.0
    )
    expected = oracle(model, [{**row, "labels": row["input_ids"]} for row in documents])
    assert quiet.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_it_learns_a_sentence_and_its_end(tmp_path):
    words, model = tiny.tokenizer(), tiny.llama()
    stories = [{"story": "w3 w4 w5 w6 w7"}] * 8
    dataset = datasets.Dataset.from_list(stories)
    args = config(tmp_path, per_device_train_batch_size=8, max_steps=25, learning_rate=2e-2)
    SFTTrainer(model, args, train_dataset=dataset, processing_class=words, dataset_text_field="story").train()
    written = model.generate(torch.tensor([[3, 4]]), do_sample=False, max_new_tokens=8)
    assert words.decode(written[0]) == "w3 w4 w5 w6 w7 </s>"


def test_a_stream_is_trained_on(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": f"w{i} w{i + 1}"} for i in range(3, 12)))
    args = config(tmp_path, max_steps=5, per_device_train_batch_size=2, packing=True, max_seq_length=8)
    trainer = SFTTrainer(tiny.llama(), args, train_dataset=stream, tokenizer=tiny.tokenizer())
    assert trainer.train().global_step == 5


def test_no_pickle_is_written_or_read(tmp_path):
    model = tiny.llama()
    args = config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = SFTTrainer(model, args, train_dataset=[{"text": "w3 w4 w5"}] * 4, tokenizer=tiny.tokenizer())
    trainer.train()
    trainer.save_model()
    written = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert "model.safetensors" in written
    assert {Path(name).suffix for name in written} <= {".safetensors", ".json", ".jinja"}
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="from_pretrained"):
        trainer.train(resume_from_checkpoint=True)
    trainer.args.resume_from_checkpoint = str(tmp_path)  # as a flag of the command line does
    with pytest.raises(ValueError, match="checkpoints hold the model only"):
        trainer.train()


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def test_an_adapter_is_trained_and_saved_alone(tmp_path):
    model, seen = tiny.llama(), Recorder()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    documents, args = rows(), config(tmp_path, max_steps=1, per_device_train_batch_size=8, max_grad_norm=0.0)
    words = tiny.tokenizer()
    trainer = SFTTrainer(model, args, train_dataset=documents, tokenizer=words, peft_config=lora(), callbacks=[seen])
    oracle(trainer.model.eval(), documents).backward()
    wanted = gradients(trainer.model)
    trainer.model.zero_grad()
    trainer.train()
    assert seen.steps[0].keys() == wanted.keys()
    for name, grad in wanted.items():
        assert "lora_" in name
        torch.testing.assert_close(seen.steps[0][name], grad, rtol=1e-4, atol=1e-6)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(trainer.model.unload().state_dict(), base, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_an_adapter_on_a_quantised_model_named_by_its_folder(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    args = config(tmp_path / "out", max_steps=8, per_device_train_batch_size=4, learning_rate=2e-2)
    trainer = SFTTrainer(
        str(tmp_path / "base"),
        args,
        train_dataset=[{"text": "w3 w4 w5 w6"}] * 8,
        peft_config=lora(),
        model_init_kwargs={f"load_in_{bits}bit": True},
    )
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < first - 0.3
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_a_value_head_stays_and_is_saved_with_the_model(tmp_path):
    model = tiny.with_value_head(tiny.llama())
    head = model.v_head.summary.weight.clone()
    before = model.pretrained_model.lm_head.weight.clone()
    args = config(tmp_path, max_steps=1, learning_rate=1e-2)
    trainer = SFTTrainer(model, args, train_dataset=rows(), tokenizer=tiny.tokenizer())
    trainer.train()
    trainer.save_model()
    assert not torch.equal(model.pretrained_model.lm_head.weight, before)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(loaded.v_head.summary.weight, head)
    assert torch.equal(loaded.pretrained_model.lm_head.weight, model.pretrained_model.lm_head.weight)


def test_the_old_collator_in_the_trainer(tmp_path):
    model, words = tiny.llama(), tiny.tokenizer()
    collator = DataCollatorForCompletionOnlyLM("w9", tokenizer=words)
    texts = [{"text": "w3 w4 w9 w5 w6"}, {"text": "w3 w9 w7"}]
    documents = [
        {"input_ids": [3, 4, 9, 5, 6, 2], "labels": [IGNORED] * 3 + [5, 6, 2]},
        {"input_ids": [3, 9, 7, 2], "labels": [IGNORED, IGNORED, 7, 2]},
    ]
    for packing in (False, True):
        args = config(tmp_path, packing=packing)
        trainer = SFTTrainer(model, args, data_collator=collator, eval_dataset=texts, tokenizer=words)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(oracle(model, documents).item(), rel=1e-5)


def test_logits_are_made_for_metrics_that_ask_for_them(tmp_path):
    documents, model, seen = rows(4), tiny.llama(), []

    def metrics(prediction):
        seen.append(prediction)
        hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits[prediction.label_ids[:, 1:] != IGNORED].mean())}

    trainer = SFTTrainer(
        model, config(tmp_path), eval_dataset=documents, tokenizer=tiny.tokenizer(), compute_metrics=metrics
    )
    found = trainer.evaluate()
    hits = [
        int(guess == label)
        for row in documents
        for guess, label in zip(
            model(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1), row["labels"][1:], strict=True
        )
        if label != IGNORED
    ]
    assert found["eval_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found["eval_loss"] == pytest.approx(oracle(model, documents).item(), rel=1e-4)
    assert seen[0].predictions.shape[2] == tiny.VOCABULARY


def test_plain_training_arguments_and_names_of_trl(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, **QUIET)
    with pytest.warns(UserWarning, match="chars_per_token, num_of_sequences: not needed here"):
        trainer = SFTTrainer(
            tiny.llama(),
            args,
            train_dataset=[{"story": "w3 w4"}, {"story": "w5 w6"}],
            tokenizer=tiny.tokenizer(),
            dataset_text_field="story",
            packing=True,
            max_seq_length=6,
            num_of_sequences=4,
            chars_per_token=3.6,
        )
    assert trainer.train_dataset[0] == {
        "input_ids": [3, 4, 2, 5, 6, 2],
        "labels": [IGNORED, 4, 2, IGNORED, 6, 2],
        "position_ids": [0, 1, 2, 0, 1, 2],
    }
    trainer.train()
    assert args.remove_unused_columns  # what was given stays as it was


def test_what_cannot_work_is_refused(tmp_path):
    words = tiny.tokenizer()
    with pytest.raises(TypeError, match="max_seq_lenght"):
        SFTTrainer(tiny.llama(), config(tmp_path), tokenizer=words, max_seq_lenght=3)
    with pytest.raises(ValueError, match="see each other"):
        config(tmp_path, use_cache=True, packing=True)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1: the loss is computed without logits"):
        SFTTrainer(tiny.llama(), TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **QUIET), tokenizer=words)
    with pytest.raises(ValueError, match="compute_loss_func reads logits"):
        SFTTrainer(tiny.llama(), config(tmp_path), tokenizer=words, compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="are for a model given by its name"):
        SFTTrainer(tiny.llama(), config(tmp_path), tokenizer=words, model_init_kwargs={"dtype": "auto"})
    with pytest.raises(ValueError, match="two names of one setting"):
        config(tmp_path, max_length=8, max_seq_length=9)
    with pytest.raises(ValueError, match="max_seq_length must be at least 1, got 0"):
        config(tmp_path, max_seq_length=0)
    with pytest.raises(ValueError, match=r"dataset_kwargs has \['append_concat_token'\]"):
        config(tmp_path, dataset_kwargs={"append_concat_token": False})


def test_rows_fit_the_models_context_by_default(tmp_path):
    model, words = tiny.gpt2(context=16), tiny.tokenizer()
    long = [{"text": "w3 w4 " * 20}]
    trainer = SFTTrainer(model, config(tmp_path, max_steps=1), train_dataset=long, tokenizer=words)
    assert len(trainer.train_dataset[0]["input_ids"]) == 16
    trainer.train()
    with pytest.raises(ValueError, match="max_seq_length=20, but the model has 16 positions"):
        SFTTrainer(model, config(tmp_path), train_dataset=long, tokenizer=words, max_seq_length=20)


@pytest.mark.parametrize(("name", "other"), [("max_length", "max_seq_length"), ("max_seq_length", "max_length")])
def test_a_length_given_to_the_trainer_goes_first(tmp_path, name, other):
    rows = [{"text": "w3 w4 " * 20}]
    args = config(tmp_path, **{other: 12})
    trainer = SFTTrainer(tiny.gpt2(), args, train_dataset=rows, tokenizer=tiny.tokenizer(), **{name: 8})
    assert len(trainer.train_dataset[0]["input_ids"]) == 8


def test_an_encoder_decoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        SFTTrainer(tiny_seq2seq.network("bart"), config(tmp_path), tokenizer=tiny.tokenizer())


def test_transformers_own_collator_leaves_the_labels_as_they_are(tmp_path):
    words = tiny.tokenizer()
    rows = [{"prompt": "w3 w4", "completion": " w5"}, {"prompt": "w6", "completion": " w7 w8 w9"}]
    collator = DataCollatorForLanguageModeling(words, mlm=False)
    trainer = SFTTrainer(tiny.llama(), config(tmp_path), collator, train_dataset=rows, tokenizer=words)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert sorted(labels[labels >= 0].tolist()) == [2, 2, 5, 7, 8, 9]
    words.mask_token = "w9"
    with pytest.raises(ValueError, match="mlm=True"):
        SFTTrainer(tiny.llama(), config(tmp_path), DataCollatorForLanguageModeling(words), tokenizer=words)


def test_gradients_under_fp16_are_not_lost_before_they_are_scaled():
    model, documents = tiny.llama(), Documents(*[(torch.arange(3, 30),)] * 2)
    scale, count, found = 2.0**16, torch.tensor(2**17), []
    for is_half in (False, True):
        model.zero_grad()
        with passing(model), torch.autocast("cpu", torch.float16, enabled=is_half):
            loss = token_loss(model, documents, count)
        (loss * scale).backward()
        found.append(model.model.norm.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02 * float(found[0].abs().max()))

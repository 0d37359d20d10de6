"""Models with a value head: loading, saving, adapters, references, heads."""

import json
import logging
import warnings

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from fastppo.models.loading import translate_quantisation
from fastppo.models.network import language_head, last_hidden, verify_head, weight_version
from fastppo.models.reference import REFERENCE_ADAPTER, Reference

IDS = torch.tensor([[5, 6, 7, 8]])


def lora(**settings):
    return peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings))


ADAPTERS = {
    "attention": lora(),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "head-saved-whole": lora(modules_to_save=["lm_head"]),
}


def saved_base(tmp_path, **settings):
    tiny.llama(**settings).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def scrambled(model, seed=5):
    """Move every trainable weight, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("tie", [True, False])
def test_full_model_round_trip(tmp_path, tie):
    model = scrambled(tiny.with_value_head(tiny.llama(tie=tie)))
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
    assert_same(dict(model.state_dict()), dict(again.state_dict()))
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {"v_head.summary.weight", "v_head.summary.bias"} <= names
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(plain(IDS).logits, model.pretrained_model(IDS).logits)


def test_sharded_round_trip(tmp_path):
    model = scrambled(tiny.with_value_head(tiny.llama()))
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
    assert_same(dict(model.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_round_trip_and_plain_peft(tmp_path, name):
    base = saved_base(tmp_path)
    model = scrambled(AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=ADAPTERS[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on a head among the targets
        model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert_same(dict(model.state_dict()), dict(again.state_dict()))
    assert any(p.requires_grad for n, p in again.pretrained_model.named_parameters() if "lora" in n)
    assert set(load_file(tmp_path / "adapter" / "value_head.safetensors")) == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(IDS).logits, again.eval()(IDS)[0])


@pytest.mark.parametrize("name", ["tied", "untied", *ADAPTERS])
@pytest.mark.parametrize("is_off", [False, True])
def test_head_taken_apart_gives_the_models_logits(name, is_off):
    inner = tiny.llama(tie=name == "tied")
    if name in ADAPTERS:
        inner = scrambled(peft.get_peft_model(inner, ADAPTERS[name])).eval()
    model = tiny.with_value_head(inner)
    context = model.pretrained_model.disable_adapter() if is_off and name in ADAPTERS else torch.no_grad()
    with context:
        head = language_head(model)
        logits = head.logits(last_hidden(model, input_ids=IDS)[0], 1.0)
        torch.testing.assert_close(logits, model.pretrained_model(IDS).logits[0])


def test_adapted_head_is_trained_through():
    """The gradient of a loss on our head reaches the head's own adapter, and is that of the whole model."""
    model = scrambled(peft.get_peft_model(tiny.llama(), ADAPTERS["head"])).eval()
    hidden = last_hidden(model, input_ids=IDS)[0]
    language_head(model).logits(hidden, 1.0).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(IDS).logits.square().sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head" in name for name in theirs)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=name)


def test_a_head_that_does_more_is_refused():
    model = tiny.llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(NotImplementedError, match="more than a linear layer"):
        verify_head(model)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "opt"])
def test_scaled_and_capped_heads(family):
    from transformers import AutoConfig

    shared = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5}
    more = {
        "gemma2": {"num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8, "final_logit_softcapping": 2.0},
        "cohere": {"num_key_value_heads": 2, "intermediate_size": 32, "logit_scale": 0.25},
        "granite": {"num_key_value_heads": 2, "intermediate_size": 32, "logits_scaling": 4.0},
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8, "max_position_embeddings": 32},
    }[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shared, **more)).eval()
    wrapped = tiny.with_value_head(model)
    verify_head(wrapped)
    logits = language_head(wrapped).logits(last_hidden(wrapped, input_ids=IDS)[0], 1.0)
    torch.testing.assert_close(logits, model(IDS).logits[0])


def test_trainable_weights_are_fp32_whatever_the_checkpoint(tmp_path):
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    assert {p.dtype for p in load(tmp_path / "half").parameters()} == {torch.float32}
    assert {p.dtype for p in load(tmp_path / "half", dtype=torch.bfloat16).pretrained_model.parameters()} == {
        torch.bfloat16
    }
    adapted = load(tmp_path / "half", peft_config=lora())
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_value_head_is_fp32_on_half_precision_hidden_states():
    model = AutoModelForCausalLMWithValueHead(tiny.llama().to(torch.bfloat16))
    assert model.v_head.summary.weight.dtype == torch.float32
    logits, _, values = model(IDS)
    assert logits.dtype == values.dtype == torch.float32


def test_left_padding_does_not_change_a_row():
    model = tiny.with_value_head(tiny.gpt2())
    padded = torch.tensor([[0, 0, 5, 6, 7, 8]])
    logits, _, values = model(padded, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    alone, _, alone_values = model(IDS)
    torch.testing.assert_close(logits[:, 2:], alone)
    torch.testing.assert_close(values[:, 2:], alone_values)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_left_padded_rows_go_on_from_their_cache(make):
    model, ids = tiny.with_value_head(make()), torch.tensor([[0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    logits, _, values = model(ids, attention_mask=mask)
    cache = model(ids[:, :4], attention_mask=mask[:, :4], return_past_key_values=True)[3]
    later, _, later_values = model(ids[:, 4:], past_key_values=cache, attention_mask=mask)
    torch.testing.assert_close(later, logits[:, 4:])
    torch.testing.assert_close(later_values, values[:, 4:])


def test_shared_layers_share_their_storage():
    model = tiny.with_value_head(tiny.llama())
    reference = create_reference_model(model, num_shared_layers=1)
    policy, ref = dict(model.named_parameters()), dict(reference.named_parameters())
    for name in policy:
        is_shared = "embed_tokens" in name or "layers.0." in name
        assert (policy[name].data_ptr() == ref[name].data_ptr()) == is_shared, name
        assert policy[name].requires_grad != is_shared
        assert not ref[name].requires_grad
    with pytest.raises(ValueError, match="num_shared_layers=2: no parameter belongs to a layer"):
        create_reference_model(model, num_shared_layers=2)


def test_reference_copies_nothing_with_a_fresh_adapter():
    model = AutoModelForCausalLMWithValueHead(peft.get_peft_model(tiny.llama(), lora()))
    reference = Reference(model)
    assert reference.ref_model is None
    expected = tiny.llama()(IDS).logits
    scrambled(model)
    with reference.active() as network, torch.no_grad():
        torch.testing.assert_close(network.pretrained_model(IDS).logits, expected)
    assert not torch.allclose(model.pretrained_model(IDS).logits, expected)


def test_reference_is_the_adapter_that_the_run_started_from():
    model = AutoModelForCausalLMWithValueHead(scrambled(peft.get_peft_model(tiny.llama(), lora())).eval())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    started = model.pretrained_model(IDS).logits.detach()
    reference = Reference(model)
    assert {name: p.requires_grad for name, p in model.named_parameters() if REFERENCE_ADAPTER not in name} == flags
    scrambled(model, seed=6)
    with reference.active() as network, torch.no_grad():
        torch.testing.assert_close(network.pretrained_model(IDS).logits, started)
    assert {name: p.requires_grad for name, p in model.named_parameters() if REFERENCE_ADAPTER not in name} == flags
    assert not torch.allclose(model.pretrained_model(IDS).logits, started)


def test_weight_version_sees_every_edit():
    model = tiny.with_value_head(tiny.llama())
    before = weight_version(model)
    assert weight_version(model) == before
    weight = model.pretrained_model.lm_head.weight
    weight.data[3, 4] += 1e-7  # `.data` goes behind torch's own version counter
    assert weight_version(model) != before


def test_pickled_value_head_is_refused_with_the_remedy(tmp_path):
    base = saved_base(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora())
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "value_head.safetensors").unlink()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(ValueError, match="fastppo convert"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "old")


def test_old_quantisation_arguments_are_translated():
    kwargs = translate_quantisation({"load_in_8bit": True, "llm_int8_threshold": 0.0, "torch_dtype": torch.bfloat16})
    assert kwargs["quantization_config"].load_in_8bit
    assert kwargs["quantization_config"].llm_int8_threshold == 0.0
    assert kwargs["dtype"] == torch.bfloat16
    assert "load_in_8bit" not in kwargs
    assert translate_quantisation({"load_in_8bit": False}) == {}
    with pytest.raises(ValueError, match="both quantization_config"):
        translate_quantisation({"load_in_8bit": True, "quantization_config": object()})


def test_bad_arguments():
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    with pytest.raises(ValueError, match=r"must be a peft.PeftConfig"):
        load(tiny.llama(), peft_config={"r": 4})
    with pytest.raises(ValueError, match="prompt-learning"):
        load(tiny.llama(), peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="no language-model head"):
        load(tiny.llama().model)
    with pytest.raises(TypeError, match="unknown arguments"):
        AutoModelForCausalLMWithValueHead(tiny.llama(), dropout=0.5)


def test_loading_our_own_checkpoint_reports_nothing(tmp_path, caplog):
    tiny.with_value_head(tiny.llama()).save_pretrained(tmp_path / "model")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
        assert not caplog.records
        state = load_file(tmp_path / "model" / "model.safetensors")
        save_file(state | {"other": torch.zeros(1)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
        assert any("other" in record.getMessage() for record in caplog.records)
    finally:
        logger.removeHandler(caplog.handler)


def test_trainer_counts_only_trainable_parameters():
    model = AutoModelForCausalLMWithValueHead(peft.get_peft_model(tiny.llama(), lora()))
    trainer = PPOTrainer(PPOConfig(batch_size=2), model)
    names = {id(p): name for name, p in model.named_parameters()}
    trained = {names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all("lora" in name or "v_head" in name for name in trained)
    assert json.dumps(sorted(trained))
    assert trainer.ref_model is None

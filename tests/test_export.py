"""Exporting: what plain transformers then opens computes what the adapter on its base computed."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastppo import AutoModelForCausalLMWithValueHead
from fastppo.cli import main
from fastppo.export import export
from fastppo.models.merge import merged_weights


def bases(kind, **settings):
    return {"llama": tiny.llama, "gpt2": tiny.gpt2}[kind](**settings)


def shifted(model):
    """Let the adapter do something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def lora(base, targets="all-linear", **settings):
    from peft import LoraConfig

    is_gpt2 = base.config.model_type == "gpt2"
    config = LoraConfig(r=3, target_modules=targets, fan_in_fan_out=is_gpt2, task_type="CAUSAL_LM", **settings)
    return shifted(AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=config))


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a base and an adapter on it; the adapter's directory."""

    def save(kind="llama", base=None, **settings):
        base = bases(kind) if base is None else base
        base.save_pretrained(tmp_path / "base")
        tiny.tokenizer().save_pretrained(tmp_path / "base")
        model = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **settings)
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return save


IDS = torch.tensor([[5, 9, 3, 17, 4, 22, 8, 11]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_in_fp32_it_is_what_peft_merges(saved, tmp_path, kind):
    model, adapter = saved(kind)
    expected = logits(model.pretrained_model)
    change = export(adapter, tmp_path / "out", merged=True, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), expected, atol=2e-5, rtol=0)
    assert 0 < change.largest < 2e-5
    oracle = model.pretrained_model.merge_and_unload().state_dict()
    written = plain.state_dict()
    assert written.keys() == oracle.keys()
    for name, tensor in oracle.items():
        torch.testing.assert_close(written[name], tensor, atol=1e-6, rtol=0)


def test_bf16_rounds_once_and_the_change_is_measured(saved, tmp_path):
    model, adapter = saved()
    prompts = [IDS[0].tolist(), [7, 3, 30]]
    change = export(adapter, tmp_path / "out", merged=True, prompts=prompts)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    exact = model.pretrained_model.merge_and_unload()
    for name, tensor in exact.state_dict().items():
        assert torch.equal(weights[name], tensor.bfloat16()), name
    with torch.no_grad():
        pairs = [(m.eval()(input_ids=torch.tensor([p])).logits[0].float()) for p in prompts for m in (exact, plain)]
    differences = torch.cat([(a - b).abs() for a, b in zip(pairs[::2], pairs[1::2], strict=True)])
    # The source is not merged, which moves fp32 sums by a rounding.
    assert change.largest == pytest.approx(float(differences.max()), rel=1e-3)
    assert change.mean == pytest.approx(float(differences.mean()), rel=1e-3)
    assert change.positions == 11
    assert 0.5 < change.same_choice <= 1
    assert f"by {change.largest:.3g} at most over 11 positions" in str(change)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_on_a_tied_head_parts_it_from_the_embeddings(saved, tmp_path):
    base = tiny.llama(tie=True)
    model, adapter = saved(base=base, targets=["lm_head", "q_proj"])
    expected = logits(model.pretrained_model)
    export(adapter, tmp_path / "out", merged=True, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), expected, atol=2e-5, rtol=0)
    assert torch.equal(plain.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_what_is_tied_stays_tied(saved, tmp_path):
    _, adapter = saved(base=tiny.llama(tie=True), targets=["q_proj"])
    export(adapter, tmp_path / "out", merged=True)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_modules_that_are_trained_whole(saved, tmp_path):
    model, adapter = saved(targets=["v_proj"], modules_to_save=["lm_head"])
    expected = logits(model.pretrained_model)
    export(adapter, tmp_path / "out", merged=True, dtype=torch.float32)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=2e-5, rtol=0
    )


def test_an_adapter_that_is_off_is_left_out():
    model = lora(tiny.llama()).pretrained_model
    plain = tiny.llama().state_dict()
    with model.disable_adapter():
        weights = merged_weights(model, torch.float32)
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())


def quantised(kind, bits, folder):
    """A base in 8 or 4 bits, its dequantised weights by hand, and an adapter on it."""
    from transformers import BitsAndBytesConfig

    bases(
        kind, **({"hidden_size": 64, "intermediate_size": 128} if kind == "llama" else {"n_embd": 64})
    ).save_pretrained(folder)
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}, dtype=torch.float32
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_quantised_base_is_written_out_with_the_adapter_in_it(tmp_path, kind, bits):
    from bitsandbytes import functional

    base = quantised(kind, bits, tmp_path / "base")
    model = lora(base, targets=["q_proj", "down_proj"] if kind == "llama" else ["c_attn"]).pretrained_model
    weights = merged_weights(model, torch.float32)
    name = "model.layers.1.self_attn.q_proj" if kind == "llama" else "transformer.h.1.attn.c_attn"
    layer = model.get_base_model().get_submodule(name)
    codes = layer.base_layer.weight
    if bits == 8:
        scales = layer.base_layer.state.SCB if codes.SCB is None else codes.SCB
        plain = codes.data.float() * scales[:, None] / 127
    else:
        plain = functional.dequantize_4bit(codes.data, codes.quant_state).float()
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    expected = plain + delta
    written = weights[f"{name}.weight"]
    torch.testing.assert_close(written.t() if kind == "gpt2" else written, expected, atol=1e-6, rtol=0)
    other = "model.layers.0.mlp.gate_proj" if kind == "llama" else "transformer.h.0.mlp.c_fc"
    original = load_file(tmp_path / "base" / "model.safetensors")[f"{other}.weight"]
    assert weights[f"{other}.weight"].shape == original.shape
    step = float(original.abs().max()) / (127 if bits == 8 else 3)
    assert 0 < float((weights[f"{other}.weight"] - original).abs().max()) < step
    assert weights.keys() == bases(kind).state_dict().keys()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_trained_in_8_bits_is_exported_by_the_command(tmp_path, kind, capsys):
    base = quantised(kind, 8, tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model = lora(base, targets=["q_proj"] if kind == "llama" else ["c_attn"])
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.pretrained_model)
    command = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--merged", "--load_in_8bit"]
    assert main([*command, "--dtype", "fp32", "--value_head", "--prompt", "w5 w9 w3", "--prompt", "w4"]) == 0
    assert "over 4 positions" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(plain.config, "quantization_config")
    # The adapter's path rounds activations to 8 bits.
    assert float((logits(plain) - expected).norm() / expected.norm()) < 0.05
    with_head = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "out")
    assert torch.equal(with_head.v_head.summary.weight, model.v_head.summary.weight)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_full_model_needs_no_flag_and_no_tokenizer(tmp_path, capsys):
    tiny.with_value_head(tiny.llama()).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert "over 128 positions" in capsys.readouterr().out  # four prompts of 32 tokens
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("v_head") for name in weights)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_what_cannot_work_is_said(saved, tmp_path, capsys):
    _, adapter = saved(targets=["q_proj"])
    out = tmp_path / "out"
    for arguments, message in [
        ([str(adapter), str(out)], "is an adapter, which PEFT opens as it is; pass merged (--merged)"),
        ([str(adapter), str(adapter), "--merged"], "exists already; choose another destination"),
        ([str(tmp_path / "nowhere"), str(out)], "there is no directory"),
        ([str(tmp_path / "base"), str(out), "--value_head"], "has no value head; leave value_head out"),
        ([str(adapter), str(out), "--dtype", "int8"], "invalid choice: 'int8'"),
    ]:
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_are_more_than_a_product_are_refused(settings):
    model = lora(tiny.gpt2(), targets=["c_attn"], **settings)
    with pytest.raises(NotImplementedError, match="more than add B·A"):
        merged_weights(model, torch.float32)

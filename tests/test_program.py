"""The decode program against the models' own forward, over staggered decodes, and the decoders that it refuses."""

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from program_models import MODELS, Staggered, expected_hidden, make_model, some_texts, staggered_decode
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastppo.engine import steps
from fastppo.engine.matching import ratio
from fastppo.engine.program import Program, build_program
from fastppo.engine.tracing import UnsupportedModelError
from fastppo.models import probe
from fastppo.models.exact import exact_linears
from fastppo.models.loading import adopt_quantised

_native = pytest.importorskip("fastppo._native", reason="fastppo was installed without its C++ extension")

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-2}  # of the largest number


def program_of(model: Any) -> Program:
    program, reason = build_program(model)
    assert program is not None, reason
    return program


def assert_agrees(program: Program, model: Any, dtype: torch.dtype = torch.float32) -> None:
    texts = some_texts(97)
    for actual, expected in zip(staggered_decode(program, texts, dtype), expected_hidden(model, texts), strict=True):
        assert (actual - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_staggered_decode_gives_the_models_own_hidden_states(name):
    model = make_model(name)
    assert_agrees(program_of(model), model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi", "olmo2"])
def test_a_bfloat16_model_stays_within_its_rounding(name):
    model = make_model(name, torch.bfloat16)
    assert_agrees(program_of(model), model, torch.bfloat16)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_every_instruction_set_agrees(name, isa):
    model, before = make_model(name), _native.isa()
    try:
        _native.use_isa(isa)
        assert_agrees(program_of(model), model)
    finally:
        _native.use_isa(before)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "gate_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj"]),
    ],
)
def test_adapters_act_unmerged_and_can_be_switched(name, targets):
    config = LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules=targets,
        fan_in_fan_out=name == "gpt2",
        init_lora_weights=False,
        lora_dropout=0.5,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(make_model(name), config).eval()
    program = program_of(model)
    assert_agrees(program, model)
    with model.disable_adapter():
        program.refresh()
        assert_agrees(program, model)
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.eval()
    program.refresh()
    assert_agrees(program, model)
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="unmerge"):
        program.refresh()


def test_adapters_of_a_bfloat16_model_stay_in_fp32():
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(make_model("llama", torch.bfloat16), config, autocast_adapter_dtype=True).eval()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert_agrees(program_of(model), model, torch.bfloat16)


def test_a_variant_of_lora_is_refused():
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    program, reason = build_program(get_peft_model(make_model("llama"), config))
    assert program is None
    assert "DoRA" in reason


def test_eight_bit_weights_are_their_codes_times_the_scales_of_their_rows():
    import bitsandbytes

    model, twin = make_model("llama"), make_model("llama")
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            eight = bitsandbytes.nn.Linear8bitLt(module.in_features, module.out_features, has_fp16_weights=False)
            largest = module.weight.detach().abs().amax(1)
            codes = (module.weight.detach() * 127 / largest[:, None]).round().to(torch.int8)
            eight.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
            eight.weight.CB, eight.weight.SCB, eight.bias = codes, largest, module.bias
            twin.set_submodule(name, eight)
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(codes * largest[:, None] / 127)
    adopt_quantised(twin)
    assert_agrees(program_of(twin), model)


def test_a_refresh_sees_updates_and_replaced_weights():
    model = make_model("gemma")
    program = program_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    program.refresh()
    assert_agrees(program, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1 + 0.01
    program.refresh()
    assert_agrees(program, model)


def test_a_projection_of_zeros_hides_nothing():
    model = make_model("gpt_neox")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dense" in name:
                parameter.zero_()
    program = program_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dense" in name:
                parameter.normal_(std=0.1)
    assert_agrees(program, model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_row_has_the_same_bits_in_every_batch_and_on_any_threads(name):
    program, texts = program_of(make_model(name)), some_texts(97, (3, 40, 18))
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(staggered_decode(program, texts, torch.float32))
        alone = [staggered_decode(program, [text], torch.float32)[0] for text in texts]
        whole = [Staggered(program, 1, 64, torch.float32, seed=4).step([(0, 0, text)])[0] for text in texts]
    finally:
        torch.set_num_threads(before)
    for others in (*runs[1:], alone, whole):
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


REFUSED = {
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "feed-forward"),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "no projection feeds the activation"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "attention of its own"),
    "gptj": ({"n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_embd": 32}, "attention of its own"),
    "olmo": ({}, "LayerNorm"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused_with_the_reason(kind):
    changes, expected = REFUSED[kind]
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes)))
    program, reason = build_program(model)
    assert program is None
    assert expected in reason


def test_a_model_is_left_as_it_was():
    model = make_model("gemma3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, implementation = torch.get_rng_state(), model.config._attn_implementation
    program_of(model)
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_traced_model_can_be_freed():
    model = make_model("llama")
    program, alive = program_of(model), weakref.ref(model)
    del model, program
    gc.collect()
    assert alive() is None


def test_bad_input_is_named():
    program = program_of(make_model("opt"))
    run = Staggered(program, 1, 200, torch.float32)
    with pytest.raises(ValueError, match="expected 0 to 96"):
        run.step([(0, 0, torch.tensor([97]))])
    with pytest.raises(ValueError, match="position 130 is past the 128"):
        run.step([(0, 130, torch.tensor([5]))])
    with pytest.raises(ValueError, match="position 120 is past the 112"):
        Staggered(program, 1, 100, torch.float32).step([(0, 120, torch.tensor([5]))])
    run.pools[0] = run.pools[0][::-1]
    with pytest.raises(ValueError, match="a layer's cache is"):
        run.step([(0, 0, torch.tensor([5]))])
    run.tables = [table.long() for table in run.tables]
    with pytest.raises(ValueError, match="block tables"):
        run.step([(0, 0, torch.tensor([5]))])


def test_a_step_of_nothing_is_nothing():
    program = program_of(make_model("llama"))
    empty = torch.zeros(0, dtype=torch.int64)
    assert program.step(empty, empty, empty, [], []).shape == (0, 48)


@pytest.mark.parametrize(("scale", "size"), [(1.0, 0.1), (1.0, 1.0), (1.0, 8.0), (0.22, 1.0), (0.5, 1.0), (1.4, 1.0)])
def test_the_factor_of_what_was_added_is_read_through_bf16(scale, size):
    """`size` is that of the hidden states beside what is added, which decides how much of it rounding takes."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        before = (size * torch.randn(7, 288, generator=generator)).bfloat16()
        added = torch.randn(7, 288, generator=generator).bfloat16()
        after = before + scale * added
        assert ratio(after - before, added) == pytest.approx(scale, rel=2e-3 if scale != 1 else 0)


def almost_mixed(model, sequences):
    """The program's hidden states, one of which is a little larger."""
    first, *others = steps._mixed(model, sequences)
    first[0, 0] *= 1.01
    return [first, *others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3"])
def test_a_program_without_layer_norms_has_the_last_digits_of_the_update(name, dtype):
    model = make_model(name).to(dtype).eval()
    with exact_linears(model):
        assert probe.is_same(model, "the same", steps._mixed, steps._updated)
        assert not probe.is_same(model, "another", almost_mixed, steps._updated)

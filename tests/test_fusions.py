"""What is fused in real models, that it changes no result, and that nothing stays behind."""

import contextlib
import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import gpt2, llama, with_value_head
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastppo import ops, reference_fused
from fastppo.models import fusions
from fastppo.models.fusions import find, fused
from fastppo.models.network import body, evaluating
from fastppo.models.recompute import checkpointing

pytest.importorskip("fastppo._native", reason="built without the C++ extension")

NORM, GEMMA, SILU, TANH = "rms_norm, offset 0", "rms_norm, offset 1", "gated silu", "gated gelu_tanh"
FAMILIES = {
    "llama": {NORM: 5, SILU: 2, "rotary": 1},
    "mistral": {NORM: 5, SILU: 2, "rotary": 1},
    "qwen3": {NORM: 9, SILU: 2, "rotary": 1},  # queries and keys are normed too
    "gemma2": {GEMMA: 9, TANH: 2, "rotary": 1},
    "phi3": {NORM: 5, SILU: 2, "rotary, partial": 1},
    "glm4": {NORM: 9, SILU: 2},  # rotates pairs of neighbours
    "gpt_neox": {"rotary, partial": 1},
    "gpt2": {},
}


def build(family, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=40, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=4 if family == "gpt_neox" else 2, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide a mistake
            nn.init.normal_(parameter, mean=0.7, std=0.2)
    return model


def kinds(model):
    found = [fusion.kind for fusion in find(model)]
    return {kind: found.count(kind) for kind in found}


def results(model, ids):
    """Return the hidden states and every gradient of a loss on them."""
    hidden = body(model)(input_ids=ids, use_cache=False)[0]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    upstream = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape).to(hidden)
    return [hidden.detach(), *torch.autograd.grad((hidden * upstream).sum(), parameters, allow_unused=True)]


def assert_agree(ours, expected, tolerance):
    for our, truth in zip(ours, expected, strict=True):
        assert (our is None) == (truth is None)
        if truth is not None:
            size = float(truth.abs().max()) or 1.0
            torch.testing.assert_close(our, truth, atol=tolerance * size, rtol=0)


@pytest.fixture
def ids():
    return torch.randint(3, 40, (3, 11))


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the fused operations."""
    counts = dict.fromkeys(("rms_norm", "gated_activation", "rotary"), 0)

    def counting(name, function):
        def count(*arguments, **named):
            counts[name] += 1
            return function(*arguments, **named)

        return count

    for name in counts:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_fused_by_structure_and_give_the_same(family, ids, calls):
    model = build(family) if family != "gpt2" else gpt2()
    assert kinds(model) == FAMILIES[family]
    assert all(fusion.deviation < 2e-6 for fusion in find(model))
    expected, keys = results(model, ids), list(model.state_dict())
    for name in calls:
        calls[name] = 0
    with fused(model):
        assert list(model.state_dict()) == keys
        ours = results(model, ids)
    assert_agree(ours, expected, 2e-5)
    count = {name: sum(n for kind, n in FAMILIES[family].items() if kind.startswith(name[:5])) for name in calls}
    layers = 2
    assert calls == {**count, "rotary": 2 * layers * count["rotary"]}
    results(model, ids)
    assert calls == {**count, "rotary": 2 * layers * count["rotary"]}, "outside, the model is its own again"


def test_bf16_is_as_near_to_fp32_as_without(ids):
    model = build("llama")
    exact = results(model, ids)
    model = model.to(torch.bfloat16)
    assert kinds(model) == FAMILIES["llama"]
    plain = results(model, ids)
    with fused(model):
        ours = results(model, ids)

    def error(parts):
        return sum(float((a.float() - b).norm() / b.norm()) for a, b in zip(parts, exact, strict=True) if b is not None)

    assert not ours[0].equal(plain[0])
    assert error(ours) <= 1.1 * error(plain)


def test_gradient_checkpointing_computes_again_what_it_computed(ids):
    model = build("llama")
    with evaluating(model):
        expected = results(model, ids)
    with_value_head(model).gradient_checkpointing_enable()
    with evaluating(model), checkpointing(model):
        ours = results(model, ids)
    assert all(a is b is None or a.equal(b) for a, b in zip(ours, expected, strict=True))


def test_adapters_inside_are_trained(ids):
    model = get_peft_model(build("qwen3"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    assert kinds(model) == FAMILIES["qwen3"] | {"lora": 14}
    expected = results(model, ids)
    with fused(model):
        ours = results(model, ids)
    assert len(ours) > 14
    assert all(part is not None for part in ours)
    assert_agree(ours, expected, 2e-5)


def adapted(dtype=torch.float32, **settings):
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False} | settings
    torch.manual_seed(1)
    model = get_peft_model(build("llama").to(dtype), LoraConfig(**settings)).eval()
    model.add_adapter("other", LoraConfig(**settings | {"r": 2, "target_modules": ["q_proj", "down_proj"]}))
    return model


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"]])
def test_every_adapter_in_use_is_added_and_trained(ids, names):
    model = adapted()
    model.base_model.set_adapter(names)
    assert kinds(model)["lora"] == 14
    expected = results(model, ids)
    with fused(model):
        assert_agree(results(model, ids), expected, 2e-5)
        with model.disable_adapter():
            off = body(model)(input_ids=ids, use_cache=False)[0]
    with model.disable_adapter():
        torch.testing.assert_close(off, body(model)(input_ids=ids, use_cache=False)[0], atol=2e-5, rtol=2e-5)


def test_adapters_in_fp32_beside_a_bf16_base_lose_no_more_than_it_does(ids):
    exact, model = adapted(), adapted(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert kinds(model)["lora"] == 14
    exact.load_state_dict(model.state_dict())
    truth, plain = results(exact, ids), results(model, ids)
    with fused(model):
        ours = results(model, ids)

    def error(parts):
        pairs = [(a.float(), b) for a, b in zip(parts, truth, strict=True) if b is not None]
        return sum(float((a - b).norm() / b.norm()) for a, b in pairs)

    assert not ours[0].equal(plain[0])
    assert error(ours) <= 1.2 * error(plain)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")  # that it cannot be merged
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_adapters_that_do_more_are_left_to_peft(ids, settings):
    model = adapted(**settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    if "lora_dropout" in settings:
        layer.train()
    x, _ = torch.randn(2, 3, 32), find(model)
    expected, ours = [], []
    for found in (expected, ours):
        torch.manual_seed(0)
        with fused(model) if found is ours else contextlib.nullcontext():
            found.append(layer(x))
    assert ours[0].equal(expected[0])


def attached(model):
    """Return what `fused` has put in place."""
    namespace = sys.modules[type(body(model)).__module__]
    modules = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return modules, namespace.apply_rotary_pos_emb


def test_nothing_stays_behind_not_even_after_an_error():
    model = llama()
    before = attached(model)

    def fail_inside():
        with fused(model), fused(model):
            assert len(attached(model)[0]) == 7
            assert attached(model)[1] is not before[1]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert attached(model) == before == ([], before[1])
    with evaluating(model):
        assert len(attached(model)[0]) == 7
    assert attached(model) == before


def test_a_second_model_of_the_kind_may_come_and_go_inside(ids):
    model, other = llama(), llama(seed=1)
    before = attached(model)
    with fused(model):
        inside = attached(model)
        with fused(other):
            assert len(attached(other)[0]) == 7
        assert attached(model) == inside
    assert attached(model) == attached(other) == before
    with fused(other):
        assert attached(other)[1] is not before[1]


def test_another_ones_forward_is_left_alone():
    model = llama()
    norm = model.model.norm
    own = vars(norm)["forward"] = lambda x: x
    with fused(model):
        assert norm.forward is own
    assert norm.forward is own


def test_a_copy_made_inside_computes_with_its_own_weights(ids):
    model = llama()
    with fused(model), torch.no_grad():
        double = copy.deepcopy(model)
        for parameter in double.model.norm.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(body(double)(input_ids=ids)[0], 2 * body(model)(input_ids=ids)[0])


def test_the_plain_backend_means_the_models_own_code(calls, ids):
    model = llama()
    with ops.use_backend("reference"), fused(model):
        results(model, ids)
    assert not any(calls.values())


def test_finding_works_in_inference_mode_and_leaves_no_trace():
    model, before = build("llama"), torch.get_rng_state()
    with torch.inference_mode():
        assert kinds(model) == FAMILIES["llama"]
    assert torch.get_rng_state().equal(before)
    assert all(parameter.grad is None for parameter in model.parameters())


class Norm(nn.Module):
    """A norm with a switch for each of the ways in which it could be another."""

    def __init__(self, change=""):
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.ones(6)), 1e-3, change

    def forward(self, x):
        if self.change == "mean":
            x = x - x.mean(-1, keepdim=True)
        square = x.pow(2).mean(-1, keepdim=True)
        if self.change == "gradient":
            square = square.detach()
        factor = self.weight.square() if self.change == "weight" else self.weight
        return x * torch.rsqrt(square + self.eps * (2 if self.change == "eps" else 1)) * factor


class Gated(nn.Module):
    def __init__(self, change=""):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
        self.act_fn = nn.ReLU() if change == "activation" else nn.SiLU()
        self.change = change
        if change == "norm":
            self.norm = nn.LayerNorm(9)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.change == "swapped":
            gate, up = up, gate
        inner = self.act_fn(gate) * up
        return self.down_proj(self.norm(inner) if self.change == "norm" else inner)


@pytest.mark.parametrize("change", ["", "mean", "gradient", "weight", "eps"])
def test_only_what_computes_a_norm_is_taken_for_one(change):
    assert kinds(nn.Sequential(Norm(change))) == ({} if change else {NORM: 1})


@pytest.mark.parametrize("change", ["", "activation", "swapped", "norm"])
def test_only_what_computes_a_gated_activation_is_taken_for_one(change):
    assert kinds(nn.Sequential(Gated(change))) == ({} if change else {SILU: 1})


def test_more_arguments_than_one_are_the_modules_own_business():
    class Scaled(Norm):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    model = nn.Sequential(Scaled())
    assert kinds(model) == {NORM: 1}
    x = torch.randn(3, 6)
    expected = model[0](x, 2.0)
    with fused(model):
        assert model[0](x, 2.0).equal(expected)
        assert model[0](x, scale=2.0).equal(expected)


def test_activations_are_told_apart():
    for name, function in reference_fused.ACTIVATIONS.items():
        assert fusions._known_activation(function) == name
    assert fusions._known_activation(nn.Hardswish()) is None

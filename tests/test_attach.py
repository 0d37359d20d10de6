"""The probe: it refuses whatever would be silently wrong, and leaves a model as it was."""

import types

import families
import pytest
import tiny
import torch

from fastppo import attention
from fastppo.attention import Packed, attend, attending
from fastppo.models import attach, probe


def dropping(name, replacement):
    """Return attention functions that lose one argument."""

    def without(function):
        return lambda *args, **shape: function(*args, **(shape | {name: replacement}))

    return {each: without(getattr(attention, each)) for each in ("ragged_attention", "paged_attention")}


@pytest.mark.parametrize("layout", [probe.packed, probe.paged])
@pytest.mark.parametrize(
    ("family", "argument", "wrong"),
    [
        ("mistral", "window", None),
        ("gemma2", "softcap", None),
        ("gpt_oss", "sinks", None),
        ("granite", "scale", 0.1),
        ("gemma2", "window", 16),
    ],
)
def test_a_lost_argument_is_noticed(monkeypatch, layout, family, argument, wrong):
    assert layout(families.build(family))
    for name, function in dropping(argument, wrong).items():
        monkeypatch.setattr(attention, name, function)
    refused = layout(families.build(family))
    assert not refused
    assert refused.error > 10 * refused.bound


def test_gradients_that_are_lost_are_noticed(monkeypatch):
    right = attention.ragged_attention
    lost = {
        "sinks": lambda q, k, v, at, **shape: right(q, k, v, at, **(shape | {"sinks": shape["sinks"].detach()})),
        "keys": lambda q, k, v, at, **shape: right(q, k.detach(), v, at, **shape),
    }
    for function in lost.values():
        assert probe.trains_packed(families.build("gpt_oss"))
        monkeypatch.setattr(attention, "ragged_attention", function)
        model = families.build("gpt_oss")
        assert probe.packed(model)
        assert "gradients differ" in probe.trains_packed(model).reason
        monkeypatch.undo()


def test_a_window_longer_than_the_probe_is_noticed(monkeypatch):
    model = families.build("mistral")
    model.config.sliding_window = 100
    for name, function in dropping("window", None).items():
        monkeypatch.setattr(attention, name, function)
    assert not probe.packed(model)
    assert model.config.sliding_window == 100


def test_blocks_that_are_mixed_up_are_noticed(monkeypatch):
    right = attention.paged_attention
    shuffled = lambda q, pool, rows, at, tables, **shape: right(q, pool, rows, at, tables.flip(1), **shape)  # noqa: E731
    monkeypatch.setattr(attention, "paged_attention", shuffled)
    assert not probe.paged(tiny.llama())


def test_neighbours_that_leak_are_noticed(monkeypatch):
    right = attention.ragged_attention
    whole = lambda q, k, v, offsets, **shape: right(q, k, v, offsets[[0, -1]], **shape)  # noqa: E731
    monkeypatch.setattr(attention, "ragged_attention", whole)
    assert not probe.packed(tiny.llama())


def test_the_probe_leaves_no_trace():
    model = tiny.with_value_head(families.build("gemma2")).train()
    model.pretrained_model.model.layers[0].eval()
    model.pretrained_model.config.sliding_window = 50
    modes = [module.training for module in model.modules()]
    state, random = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    assert probe.paged(model)
    assert probe.packed(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.pretrained_model.config.sliding_window == 50
    assert model.pretrained_model.config._attn_implementation == "eager"


def test_an_exception_inside_leaves_the_model_detached():
    model = families.build("gemma3_text")
    with pytest.raises(RuntimeError, match="outside of `attending"), attach.attached(model):
        model(torch.tensor([[1, 2]]))
    assert not attach.is_attached(model)
    assert all(config._attn_implementation == "sdpa" for config in attach._configs(model))


def test_weights_that_are_not_finite_are_no_reason_to_refuse_a_layout():
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        probe.paged(model)
    with torch.no_grad():
        model.lm_head.weight[3] = 0.0
    assert probe.paged(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("position_bias", torch.zeros(1)), ("dropout", 0.1), ("is_causal", False), ("indices", torch.zeros(1))],
)
def test_an_argument_that_attention_does_not_know_is_refused_by_name(name, value):
    q, module = torch.randn(1, 2, 3, 4), types.SimpleNamespace(layer_idx=0)
    with attending(Packed(torch.tensor([0, 3], dtype=torch.int32))):
        attend(module, q, q, q, position_ids=torch.arange(3), is_causal=True)
        with pytest.raises(NotImplementedError, match=name):
            attend(module, q, q, q, **{name: value})


def test_the_layers_of_a_cache_are_learnt_from_what_attention_is_given():
    shapes = probe.layer_shapes(families.build("deepseek_v3"))
    assert [(s.kv_heads, s.head_size, s.value_size) for s in shapes.values()] == [(4, 12, 12)] * 2
    shapes = probe.layer_shapes(families.build("gemma2"))
    assert [s.window for s in shapes.values()] == [8, None]
    assert shapes[0].features == ("soft cap",)
    assert probe.layer_shapes(families.build("gpt_oss"))[0].features == ("sinks",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bound_follows_the_roundings_of_the_dtype(monkeypatch, dtype):
    """In half precision layouts differ visibly; a lost soft cap, the smallest of the losses above, still shows."""
    for family in ("llama", "gemma2", "qwen2"):
        assert probe.paged(families.build(family).to(dtype)), family
    for name, function in dropping("softcap", None).items():
        monkeypatch.setattr(attention, name, function)
    assert not probe.paged(families.build("gemma2").to(dtype))

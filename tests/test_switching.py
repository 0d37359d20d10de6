"""Switching between the adapters of one base: PEFT's own numbers, one trace, one graph, one compile for all of them."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_graphs import Captured
from torch import nn

from fastppo import Engine, SamplingConfig
from fastppo.engine import engine as engine_module
from fastppo.engine import program
from fastppo.engine.kv import PagedCache
from fastppo.engine.slots import Slots
from fastppo.models import lora
from fastppo.models.adapters import add_adapter, using_adapter, without_adapters
from fastppo.models.network import active_adapters, body, to_bf16

PARTS = {
    "policy": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "critic": LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 7},
        alpha_pattern={"q_proj": 9},
    ),
    "reward": LoraConfig(r=1, lora_alpha=0.3, target_modules=["q_proj", "up_proj"]),
}  # fmt: skip


def with_parts(model=None, parts=PARTS):
    """Return a PEFT model whose adapters all do something; only policy and critic are trained."""
    (first, settings), *rest = parts.items()
    model = get_peft_model(tiny.llama() if model is None else model, copy.deepcopy(settings), adapter_name=first)
    for name, settings in rest:
        add_adapter(model, name, copy.deepcopy(settings))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("policy" in name or "critic" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def state(model):
    tuner = model.base_model
    return (
        [parameter.requires_grad for parameter in model.parameters()],
        active_adapters(model), model.active_adapter, tuner.active_adapter,
    )  # fmt: skip


def logprobs_and_gradients(model, ids):
    logprobs = model(input_ids=ids).logits.log_softmax(-1)
    upstream = torch.linspace(-1, 1, logprobs.numel(), dtype=logprobs.dtype).view(logprobs.shape)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((logprobs * upstream).sum(), trained.values(), allow_unused=True)
    return logprobs.detach(), dict(zip(trained, found, strict=True))


@pytest.fixture
def ids():
    return torch.randint(3, 40, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("part", PARTS)
def test_log_probs_and_gradients_of_every_part_are_pefts_own_in_fp64(part, ids):
    model = with_parts().double()
    plain, before = copy.deepcopy(model), state(model)
    plain.set_adapter(part)
    expected, gradients = logprobs_and_gradients(plain, ids)
    with using_adapter(model, part):
        replaced = [m for m in model.modules() if lora.find_layer(m) is not None]
        for layer in replaced:
            vars(layer)["forward"] = lora.find_layer(layer)
        actual, found = logprobs_and_gradients(model, ids)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    assert sum(name in gradients for name in found) == len(gradients) > 0
    for name, gradient in found.items():
        if part in name:
            assert gradient.any()
            torch.testing.assert_close(gradient, gradients[name], atol=1e-11, rtol=1e-9)
        else:
            assert gradient is None, name
    assert state(model) == before


def test_everything_is_as_it_was_after_an_error_and_with_several_adapters_on():
    model = with_parts()
    model.base_model.set_adapter(["policy", "critic"])
    before = state(model)

    def fail(switch):
        with switch:
            assert state(model)[1] != before[1]
            raise RuntimeError("inside")

    for switch in (using_adapter(model, "reward"), without_adapters(model)):
        with pytest.raises(RuntimeError, match="inside"):
            fail(switch)
        assert state(model) == before
    with without_adapters(model):
        off = state(model)
        with torch.no_grad(), using_adapter(model, "critic"):
            assert all(part == (False, ("critic",)) for part in active_adapters(model))
        assert state(model) == off


def test_an_adapter_more_changes_no_flag():
    model = with_parts(parts={"policy": PARTS["policy"]})
    model.get_input_embeddings().requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    add_adapter(model, "critic", copy.deepcopy(PARTS["critic"]))
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert model.active_adapters == ["policy"]


def test_an_adapter_that_peft_adds_later_is_switched_too(ids):
    model = with_parts(parts={"policy": PARTS["reward"]})
    with using_adapter(model, "policy"):
        pass
    model.add_adapter("late", PARTS["policy"])
    for name, parameter in model.named_parameters():
        if "lora_B.late" in name:
            nn.init.normal_(parameter, std=0.3)
    plain = copy.deepcopy(model)
    plain.set_adapter("late")
    with using_adapter(model, "late"), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    model.delete_adapter("late")
    model.add_adapter("late", PARTS["reward"])
    plain = copy.deepcopy(model)
    plain.set_adapter("late")
    with using_adapter(model, "late"):
        assert active_adapters(model) == active_adapters(plain)


def test_layers_that_are_trained_whole_follow_the_adapter(ids):
    whole = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = with_parts(parts={"policy": whole, "reward": PARTS["reward"]})
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["policy"].weight.mul_(2)
    for part in ("policy", "reward"):
        plain = copy.deepcopy(model)
        plain.set_adapter(part)
        with using_adapter(model, part), torch.no_grad():
            torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    with model.disable_adapter():
        expected = model(ids).logits
    with without_adapters(model):
        assert model(ids).logits.equal(expected)


def under(model, part):
    return without_adapters(model) if part is None else using_adapter(model, part)


ORDER = ["policy", "critic", None, "reward", "policy"]


def test_slots_give_what_peft_gives_whatever_lay_in_them_before(ids):
    model = with_parts().double()
    slots, places = Slots(model, torch.float64), set()
    for part in ORDER:
        with torch.no_grad(), under(model, part):
            expected = body(model)(ids)[0]
            places.add(slots.write())
        with torch.no_grad(), slots.serving():
            torch.testing.assert_close(body(model)(ids)[0], expected, atol=1e-12, rtol=0)
    assert len(places) == 1
    model.base_model.set_adapter(["policy", "critic"])  # the sum of both, for which there is no room
    with torch.no_grad():
        expected = body(model)(ids)[0]
        assert slots.write() not in places
        with slots.serving():
            torch.testing.assert_close(body(model)(ids)[0], expected, atol=1e-12, rtol=0)
    assert not any("forward" in vars(module) for module in model.modules())


def test_slots_in_bf16_are_as_near_as_pefts_wide_products(ids):
    model = with_parts(tiny.llama(hidden_size=64, intermediate_size=96))
    to_bf16(model)
    exact, slots = copy.deepcopy(model).double(), Slots(model, torch.bfloat16)
    for part in ("policy", "critic"):
        with torch.no_grad(), under(model, part), under(exact, part):
            truth, theirs = body(exact)(ids)[0], body(model)(ids)[0]
            slots.write()
            with slots.serving():
                ours = body(model)(ids)[0]
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).norm() < 1.3 * (theirs - truth).norm()


def test_a_number_that_is_none_does_not_stay_behind(ids):
    model = with_parts()
    slots = Slots(model, torch.float32)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["critic"].weight.fill_(torch.nan)
        for part in ("critic", "policy"):
            with using_adapter(model, part):
                slots.write()
        with slots.serving():
            assert body(model)(ids)[0].isfinite().all()


def test_what_is_more_than_a_product_stays_pefts_and_is_told_apart(ids):
    model = with_parts(
        parts={"policy": PARTS["policy"], "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)}
    )
    slots, found = Slots(model, torch.float32), []
    for part in ("policy", "dora"):
        with torch.no_grad(), using_adapter(model, part):
            expected = body(model)(ids)[0]
            found.append(slots.write())
            with slots.serving():
                torch.testing.assert_close(body(model)(ids)[0], expected)
    assert found[0] != found[1]
    transposed = get_peft_model(tiny.gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    slots = Slots(transposed, torch.float32)
    on = slots.write()
    with transposed.disable_adapter():
        assert slots.write() != on


def test_rows_with_adapters_of_their_own_are_refused(ids):
    model = with_parts()
    slots = Slots(model, torch.float32)
    slots.write()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with slots.serving(), pytest.raises(ValueError, match=r"adapter_names=\['policy', '__base__'\] asks for"):
        layer(torch.randn(2, 3, 16), adapter_names=["policy", "__base__"])


def test_one_compile_serves_every_part(ids):
    model, graphs = with_parts(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    slots, x = Slots(model, torch.float32), torch.randn(5, 16)
    compiled = torch.compile(lambda x: layer(x), backend=backend, fullgraph=True)
    for part in ORDER:
        with torch.no_grad(), under(model, part):
            expected = layer(x)
            slots.write()
            with slots.serving():
                torch.testing.assert_close(compiled(x), expected)
    assert len(graphs) == 1


def generate(engine, model, part, **more):
    with under(model, part):
        engine.num_requests = 0
        return engine.generate(tiny.queries(4), SamplingConfig(max_new_tokens=12, min_new_tokens=12), **more)


def assert_same(rollout, other):
    assert rollout.tokens.equal(other.tokens)
    torch.testing.assert_close(rollout.logprobs, other.logprobs, atol=2e-5, rtol=0)


def alone(model):
    """Return what an engine of its own generates for each part, through the model's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "program_step", lambda model, cache: None)
        return {part: generate(Engine(model, seed=3), model, part) for part in ORDER}


def test_one_captured_graph_decodes_for_every_part(monkeypatch):
    monkeypatch.setattr(engine_module, "has_paged_kernels", lambda device: True)
    monkeypatch.setattr(engine_module, "program_step", Captured)
    monkeypatch.setattr(Captured, "made", [])
    monkeypatch.setattr(PagedCache, "addresses", lambda cache: ())  # on the host every call finds other memory
    model = with_parts()
    engine, plain = Engine(model, seed=3), alone(model)
    assert not plain["policy"].tokens.equal(plain["critic"].tokens)
    for part in ORDER:
        assert_same(generate(engine, model, part), plain[part])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.policy" in name:
                parameter.neg_()
    changed = generate(engine, model, "policy")
    assert_same(changed, alone(model)["policy"])
    assert not changed.tokens.equal(plain["policy"].tokens)
    (step,) = Captured.made
    assert step.captures == 1
    assert step.replays > 40


def test_one_trace_serves_the_program_for_every_part(monkeypatch):
    pytest.importorskip("fastppo._native", reason="built without the C++ extension")
    model = with_parts()
    engine, plain = Engine(model, seed=3), alone(model)
    generate(engine, model, "critic")
    monkeypatch.setattr(program, "trace", None)
    for part in ORDER:
        assert_same(generate(engine, model, part), plain[part])
        assert engine.metrics()["decoder"] == "program"

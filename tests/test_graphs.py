"""Steps that the host does not look at, and decode steps that are captured: the same tokens, without a GPU."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_paged_engine import LIMITS, MODELS, assert_expected, bytes_of_a_block

from fastppo import Engine, SamplingConfig
from fastppo.engine import engine as engine_module
from fastppo.engine.graphs import GraphStep, padded_rows
from fastppo.engine.requests import Draw, in_one_copy


class Captured(GraphStep):
    """Captures like a graph does: what is run later reads and writes in the same places, and nothing else."""

    refuses, made = False, []

    def __init__(self, model, cache):
        super().__init__(model, cache)
        self.replays = 0
        self.made.append(self)

    def _capture(self, run):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        hidden = torch.full_like(run(), torch.nan)  # a capture computes nothing

        def replay():
            self.replays += 1
            hidden.copy_(run())

        return hidden, replay


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Decode through graphs, five steps at a time, on the host."""
    monkeypatch.setattr(engine_module, "has_paged_kernels", lambda device: True)
    monkeypatch.setattr(engine_module, "program_step", Captured)
    monkeypatch.setattr(engine_module, "STEPS_PER_CHECK", {"cpu": 5})
    monkeypatch.setattr(Captured, "made", [])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("rows", "tokens", "blocks"), [(64, 2048, None), (3, 5, None), (64, 7, 6), (1, 1, 4)])
def test_equals_the_naive_loop_whatever_the_schedule(name, rows, tokens, blocks):
    model, queries = MODELS[name](), tiny.queries(6, longest=20)
    memory = None if blocks is None else blocks * bytes_of_a_block(model)
    engine = Engine(model, seed=7, max_rows=rows, prefill_tokens=tokens, kv_memory=memory)
    rollout = engine.generate(queries, SamplingConfig(), n=2, max_new_tokens=LIMITS)
    metrics = engine.metrics()
    assert metrics["decoder"] == "graphs"
    assert metrics["decode_tokens"] >= len(rollout.tokens) - 12 - metrics["recomputed_tokens"]
    assert_expected(name, rollout)


def one_by_one(monkeypatch, make, *args, **more):
    """Return what an engine generates without graphs, looking at every token."""
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "STEPS_PER_CHECK", {})
        patch.setattr(engine_module, "program_step", lambda model, cache: None)
        return make().generate(*args, **more)


def assert_same(rollout, other):
    for name in ("tokens", "logprobs", "entropies", "kept_mass", "reasons"):
        one, two = getattr(rollout, name), getattr(other, name)
        assert one == two if name == "reasons" else torch.allclose(one, two, atol=1e-5), name


@pytest.mark.parametrize("more", [{"min_new_tokens": 7}, {"top_k": 5, "temperature": 0.7}, {"do_sample": False}])
def test_settings_reach_the_steps_that_nobody_looks_at(monkeypatch, more):
    model = tiny.with_value_head(tiny.llama())
    queries, sampling = tiny.queries(6), SamplingConfig(max_new_tokens=23, **more)

    def make():
        return Engine(model, max_rows=4, seed=3)

    rollout, other = make().generate(queries, sampling), one_by_one(monkeypatch, make, queries, sampling)
    assert_same(rollout, other)
    assert torch.allclose(rollout.values, other.values, atol=1e-5)
    assert Captured.made[0].replays > 20


def test_turns_and_kept_sequences_survive_what_was_drawn_too_much(monkeypatch):
    def make():
        return Engine(tiny.llama(), seed=5)

    engine, queries, more = make(), tiny.queries(6), [[4, 5]] * 6
    first = engine.generate(queries, max_new_tokens=13, keep=True)
    second = engine.continue_(first, more, max_new_tokens=21)
    other = make()
    before = one_by_one(monkeypatch, lambda: other, queries, max_new_tokens=13)
    assert_same(first, before)
    assert "stop" in first.reasons
    assert engine.metrics()["prefill_tokens"] < sum(map(len, second.queries)) / 2
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "STEPS_PER_CHECK", {})
        assert_same(second, other.continue_(before, more, max_new_tokens=21))


def test_a_graph_is_captured_once_and_again_when_something_moved():
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    engine, sampling = Engine(model, seed=1), SamplingConfig(max_new_tokens=30, min_new_tokens=30)
    first = engine.generate(tiny.queries(3), sampling)
    (step,) = Captured.made
    assert (step.captures, step.replays) == (1, 28)  # one token comes with the prompt, one step warms up

    def forgets():
        step._graphs = {8: "a graph"}
        assert step.refresh()
        return not step._graphs

    with torch.no_grad():
        layer.weight.mul_(1.5)
    assert not forgets()
    with model.disable_adapter():
        assert not forgets()
    layer.weight.data = layer.weight.data / 1.5
    assert forgets()
    step._graphs, step._places = {8: "a graph of memory that was given back"}, ("elsewhere",)
    engine.num_requests = 0
    assert_same(engine.generate(tiny.queries(3), sampling), first)
    assert step.captures == 2


def test_a_model_that_cannot_be_captured_is_decoded_as_it_is(monkeypatch):
    monkeypatch.setattr(Captured, "refuses", True)

    def make():
        return Engine(tiny.llama(), seed=2)

    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be captured .* operation not permitted") as warned:
        rollout = make().generate(tiny.queries(5), max_new_tokens=20)
    assert len(warned) == 1
    assert_same(rollout, one_by_one(monkeypatch, make, tiny.queries(5), max_new_tokens=20))


def test_a_stream_and_a_cancellation_come_in_pieces():
    engine = Engine(tiny.llama(), seed=7)
    with engine.stream(tiny.queries(4), max_new_tokens=24, min_new_tokens=24) as stream:
        events = [next(stream) for _ in range(6)]
        engine.cancel([1])
        events += list(stream)
        rollout = stream.rollout()
    for request, response in enumerate(rollout):
        assert [e.token for e in events if e.request == request and e.token is not None] == response.tolist()
    assert rollout.reasons == ("length", "cancelled", "length", "length")
    assert len(rollout[1]) < 24


def test_padded_rows_waste_at_most_a_third():
    found = [padded_rows(rows) for rows in range(1, 300)]
    assert sorted(set(found)) == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384]
    assert all(rows <= padded <= max(8, 1.5 * rows) for rows, padded in enumerate(found, 1))


def test_draws_reach_the_host_as_they_were():
    tokens, logprobs = torch.tensor([2**40 + 1, 3]), torch.tensor([-1.25, float("nan")])
    for values in (torch.rand(2, dtype=torch.bfloat16), None):
        draws = [Draw(tokens + ahead, logprobs - ahead, torch.rand(2), torch.rand(2), values) for ahead in range(3)]
        for draw, moved in zip(draws, in_one_copy(draws), strict=True):
            assert [part is None for part in draw] == [part is None for part in moved]
            for part, other in zip(draw, moved, strict=True):
                assert part is None or torch.equal(part.double().nan_to_num(9), other.double().nan_to_num(9))
            assert moved.tokens.dtype == torch.int64
        assert draws[0].rows([0, 1]) is draws[0]
        assert draws[0].rows([1]).tokens.tolist() == [3]

"""Many decode steps as one C++ call: the tokens and records of single steps, and never one too many."""

import threading

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from fastppo import Engine, SamplingConfig
from fastppo.engine import engine as engine_module
from fastppo.engine import loop as loop_module
from fastppo.engine.loop import Loop
from fastppo.ops.backends import native

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension is not built")
RECORDS = ("tokens", "logprobs", "entropies", "kept_mass")
LIMITS = (40, 33, 20, 17, 5, 1)


def one_by_one(monkeypatch, make, *args, **more):
    """Return what an engine generates that looks at every token."""
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "loop_of", lambda step, sampler: None)
        return make().generate(*args, **more)


def assert_same(rollout, other):
    """Assert bitwise equality of what was drawn, and closeness of values, which come from matmuls of other sizes."""
    assert rollout.reasons == other.reasons
    for name in RECORDS:
        assert torch.equal(getattr(rollout, name), getattr(other, name)), name
    if other.values is not None:
        torch.testing.assert_close(rollout.values, other.values, atol=2e-2, rtol=0)


@pytest.fixture
def loops(monkeypatch):
    """Return a list that gets (steps asked for, steps done) of each loop."""
    seen, draws = [], Loop.draws

    def counted(self, ids, positions, sequences, places, steps):
        found = draws(self, ids, positions, sequences, places, steps)
        seen.append((steps, len(found)))
        return found

    monkeypatch.setattr(Loop, "draws", counted)
    return seen


def softcapped():
    model = tiny.llama(vocabulary=300)
    model.config.final_logit_softcapping = 4.0
    return model


def with_adapter():
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for layer in model.base_model.model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.lora_B["default"].weight)
    return model


MODELS = {
    "llama": tiny.llama,
    "gpt2, one tensor for head and embedding": tiny.gpt2,
    "value head": lambda: tiny.with_value_head(tiny.llama()),
    "bf16": lambda: tiny.with_value_head(tiny.llama(vocabulary=300)).bfloat16(),
    "softcap": softcapped,
    "adapter": with_adapter,
}
SETTINGS = {
    "plain": {},
    "least length": {"min_new_tokens": 9},
    "truncated": {"top_k": 9, "top_p": 0.8, "temperature": 0.7},
    "truncated and least length": {"top_k": 9, "min_new_tokens": 12},
    "greedy": {"do_sample": False, "min_new_tokens": 3},
    "own ends": {"stop_ids": (7, 11, 13)},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_loop_draws_what_single_steps_draw(monkeypatch, loops, name, settings):
    model, queries = MODELS[name](), tiny.queries(6, longest=20)
    sampling = SamplingConfig(**({"max_new_tokens": 40} | SETTINGS[settings]))
    limits = None if sampling.min_new_tokens else LIMITS

    def make():
        return Engine(model, seed=7, max_rows=5)

    rollout = make().generate(queries, sampling, n=2, max_new_tokens=limits)
    count = len(loops)
    other = one_by_one(monkeypatch, make, queries, sampling, n=2, max_new_tokens=limits)
    assert len(loops) == count > 0
    assert_same(rollout, other)


def test_a_loop_stops_after_the_first_token_that_ends_a_response(loops):
    model, queries = tiny.llama(), tiny.queries(6)
    rollout = Engine(model, seed=3).generate(queries, SamplingConfig(max_new_tokens=40))
    lengths = sorted(len(response) for response in rollout)
    assert "stop" in rollout.reasons
    assert any(1 < done < asked for asked, done in loops)
    # Between two ends nothing else interrupts it, and after an end nothing is drawn for who has ended.
    steps, gaps = sum(done for _, done in loops), len(set(lengths))
    assert len(loops) <= gaps + lengths[-1] // loop_module._MOST
    assert steps < lengths[-1]
    assert max(done for _, done in loops) <= loop_module._MOST


def test_blocks_that_were_reserved_in_vain_are_used_or_given_back(monkeypatch, loops):
    model, queries = tiny.llama(), tiny.queries(8, longest=20)
    tight = Engine(model)
    tight.generate([[5] * 10], max_new_tokens=6)
    memory = 9 * tight.metrics()["kv_bytes"]

    def make():
        return Engine(model, seed=5, max_rows=6, kv_memory=memory)

    engine = make()
    rollout = engine.generate(queries, SamplingConfig(max_new_tokens=40))
    assert engine.metrics()["kv_bytes"] <= memory
    assert_same(rollout, one_by_one(monkeypatch, make, queries, SamplingConfig(max_new_tokens=40)))
    assert engine.kv_tensors == []
    assert loops


def test_turns_go_on_from_what_loops_have_stored(monkeypatch, loops):
    model, queries, more = tiny.llama(), tiny.queries(5), [[4, 5]] * 5

    def turns():
        engine = Engine(model, seed=5)
        first = engine.generate(queries, max_new_tokens=13, keep=True)
        return first, engine.continue_(first, more, max_new_tokens=21), engine.metrics()

    first, second, metrics = turns()
    assert loops
    assert metrics["prefill_tokens"] < sum(map(len, second.queries)) / 2
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "loop_of", lambda step, sampler: None)
        other_first, other_second, _ = turns()
    assert_same(first, other_first)
    assert_same(second, other_second)


@pytest.mark.parametrize("kind", ["stop strings", "exact", "stream", "large model"])
def test_there_is_no_loop_where_somebody_must_look_at_every_token(monkeypatch, loops, kind):
    sampling = SamplingConfig(max_new_tokens=12)
    engine = Engine(tiny.llama(), tiny.tokenizer(), consistency="exact" if kind == "exact" else "bounded")
    if kind == "stop strings":
        sampling = SamplingConfig(max_new_tokens=12, stop_strings=("w5",))
    if kind == "large model":
        monkeypatch.setattr(loop_module, "_BYTES_AT_ONCE", 1000)
    drawn = engine.stream([[5, 6]], sampling) if kind == "stream" else engine.generate([[5, 6]], sampling)
    assert len(list(drawn)) > 0
    assert not loops


@pytest.mark.parametrize("words", [40, 48])
def test_a_head_of_more_words_than_the_embedding_has_is_not_looped(loops, words):
    model = tiny.llama()
    model.lm_head = torch.nn.Linear(16, words)
    with torch.no_grad():
        model.lm_head.bias[40:] = -1e4  # never drawn
    rollout = Engine(model, seed=1).generate([[5]] * 8, SamplingConfig(max_new_tokens=9, stop_ids=()))
    assert [len(response) for response in rollout] == [9] * 8
    assert bool(loops) == (words == 40)


def test_a_cancellation_is_heard_after_a_loop(monkeypatch):
    engine, draws, asked = Engine(tiny.llama(), seed=7, max_rows=3), Loop.draws, []

    def cancelling(self, *given):
        found = draws(self, *given)
        if not asked:
            asked.append(len(found))
            thread = threading.Thread(target=engine.cancel, args=([1, 4],))
            thread.start()
            thread.join()
        return found

    monkeypatch.setattr(Loop, "draws", cancelling)
    rollout = engine.generate(tiny.queries(5), SamplingConfig(max_new_tokens=40, stop_ids=()))
    assert rollout.reasons == ("length", "cancelled", "length", "length", "cancelled")
    assert [len(response) for response in rollout] == [40, 1 + asked[0], 40, 40, 0]


def test_an_interrupt_between_loops_leaves_nothing_behind(monkeypatch):
    engine, draws, calls = Engine(tiny.llama(), seed=7), Loop.draws, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draws(self, *given)

    monkeypatch.setattr(Loop, "draws", interrupted)
    sampling = SamplingConfig(max_new_tokens=40, stop_ids=())
    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.queries(4), sampling, keep=True)
    assert engine.kv_tensors == []
    monkeypatch.setattr(Loop, "draws", draws)
    engine.num_requests = 0
    again = engine.generate(tiny.queries(4), sampling)
    assert_same(again, Engine(tiny.llama(), seed=7).generate(tiny.queries(4), sampling))


def test_learned_positions_are_not_left_by_a_loop(loops):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=24, n_embd=16, n_layer=1, n_head=2)).eval()
    rollout = Engine(model).generate([[5, 6, 7, 8]], SamplingConfig(max_new_tokens=20, stop_ids=()))
    assert len(rollout[0]) == 20
    assert loops
    with pytest.raises(ValueError, match="21"):
        Engine(model).generate([[5, 6, 7, 8]], SamplingConfig(max_new_tokens=21, stop_ids=()))


def test_logits_that_are_not_finite_are_named(loops):
    model = tiny.llama()
    engine = Engine(model)
    engine.generate(tiny.queries(3), SamplingConfig(max_new_tokens=20))
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    loops.clear()
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate(tiny.queries(3), SamplingConfig(max_new_tokens=20))
    assert loops

"""The paged engine: the naive loop's tokens whatever the schedule, honest records, windows, turns, memory."""

import functools
import gc
import threading

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from fastppo import Engine, SamplingConfig, reference_sampling
from fastppo.engine import engine as engine_module
from fastppo.engine.sampler import Sampler
from fastppo.models.network import causal_lm

LIMITS = (40, 30, 20, 10, 5, 1)
AGREEMENT = 5e-5


def mistral():
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, "sliding_window": 7}
    return MistralForCausalLM(MistralConfig(**size, **ids)).eval()


MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "mistral": mistral}


@pytest.fixture(autouse=True)
def _paged(monkeypatch):
    """Decode on the paged cache even where its attention has no kernels."""
    monkeypatch.setattr(engine_module, "has_paged_kernels", lambda device: True)


def naive(model, ids, limit, seed, request, start=0):
    """Generate token by token with a full forward each, no cache, no batch."""
    ids, logprobs = list(ids), []
    for position in range(start, start + limit):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        uniform = reference_sampling.uniforms(seed, torch.tensor([request]), torch.tensor([position]))
        cumulative = logits.softmax(-1).cumsum(-1)
        ids.append(int((cumulative <= uniform * cumulative[-1]).sum()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(ids) - len(logprobs) :], logprobs


@functools.cache
def expected(name):
    model, queries = MODELS[name](), tiny.queries(6, longest=20)
    return [naive(model, queries[i // 2].tolist(), LIMITS[i // 2], seed=7, request=i) for i in range(12)]


def assert_expected(name, rollout):
    """Assert that the rollout is what the naive loop generates."""
    for (tokens, logprobs), response, mine in zip(
        expected(name), rollout, rollout.split(rollout.logprobs), strict=True
    ):
        assert response.tolist() == tokens
        torch.testing.assert_close(mine, torch.tensor(logprobs), atol=AGREEMENT, rtol=0)


def bytes_of_a_block(model):
    engine = Engine(model)
    engine.generate([[5] * 10], max_new_tokens=6)
    return engine.metrics()["kv_bytes"] // (2 if model.config.model_type == "mistral" else 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("rows", "tokens", "blocks"), [(64, 2048, None), (3, 5, None), (64, 7, 6), (1, 1, 4)])
def test_equals_the_naive_loop_whatever_the_schedule(name, rows, tokens, blocks):
    model, queries = MODELS[name](), tiny.queries(6, longest=20)
    memory = None if blocks is None else blocks * bytes_of_a_block(model)
    engine = Engine(model, seed=7, max_rows=rows, prefill_tokens=tokens, kv_memory=memory)
    rollout = engine.generate(queries, SamplingConfig(), n=2, max_new_tokens=LIMITS)
    assert engine.metrics()["tier"] == "A"
    assert memory is None or engine.metrics()["kv_bytes"] <= memory
    assert_expected(name, rollout)


def test_the_cases_preempt_and_end_early():
    engine = Engine(tiny.llama(), seed=7, kv_memory=6 * bytes_of_a_block(tiny.llama()))
    rollout = engine.generate(tiny.queries(6, longest=20), SamplingConfig(), n=2, max_new_tokens=LIMITS)
    assert engine.metrics()["preemptions"] > 0
    assert engine.metrics()["recomputed_tokens"] > 0
    assert {"stop", "length"} == set(rollout.reasons)
    assert rollout.finished.tolist() == [reason == "stop" for reason in rollout.reasons]


def test_a_prompt_is_computed_once_for_all_its_samples():
    engine, prompt = Engine(tiny.llama()), torch.arange(3, 36)
    rollout = engine.generate([prompt], n=8, max_new_tokens=3, min_new_tokens=3)
    metrics = engine.metrics()
    assert metrics["prefill_tokens"] == 33
    assert metrics["decode_tokens"] == 8 * 2  # the first of three is drawn where the prompt ends
    assert metrics["shared_blocks"] == 7 * 2
    assert len({tuple(response.tolist()) for response in rollout}) > 4


@pytest.mark.parametrize("adapter", [False, True])
def test_records_are_what_a_scoring_pass_says(adapter):
    network = tiny.llama()
    if adapter:
        network = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"]))
        for name, parameter in network.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3) if "lora_B" in name else None
    model, queries = tiny.with_value_head(network), tiny.queries(7, longest=20)
    engine = Engine(model, max_rows=3, prefill_tokens=9)
    rollout = engine.generate(queries, SamplingConfig(max_new_tokens=25, temperature=0.7), n=2)
    scores = engine.score(rollout.queries, list(rollout), temperature=0.7)
    assert scores.offsets.tolist() == rollout.offsets.tolist()
    for name in ("logprobs", "entropies", "values"):
        torch.testing.assert_close(getattr(rollout, name), getattr(scores, name), atol=AGREEMENT, rtol=0)
    with torch.no_grad():
        logits, _, values = model(torch.cat([rollout.queries[3], rollout[3]])[None])
    start, end = len(rollout.queries[3]) - 1, -1
    logp = (logits[0, start:end].double() / 0.7).log_softmax(-1)[range(len(rollout[3])), rollout[3]]
    torch.testing.assert_close(
        scores.logprobs[scores.offsets[3] : scores.offsets[4]].double(), logp, atol=AGREEMENT, rtol=0
    )
    torch.testing.assert_close(rollout.split(rollout.values)[3], values[0, start:end], atol=AGREEMENT, rtol=0)


def test_records_agree_on_a_trained_model(shared_path):
    model = AutoModelForCausalLM.from_pretrained(shared_path("models/stories260k")).eval()
    engine = Engine(model, max_rows=5, prefill_tokens=13)
    rollout = engine.generate(tiny.queries(8, longest=30, vocabulary=400), n=2, max_new_tokens=40)
    scores = engine.score(rollout.queries, list(rollout))
    torch.testing.assert_close(rollout.logprobs, scores.logprobs, atol=AGREEMENT, rtol=0)


def test_blocks_behind_the_window_are_given_back():
    engine = Engine(mistral())
    engine.generate([[5] * 20], max_new_tokens=40, min_new_tokens=40)
    assert engine.metrics()["kv_blocks_peak"] <= 3


# --- several turns --------------------------------------------------------------------------------------------------


def turns(engine, keep, forced=((11, 12), (), (13,))):
    queries = tiny.queries(3, seed=4, longest=18)
    first = engine.generate(queries, SamplingConfig(max_new_tokens=5, stop_ids=()), keep=keep)
    prefilled = engine.metrics()["prefill_tokens"]
    assert prefilled == sum(len(query) for query in queries)
    return queries, first, engine.continue_(first, [list(new) for new in forced], SamplingConfig(max_new_tokens=20))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_turns_equal_one_long_call_with_forced_tokens(name, keep):
    model = MODELS[name]()
    engine = Engine(model, seed=3)
    queries, first, second = turns(engine, keep)
    for i, (query, new) in enumerate(zip(queries, [[11, 12], [], [13]], strict=True)):
        opening, _ = naive(model, query.tolist(), 5, 3, i) if 2 not in first[i] else (first[i].tolist(), [])
        whole = [*query.tolist(), *opening, *new]
        assert second.queries[i].tolist() == whole
        tokens, logprobs = naive(model, whole, 20, 3, i, start=5 + len(new))
        assert second[i].tolist() == tokens
        torch.testing.assert_close(second.split(second.logprobs)[i], torch.tensor(logprobs), atol=AGREEMENT, rtol=0)
    new = sum(len(query) for query in second.queries)
    assert engine.metrics()["prefill_tokens"] == (1 + 2 + 1 + 0 + 1 + 1 if keep else new)
    assert engine._cache.num_bytes == 0


def test_what_old_weights_computed_is_never_read():
    model = tiny.llama()
    engine = Engine(model, seed=3)
    queries = tiny.queries(3, longest=18)
    first = engine.generate(queries, SamplingConfig(max_new_tokens=5, stop_ids=()), keep=True)
    assert engine._cache.num_bytes > 0
    for pool in engine._cache.pools.values():
        for part in pool:
            part.fill_(torch.nan)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    second = engine.continue_(first, [[7]] * 3, SamplingConfig(max_new_tokens=10), keep=True)
    assert engine.metrics()["prefill_tokens"] == sum(len(query) for query in second.queries)
    for i, query in enumerate(second.queries):
        assert second[i].tolist() == naive(model, query.tolist(), 10, 3, i, start=6)[0]
    engine.release()
    assert engine._cache.num_bytes == 0


def test_an_edited_response_is_computed_again_from_the_edit_on():
    model = tiny.llama()
    engine = Engine(model, seed=3)
    first = engine.generate([torch.arange(3, 23)], SamplingConfig(max_new_tokens=20, stop_ids=()), keep=True)
    first[0][4] = 9 if int(first[0][4]) != 9 else 10
    second = engine.continue_(first, [[]], max_new_tokens=8)
    assert second[0].tolist() == naive(model, second.queries[0].tolist(), 8, 3, 0, start=20)[0]
    assert engine.metrics()["prefill_tokens"] == 20 - 4


def test_kept_sequences_make_room_when_memory_is_short():
    model = tiny.llama()
    engine = Engine(model, seed=3, kv_memory=4 * bytes_of_a_block(model))
    first = engine.generate(tiny.queries(2), SamplingConfig(max_new_tokens=20, stop_ids=()), keep=True)
    long = engine.generate([torch.arange(3, 33)], SamplingConfig(max_new_tokens=30, stop_ids=()))
    assert len(long[0]) == 30
    second = engine.continue_(first, [[], []], max_new_tokens=5)
    assert second[1].tolist() == naive(model, second.queries[1].tolist(), 5, 3, 1, start=20)[0]


def test_branches_of_a_turn_differ_and_share_what_came_before():
    engine = Engine(tiny.llama(), seed=3)
    first = engine.generate([torch.arange(3, 23)], SamplingConfig(max_new_tokens=14, stop_ids=()), keep=True)
    second = engine.continue_(first, [[7]], SamplingConfig(max_new_tokens=10), n=4)
    assert engine.metrics()["prefill_tokens"] == 2
    assert len({tuple(response.tolist()) for response in second}) == 4
    assert len(set(second.requests)) == 4
    with pytest.raises(ValueError, match="2 responses, but the rollout has 1"):
        engine.continue_(first, [[7], [8]])


# --- ends and faults ------------------------------------------------------------------------------------------------


def test_responses_can_be_cancelled_from_another_thread(monkeypatch):
    engine, calls, draw = Engine(tiny.llama(), seed=7, max_rows=3), [], Sampler.draw_at

    def cancelling(self, *given):
        calls.append(1)
        if len(calls) == 3:  # 0 to 2 are in work, 4 waits
            thread = threading.Thread(target=engine.cancel, args=([1, 4, 4],))
            thread.start()
            thread.join()
        return draw(self, *given)

    monkeypatch.setattr(Sampler, "draw_at", cancelling)
    monkeypatch.setattr(engine_module, "loop_of", lambda step, sampler: None)
    sampling = SamplingConfig(max_new_tokens=12, stop_ids=())
    rollout = engine.generate(tiny.queries(5), sampling)
    assert rollout.reasons == ("length", "cancelled", "length", "length", "cancelled")
    assert [len(response) for response in rollout] == [12, 3, 12, 12, 0]
    assert rollout.finished.sum() == 0
    whole = Engine(tiny.llama(), seed=7).generate(tiny.queries(5), sampling)
    assert rollout[1].tolist() == whole[1][:3].tolist()
    engine.cancel()  # nothing is going on
    assert engine.generate(tiny.queries(1), sampling).reasons == ("length",)


def test_an_interrupted_call_leaves_nothing_behind(monkeypatch):
    model, queries = tiny.llama(), tiny.queries(4)
    model.train()
    engine, calls, draw = Engine(model, seed=7), [], Sampler.draw_at

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *given)

    sampling = SamplingConfig(max_new_tokens=12)
    implementation = model.config._attn_implementation
    monkeypatch.setattr(Sampler, "draw_at", interrupted)
    monkeypatch.setattr(engine_module, "loop_of", lambda step, sampler: None)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(queries, sampling, keep=True)
    monkeypatch.setattr(Sampler, "draw_at", draw)
    assert engine._cache.num_bytes == 0
    assert model.training
    assert model.config._attn_implementation == implementation
    assert torch.is_grad_enabled()
    engine.num_requests = 0
    again, fresh = engine.generate(queries, sampling), Engine(tiny.llama(), seed=7).generate(queries, sampling)
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))


def test_memory_is_given_back_after_every_call():
    engine, queries = Engine(tiny.llama()), tiny.queries(5)

    def live():
        gc.collect()
        return sum(part.nbytes for part in gc.get_objects() if issubclass(type(part), torch.Tensor))

    for cycle in range(50):
        first = engine.generate(queries[: 1 + cycle % 5], max_new_tokens=2, keep=cycle % 2 > 0)
        engine.continue_(first, [[7]] * len(first), max_new_tokens=1, keep=cycle % 3 > 0)
        engine.release()
        del first
        if cycle == 4:
            before = live()
    assert live() == before


def test_a_request_that_can_never_fit_is_named():
    model = tiny.llama()
    engine = Engine(model, kv_memory=3 * bytes_of_a_block(model))
    with pytest.raises(ValueError, match=r"prompt 1 may grow to 50 tokens, whose .* need 4 blocks .* raise kv_memory"):
        engine.generate([[5], [5] * 20, [5]], max_new_tokens=30)
    assert engine.num_requests == 0
    with pytest.raises(ValueError, match="kv_memory must be a whole number, at least 1, got 0"):
        Engine(model, kv_memory=0)


def test_transformers_argument_names_work_and_are_not_mixed():
    engine = Engine(tiny.llama(), seed=3)
    mine = engine.generate(tiny.queries(2), SamplingConfig(max_new_tokens=6, top_k=5, stop_ids=(9,)), n=3)
    engine.num_requests = 0
    theirs = engine.generate(tiny.queries(2), max_new_tokens=6, top_k=5, eos_token_id=9, num_return_sequences=3)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    with pytest.raises(ValueError, match=r"got sampling and also \['max_new_tokens', 'top_k'\]"):
        engine.generate([[5]], SamplingConfig(), max_new_tokens=3, top_k=4)
    with pytest.raises(ValueError, match="unknown generation argument"):
        engine.generate([[5]], penalty=3)


def test_scores_need_one_response_to_each_query():
    engine = Engine(tiny.llama())
    with pytest.raises(ValueError, match="got 1 responses to 2 queries"):
        engine.score([[5], [6]], [[7]])
    assert engine.score([[5], [6]], [[7], [8, 9]]).values is None
    assert causal_lm(engine.model).config._attn_implementation != "fastppo"

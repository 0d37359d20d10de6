"""The engine: the same tokens as a naive loop, whatever the batch; honest records; stops; limits."""

import copy

import pytest
import tiny
import torch
from transformers import DynamicCache

from fastppo import Engine, SamplingConfig, reference_sampling
from fastppo.engine.cache import WindowCache
from fastppo.types import Rollout

MODELS = {"llama": tiny.llama, "llama-tied": lambda: tiny.llama(tie=True), "gpt2": tiny.gpt2}


def naive(model, query, limit, seed, request, temperature=1.0):
    """Generate token by token with a full forward each, no cache, no batch."""
    ids, logprobs = query.tolist(), []
    for position in range(limit):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double() / temperature
        uniform = reference_sampling.uniforms(seed, torch.tensor([request]), torch.tensor([position]))
        cumulative = logits.softmax(-1).cumsum(-1)
        token = int((cumulative <= uniform * cumulative[-1]).sum())
        logprobs.append(float(logits.log_softmax(-1)[token]))
        ids.append(token)
        if token == model.config.eos_token_id:
            break
    return ids[len(query) :], logprobs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_equals_the_naive_loop_with_early_stops_and_refills(name, max_rows):
    model, queries = MODELS[name](), tiny.queries(10)
    limits = [1 + 3 * i for i in range(10)]
    rollout = Engine(model, seed=7, max_rows=max_rows).generate(queries, SamplingConfig(), max_new_tokens=limits)
    for i, (query, limit) in enumerate(zip(queries, limits, strict=True)):
        tokens, logprobs = naive(model, query, limit, seed=7, request=i)
        assert rollout[i].tolist() == tokens
        torch.testing.assert_close(rollout.split(rollout.logprobs)[i], torch.tensor(logprobs), atol=2e-5, rtol=0)


def test_the_case_has_early_stops():
    """The test above means what it says: some responses end by EOS, some by length."""
    rollout = Engine(tiny.llama(), seed=7).generate(tiny.queries(10), SamplingConfig(max_new_tokens=30))
    assert 0 < int(rollout.finished.sum()) < 10
    for response, finished in zip(rollout, rollout.finished, strict=True):
        assert (int(response[-1]) == 2) == bool(finished)
        assert 2 not in response[:-1]


def test_greedy_equals_transformers():
    model = tiny.llama()
    rollout = Engine(model).generate(tiny.queries(6), SamplingConfig(max_new_tokens=12, do_sample=False))
    for query, response in zip(rollout.queries, rollout, strict=True):
        expected = model.generate(query[None], max_new_tokens=12, do_sample=False)[0, len(query) :]
        assert response.tolist() == expected.tolist()


def test_records_are_those_of_the_full_forward():
    model = tiny.with_value_head(tiny.gpt2())
    rollout = Engine(model).generate(tiny.queries(8), SamplingConfig(max_new_tokens=20, temperature=0.7))
    logprobs, entropies, values = (rollout.split(x) for x in (rollout.logprobs, rollout.entropies, rollout.values))
    for i, (query, response) in enumerate(zip(rollout.queries, rollout, strict=True)):
        with torch.no_grad():
            logits, _, all_values = model(torch.cat([query, response])[None])
        logp = (logits[0, len(query) - 1 : -1].double() / 0.7).log_softmax(-1)
        torch.testing.assert_close(logprobs[i].double(), logp[range(len(response)), response], atol=2e-5, rtol=0)
        torch.testing.assert_close(entropies[i].double(), -(logp.exp() * logp).sum(-1), atol=2e-5, rtol=0)
        torch.testing.assert_close(values[i], all_values[0, len(query) - 1 : -1], atol=2e-5, rtol=0)
    assert torch.equal(rollout.kept_mass, torch.ones_like(rollout.kept_mass))


def test_sampled_frequencies_follow_the_distribution():
    model, query = tiny.llama(), torch.tensor([5, 9])
    rollout = Engine(model, max_rows=4000).generate([query], SamplingConfig(max_new_tokens=1), n=4000)
    with torch.no_grad():
        probs = model(query[None]).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.cat(list(rollout)), minlength=len(probs)).double()
    expected = probs * 4000
    big = expected >= 5
    chi2 = float(((counts - expected).square() / expected)[big].sum())
    assert chi2 < int(big.sum()) + 5 * (2 * int(big.sum())) ** 0.5


def test_truncated_sampling_reports_the_kept_mass_of_the_whole_distribution():
    model, query = tiny.llama(), torch.tensor([5, 9])
    rollout = Engine(model).generate([query], SamplingConfig(max_new_tokens=1, top_k=3), n=50)
    with torch.no_grad():
        logp = model(query[None]).logits[0, -1].log_softmax(-1)
    top = logp.topk(3)
    assert set(torch.cat(list(rollout)).tolist()) <= set(top.indices.tolist())
    torch.testing.assert_close(rollout.kept_mass, top.values.exp().sum().expand(50))
    torch.testing.assert_close(rollout.logprobs, logp[torch.cat(list(rollout))])


def test_minimum_length_keeps_eos_out():
    sampling = SamplingConfig(max_new_tokens=12, min_new_tokens=12)
    rollout = Engine(tiny.llama()).generate(tiny.queries(20), sampling)
    assert [len(response) for response in rollout] == [12] * 20
    assert 2 not in torch.cat([response[:-1] for response in rollout])
    assert float(rollout.kept_mass.min()) < 1.0


def test_n_samples_lie_side_by_side_and_differ():
    rollout = Engine(tiny.llama()).generate(tiny.queries(3), SamplingConfig(max_new_tokens=10), n=4)
    assert len(rollout) == 12
    assert all(torch.equal(rollout.queries[4 * i], rollout.queries[4 * i + 3]) for i in range(3))
    assert len({tuple(response.tolist()) for response in rollout}) > 6


def test_requests_are_numbered_on_and_seeds_repeat_them():
    engine, queries = Engine(tiny.llama(), seed=3), tiny.queries(4)
    first, second = (engine.generate(queries, SamplingConfig(max_new_tokens=10)) for _ in range(2))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    engine.num_requests = 0
    again = engine.generate(queries, SamplingConfig(max_new_tokens=10))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_stop_strings_and_stop_ids():
    tokenizer, model = tiny.tokenizer(), tiny.llama()
    free = Engine(model, tokenizer).generate(["w5 w6"] * 8, SamplingConfig(max_new_tokens=20, stop_ids=()))
    word = tokenizer.decode([int(free[0][4])])
    stopped = Engine(model, tokenizer).generate(
        ["w5 w6"] * 8, SamplingConfig(max_new_tokens=20, stop_ids=(), stop_strings=(word,))
    )
    for whole, cut in zip(free, stopped, strict=True):
        expected = whole.tolist()
        texts = [tokenizer.decode(expected[: i + 1]) for i in range(len(expected))]
        end = next((i + 1 for i, text in enumerate(texts) if word in text), len(expected))
        assert cut.tolist() == expected[:end]
    stop = int(free[0][4])
    by_id = Engine(model, tokenizer).generate(["w5 w6"] * 8, SamplingConfig(max_new_tokens=20, stop_ids=(stop,)))
    for whole, cut in zip(free, by_id, strict=True):
        expected = whole.tolist()
        assert cut.tolist() == expected[: expected.index(stop) + 1 if stop in expected else None]
    with pytest.raises(ValueError, match="need a tokenizer"):
        Engine(model).generate([[5]], SamplingConfig(max_new_tokens=4, stop_strings=("x",)))


def test_texts_chats_and_ids_are_the_same_prompt():
    tokenizer, model = tiny.tokenizer(), tiny.llama()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    prompts = ["w5 w6", [{"role": "user", "content": "w5 w6"}], [5, 6], torch.tensor([5, 6])]
    assert [ids.tolist() for ids in Engine(model, tokenizer).encode(prompts)] == [[5, 6]] * 4


def test_dropout_is_off_and_modes_are_restored():
    model = tiny.with_value_head(tiny.gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    sampling = SamplingConfig(max_new_tokens=10, do_sample=False)
    expected = Engine(model).generate(tiny.queries(4), sampling)
    model.train()
    model.pretrained_model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    got = Engine(model).generate(tiny.queries(4), sampling)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([], {}, "list of prompts is empty"),
        ([[]], {}, "prompt 0 is empty"),
        ([[5] * 60], {"max_new_tokens": 5}, "60 tokens and may get 5 new ones, but the model's context is 64"),
        (["w5"], {}, "need a tokenizer"),
        ([torch.ones(1, 3, dtype=torch.int64)], {}, r"1-D tensor of token ids, got shape \(1, 3\)"),
    ],
)
def test_bad_prompts(prompts, sampling, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny.llama()).generate(prompts, SamplingConfig(**({"max_new_tokens": 4} | sampling)))


def test_a_single_prompt_must_be_in_a_list():
    with pytest.raises(ValueError, match="wrap it in a list"):
        Engine(tiny.llama()).generate(torch.tensor([5, 6]))


def test_broken_weights_are_named():
    model = tiny.llama()
    sampling = SamplingConfig(max_new_tokens=3)
    Engine(model).generate([[5, 6]], sampling)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite \(.*first in prompt 0\); check the weights"):
        Engine(model).generate([[5, 6]], sampling)
    with pytest.raises(FloatingPointError, match="the logits of LlamaForCausalLM are not finite; check the weights"):
        Engine(copy.deepcopy(model)).generate([[5, 6]], sampling)


def test_a_rollout_knows_when_it_was_edited():
    rollout = Engine(tiny.llama()).generate(tiny.queries(3), SamplingConfig(max_new_tokens=5))
    assert isinstance(rollout, Rollout)
    assert rollout.is_untouched
    rollout[1][0] = 7
    assert not rollout.is_untouched
    with pytest.raises(ValueError, match="one entry per response token"):
        rollout.split(torch.zeros(1))


def test_unused_columns_of_the_cache_are_cut_off():
    """After a long row has left, the others no longer attend over its columns."""
    model = tiny.llama()
    first, window = DynamicCache(), WindowCache()
    with torch.no_grad():
        model.model(torch.arange(3, 13)[None].repeat(2, 1), past_key_values=first, use_cache=True)
    window.admit(first, [10, 2], [0, 1], 2)
    assert window.used == 10
    window.release(0)
    window.make_room()
    assert window.used == 2

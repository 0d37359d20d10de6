"""Encoder-decoders: what is generated, recorded, scored and trained, against transformers' own unpadded forward."""

import pytest
import tiny_seq2seq as tiny
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig

from fastppo import Engine, SamplingConfig
from fastppo.engine.tiers import capabilities
from fastppo.models.passes import sample_groups
from fastppo.models.seq2seq import decoded
from fastppo.types import Samples, offsets_of


@pytest.mark.parametrize("family", tiny.CASES)
def test_a_rollout_records_what_transformers_computes_of_it(family):
    model, queries = tiny.policy(family), tiny.queries()
    engine = Engine(model, max_rows=4, prefill_tokens=24)
    limits = [9, 2, 5, 1, 7, 12, 3, 4]  # some end early, so that others join late
    rollout = engine.generate(queries, SamplingConfig(temperature=0.7), n=2, max_new_tokens=limits)
    logprobs, values = [], []
    for query, response in zip(rollout.queries, rollout, strict=True):
        with torch.no_grad():
            found, hidden = tiny.plain(model.pretrained_model, query, response, 0.7)
            values.append(model.v_head(hidden)[:, 0])
        logprobs.append(found)
    torch.testing.assert_close(rollout.logprobs, torch.cat(logprobs), rtol=0, atol=2e-5)
    torch.testing.assert_close(rollout.values, torch.cat(values), rtol=1e-4, atol=1e-4)
    scores = engine.score(rollout.queries, list(rollout), temperature=0.7)
    torch.testing.assert_close(scores.logprobs, torch.cat(logprobs), rtol=0, atol=2e-5)
    torch.testing.assert_close(scores.entropies, rollout.entropies, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", tiny.CASES)
def test_greedy_responses_are_those_of_transformers(family):
    model, queries = tiny.network(family), tiny.queries(seed=1)
    rollout = Engine(model, max_rows=3).generate(queries, max_new_tokens=8, do_sample=False)
    for query, response in zip(queries, rollout, strict=True):
        start = tiny.prefix(model)
        options = GenerationConfig(
            use_cache=False,
            max_new_tokens=8 + len(start) - 1,
            decoder_start_token_id=int(start[0]),
            eos_token_id=tiny.END,
            pad_token_id=tiny.PAD,
            forced_bos_token_id=int(start[1]) if len(start) > 1 else None,
        )
        own = model.generate(query[None], generation_config=options, attention_mask=torch.ones_like(query)[None])[0]
        assert response.tolist() == own[len(start) :].tolist()


def test_the_encoder_runs_once_over_each_distinct_prompt():
    model, queries = tiny.network(), tiny.queries()
    engine, seen = Engine(model, max_rows=4), []
    engine.generate(queries[:1], max_new_tokens=1)  # probes
    handle = model.get_encoder().register_forward_hook(
        lambda _, args, kwargs, __: seen.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
    )
    repeated = [queries[0], queries[1].clone(), queries[1], queries[0]]  # as tensors of their own, too
    rollout = engine.generate(repeated, max_new_tokens=5, n=6)
    handle.remove()
    assert len(rollout) == 24, "six times as many as there are rows"
    assert sum(seen) == len(queries[0]) + len(queries[1]) == engine.metrics()["prefill_tokens"]
    assert engine.metrics()["tier"] == "B"


def test_a_response_does_not_depend_on_its_neighbours():
    model, queries = tiny.network("bart"), tiny.queries()
    together = Engine(model).generate(queries, max_new_tokens=6)
    for number, query in enumerate(queries):
        engine = Engine(model)
        engine.num_requests = number
        alone = engine.generate([query], max_new_tokens=6)
        assert alone[0].tolist() == together[number].tolist()


def test_a_stream_gives_what_a_rollout_has_and_may_be_cancelled():
    model, queries = tiny.network(), tiny.queries()
    whole = Engine(model, max_rows=3).generate(queries, max_new_tokens=6)
    with Engine(model, max_rows=3).stream(queries, max_new_tokens=6) as stream:
        tokens = [[] for _ in queries]
        for event in stream:
            tokens[event.request].append(event.token)
    assert tokens == [response.tolist() for response in whole]
    engine = Engine(model, max_rows=3)
    with engine.stream(queries, max_new_tokens=6) as stream:
        next(stream)
        engine.cancel()
        assert set(stream.rollout().reasons) == {"cancelled"}


def test_decoders_that_count_by_ids_start_together():
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24}
    settings |= {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.4}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("m2m_100", **settings)).eval()
    assert capabilities(model).tier == "C"
    queries = [query % 36 + 4 for query in tiny.queries()]
    rollout = Engine(model, max_rows=3).generate(queries, max_new_tokens=5)
    for query, response, recorded in zip(queries, rollout, rollout.split(rollout.logprobs), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(recorded, tiny.plain(model, query, response)[0], rtol=0, atol=2e-5)


def test_what_cannot_be_meant_is_refused():
    model = tiny.network("bart")
    engine = Engine(model)
    with pytest.raises(ValueError, match="max_new_tokens=64, but the decoder has room for 63"):
        engine.generate(tiny.queries(), max_new_tokens=64)
    with pytest.raises(ValueError, match="prompt 0 has 65 tokens"):
        engine.generate([torch.ones(65, dtype=torch.int64)], max_new_tokens=2)
    assert len(engine.generate([torch.ones(64, dtype=torch.int64)], max_new_tokens=63, stop_ids=())[0]) == 63
    rollout = engine.generate(tiny.queries(), max_new_tokens=2)
    with pytest.raises(ValueError, match="put the episode so far into the prompt"):
        engine.continue_(rollout, [torch.ones(1, dtype=torch.int64)] * len(rollout))
    with pytest.raises(NotImplementedError, match="cannot be decoded row by row"):
        Engine(model, consistency="exact").generate(tiny.queries(), max_new_tokens=2)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="its decoder begins"):
        engine.generate(tiny.queries(), max_new_tokens=2)


def test_a_query_that_samples_share_is_encoded_once_in_a_pass_with_the_same_gradient():
    model, query = tiny.network("bart"), tiny.queries()[1]
    sequences, seen = tiny.queries((4, 2, 6), seed=3), []
    model.get_encoder().register_forward_hook(lambda _, __, output: seen.append(len(output[0])))

    def gradients(queries):
        hidden = decoded(model, queries, sequences)
        loss = sum((row[: len(ids)] ** 2).sum() for row, ids in zip(hidden, sequences, strict=True))
        return torch.autograd.grad(loss, list(model.get_encoder().layers.parameters()))

    other = tiny.queries()[3]
    shared, apart = gradients([query, other, query]), gradients([query, other, query.clone()])
    assert seen == [2, 3]
    largest = max(float(grad.abs().max()) for grad in apart)
    for ours, theirs in zip(shared, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * largest)


def test_groups_are_alike_in_both_lengths():
    lengths = [(400, 5), (5, 400), (390, 10), (8, 380), (200, 200)]
    samples = Samples(
        queries=tuple(torch.zeros(query, dtype=torch.int64) for query, _ in lengths),
        responses=tuple(torch.zeros(response, dtype=torch.int64) for _, response in lengths),
        rows=tuple(range(5)),
        num_given=5,
        positions=torch.cat([torch.arange(response) for _, response in lengths]),
        offsets=offsets_of([response for _, response in lengths]),
        labels=torch.zeros(sum(response for _, response in lengths), dtype=torch.int64),
        ended=torch.zeros(5, dtype=torch.bool),
        temperature=1.0,
        prefix=torch.tensor([0]),
    )
    groups = sample_groups(samples, [0, 1, 2, 3], 8, False, None)
    assert sorted(map(sorted, groups)) == [[0, 2], [1, 3]]
    assert samples.extents(1) == (5, 400)

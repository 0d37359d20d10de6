"""The engine at its edges: calls of which nothing is left, models rebuilt between calls, texts that go on, errors."""

import random

import pytest
import tiny
import torch
from families import build
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GenerationConfig, LEDConfig, LEDForConditionalGeneration

from fastppo import Engine, SamplingConfig
from fastppo.engine.blocks import Ledger
from fastppo.engine.jobs import Job, Prompt
from fastppo.engine.schedule import Scheduler
from fastppo.models.network import weight_version


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("requests", [None, [2, 0, 1, 1]])
def test_everything_may_be_cancelled_at_any_time(before, requests):
    engine, queries = Engine(tiny.llama(), max_rows=2), tiny.queries(3)
    with engine.stream(queries, SamplingConfig(max_new_tokens=12, stop_ids=()), keep=True) as stream:
        for _ in range(before):
            next(stream)
        engine.cancel(requests)
        last = {event.request: event for event in stream}
    assert [last[request].reason for request in range(3)] == ["cancelled"] * 3
    assert stream.rollout().reasons == ("cancelled",) * 3
    engine.release()
    assert engine.kv_tensors == []
    assert len(engine.generate(queries, max_new_tokens=2)) == 3


@pytest.mark.parametrize("place", [3, -1])
def test_cancelling_what_is_not_there_is_refused_and_ends_nothing(place):
    engine = Engine(tiny.llama())
    with engine.stream(tiny.queries(3), SamplingConfig(max_new_tokens=4, stop_ids=())) as stream:
        next(stream)
        with pytest.raises(ValueError, match=rf"cannot cancel \[{place}\]: expected places .* 0 to 2"):
            engine.cancel([1, place])
        assert len(list(stream)) == 11


def test_a_streams_rollout_is_of_the_weights_that_drew_it():
    model = tiny.llama()
    stream = Engine(model).stream(tiny.queries(2), SamplingConfig(max_new_tokens=3))
    drawn_by, events = weight_version(model), list(stream)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    assert len(events) > 0
    assert stream.rollout().weight_version == drawn_by != weight_version(model)


def adapter(*targets):
    return LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM")


def assert_honest(engine, model):
    """What the engine records is what the model says of it now."""
    rollout = engine.generate(tiny.queries(4), SamplingConfig(max_new_tokens=12))
    for query, response, recorded in zip(rollout.queries, rollout, rollout.split(rollout.logprobs), strict=True):
        with torch.no_grad():
            logits = model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        expected = logits.double().log_softmax(-1)[range(len(response)), response]
        torch.testing.assert_close(recorded.double(), expected, atol=2e-5, rtol=0)


def test_adapters_that_are_put_in_after_a_call_act():
    model = tiny.llama()
    engine = Engine(model)
    assert_honest(engine, model)
    adapted = get_peft_model(model, adapter("q_proj", "down_proj"))
    assert_honest(engine, adapted)
    adapted.add_adapter("other", adapter("v_proj", "o_proj"))  # in layers that had none
    adapted.set_adapter("other")
    assert_honest(engine, adapted)
    assert_honest(engine, adapted.merge_and_unload())


def test_what_was_kept_is_dropped_when_an_adapter_gets_another_scale():
    adapted = get_peft_model(tiny.llama(), adapter("q_proj", "down_proj"))
    engine = Engine(adapted)
    rollout = engine.generate(tiny.queries(3), SamplingConfig(max_new_tokens=6), keep=True)
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            module.set_scale("default", 3.0)
    assert rollout.weight_version != weight_version(adapted)
    turn = engine.continue_(rollout, [[7]] * 3, SamplingConfig(max_new_tokens=6))
    torch.testing.assert_close(turn.logprobs, engine.score(turn.queries, list(turn)).logprobs, atol=2e-5, rtol=0)


def test_parts_that_are_replaced_after_a_call_act():
    model = tiny.llama()
    engine, mlp = Engine(model), model.model.layers[0].mlp
    assert_honest(engine, model)
    torch.manual_seed(0)
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
    assert_honest(engine, model)
    mlp.act_fn = nn.ReLU()
    assert_honest(engine, model)
    mlp.act_fn = nn.Softsign()  # which the decode program does not know
    assert_honest(engine, model)


def test_texts_that_go_on_get_no_token_of_a_beginning():
    tokenizer = tiny.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    engine = Engine(tiny.llama(), tokenizer)
    rollout = engine.generate(["w5 w6"], max_new_tokens=3)
    assert rollout.queries[0].tolist() == [1, 5, 6]
    turn = engine.continue_(rollout, ["w7"], max_new_tokens=2)
    assert turn.queries[0].tolist() == [1, 5, 6, *rollout[0].tolist(), 7]
    scores = engine.score(["w5 w6"], ["w7 w8"])
    assert scores.logprobs.equal(engine.score([[1, 5, 6]], [[7, 8]]).logprobs)


BAD = {
    "a tokenizer's output": ({"prompts": {"input_ids": [[5]]}}, "prompts must be a list of prompts, got a dict"),
    "fractions": ({"prompts": [[1.5, 2.0]]}, "a 1-D tensor of token ids, got shape .2,. of torch.float32"),
    "a list of texts": ({"prompts": [["w5", "w6"]]}, "a prompt is .'w5', 'w6'.; expected a text, a chat or token ids"),
    "ids in two levels": ({"prompts": [[[5, 6]]]}, "a 1-D tensor of token ids, got shape .1, 2."),
    "n of 0": ({"n": 0}, "is 0; expected a whole number of responses to a prompt, from 1"),
    "num_return_sequences of 0": ({"num_return_sequences": 0}, "is 0; expected a whole number"),
    "half a token": ({"max_new_tokens": [2.5]}, "each prompt a positive limit, a whole number, got 2.5"),
    "a dict of settings": ({"sampling": {"top_k": 5}}, "sampling is a dict, expected a SamplingConfig"),
    "transformers' settings": ({"sampling": GenerationConfig()}, "sampling is a GenerationConfig, expected"),
    "no limit": ({"max_new_tokens": [None]}, "each prompt a positive limit, a whole number, got None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Engine(tiny.llama(), tiny.tokenizer()).generate(**({"prompts": [[5, 9]]} | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop_strings": "end"}, "stop_strings must be a tuple of texts, none of them empty, got 'end'"),
        ({"stop_strings": ("",)}, "stop_strings must be a tuple of texts, none of them empty"),
        ({"stop_ids": 2}, "stop_ids must be a tuple of token ids, got 2"),
        ({"max_new_tokens": 3.5}, "max_new_tokens must be a whole number, at least 1, got 3.5"),
        ({"temperature": "0.7"}, "temperature must be greater than 0.*got '0.7'"),
        ({"top_k": 2.5}, "top_k must be a whole number, at least 0.*got 2.5"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"between 0 and max_new_tokens \(8\), got 9"),
    ],
)
def test_ways_to_draw_that_cannot_be_meant_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**given)


@pytest.mark.parametrize("name", ["max_rows", "prefill_tokens", "kv_memory"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "8"])
def test_bounds_that_cannot_be_meant_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1, got {value!r}"):
        Engine(tiny.llama(), **{name: value})


def test_part_of_a_rollout_cannot_be_continued():
    engine = Engine(tiny.llama())
    rollout = engine.generate([[5, 9], [11]], max_new_tokens=3)
    with pytest.raises(ValueError, match="rollout is a list, expected a whole Rollout"):
        engine.continue_(rollout[:1], [[4]])


def test_the_least_length_is_held_against_the_prompts_own_limits():
    rollout = Engine(tiny.llama(context=256)).generate([[5, 9], [11]], max_new_tokens=[150, 140], min_new_tokens=135)
    assert all(135 <= len(response) <= limit for response, limit in zip(rollout, (150, 140), strict=True))


@pytest.mark.parametrize(
    ("family", "length", "limit"), [("mpt", 125, 20), ("mpt", 200, 4), ("led", 200, 4), ("led", 3, 140)]
)
def test_contexts_under_other_names_are_kept_to(family, length, limit):
    model = build(family, with_encoder=family == "led")
    with pytest.raises(ValueError, match=r"the model's context is 128|the decoder has room for 127"):
        Engine(model).generate([[5] * length], max_new_tokens=limit)


@pytest.mark.parametrize("decoder", [32, 5])
def test_a_decoder_with_less_room_than_its_encoder_is_probed_within_it(decoder):
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {"d_model": 16, "vocab_size": 40}
    sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    sizes |= {f"max_{part}_position_embeddings": room for part, room in (("encoder", 64), ("decoder", decoder))}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = LEDForConditionalGeneration(LEDConfig(attention_window=8, **sizes, **ids)).eval()
    rollout = Engine(model).generate(tiny.queries(4), max_new_tokens=4, min_new_tokens=4)
    assert [len(response) for response in rollout] == [4] * 4


def test_an_empty_response_cannot_be_scored():
    with pytest.raises(ValueError, match="response 1 is empty; leave it out with its query"):
        Engine(tiny.llama()).score([[5], [6]], [[7], []])


def test_rows_that_were_all_sent_back_begin_again():
    """Two windows' pools, so small that everybody makes room for a forked prompt, and nobody is left in a row."""
    lengths = [32, 16, 37, 30, 2]
    for seed in range(60):
        ledger = Ledger([8, None], [0, 0], 0)
        ledger.grow([2, 5], 4)
        draws = random.Random(seed)
        prompts = [Prompt(3 * i, length) for i, length in enumerate(lengths)]
        jobs = [Job(prompt.number + k, prompt, 20) for prompt in prompts for k in range(3)]
        scheduler = Scheduler(ledger, jobs, 5, 5)
        while not scheduler.is_done:
            plan = scheduler.plan()
            ended = [jobs[i] for i in plan.drawing if jobs[i].drawn == 19 or draws.random() < 0.1]
            scheduler.commit(plan, ended)
        assert [pool.free for pool in ledger.pools] == [2, 5]

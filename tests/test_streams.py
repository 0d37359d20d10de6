"""Streams: the tokens of `generate` one by one, their text, and an end at any time."""

import pytest
import tiny
import torch

from fastppo import Engine, SamplingConfig
from fastppo.engine import engine as engine_module
from fastppo.engine.call import _Text

SAMPLING = SamplingConfig(max_new_tokens=12)


@pytest.fixture(params=["A", "B"], autouse=True)
def tier(request, monkeypatch):
    monkeypatch.setattr(engine_module, "has_paged_kernels", lambda device: request.param == "A")
    return request.param


def test_a_stream_is_the_batch_token_by_token(tier):
    engine, tokenizer = Engine(tiny.llama(), tiny.tokenizer(), seed=7, max_rows=3), tiny.tokenizer()
    events = list(engine.stream(tiny.queries(5), SAMPLING, n=2))
    assert engine.metrics()["tier"] == tier
    rollout = Engine(tiny.llama(), seed=7).generate(tiny.queries(5), SAMPLING, n=2)
    for i, (response, logprobs) in enumerate(zip(rollout, rollout.split(rollout.logprobs), strict=True)):
        mine = [event for event in events if event.request == i]
        assert [event.token for event in mine] == response.tolist()
        torch.testing.assert_close(torch.tensor([event.logprob for event in mine]), logprobs, atol=2e-5, rtol=0)
        assert "".join(event.text for event in mine) == tokenizer.decode(response, skip_special_tokens=True)
        assert [event.reason for event in mine] == [""] * (len(mine) - 1) + [rollout.reasons[i]]


def test_a_stream_can_be_closed_and_cancelled_by_its_reader():
    model = tiny.llama()
    model.train()
    engine = Engine(model, seed=7)
    stream = engine.stream(tiny.queries(3), SamplingConfig(max_new_tokens=12, stop_ids=()))
    seen = [next(stream) for _ in range(4)]
    assert model.training  # between the tokens the model is the reader's
    with pytest.raises(RuntimeError, match="a stream of this engine is open"):
        engine.generate([[5]])
    engine.cancel([1])
    rest = [event for event in (next(stream) for _ in range(6)) if event.request == 1]
    assert rest[-1].token is None
    assert rest[-1].reason == "cancelled"
    rollout = stream.rollout()
    assert rollout.reasons == ("cancelled",) * 3
    assert rollout[0].tolist()[:2] == [event.token for event in seen if event.request == 0]
    assert list(stream) == []
    assert engine.generate([[5]], max_new_tokens=2).reasons is not None


def test_a_stream_that_nobody_reads_on_frees_the_engine():
    engine = Engine(tiny.llama())
    next(engine.stream([[5]], SAMPLING))
    assert len(engine.generate([[5]], SAMPLING)) == 1


def test_weights_must_not_change_under_a_stream():
    model = tiny.llama()
    engine = Engine(model)
    stream = engine.stream([[5]], SAMPLING)
    next(stream)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights were changed while a stream was open"):
        list(stream)
    assert len(engine.generate([[5]], SAMPLING)) == 1


class Bytes:
    """A tokenizer of single bytes, in which most characters take several tokens."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


def test_characters_of_several_tokens_come_whole():
    text, pieces, state = "aé漢😀!", [], _Text()
    for i, byte in enumerate(data := text.encode()):
        pieces.append(state.gain(Bytes(), byte, i == len(data) - 1))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert state.gain(Bytes(), "é".encode()[0], True) == "\N{REPLACEMENT CHARACTER}"


def test_each_response_is_told_of_once_when_it_has_ended():
    engine, told, open_ones = Engine(tiny.llama(), seed=7, max_rows=3), [], []

    def on_response(place, tokens):
        told.append((place, tokens))
        open_ones.append(sum(not reason for reason in engine._call.requests.reasons))

    rollout = engine.generate(tiny.queries(6), SAMPLING, n=2, on_response=on_response)
    assert sorted(told) == [(place, response.tolist()) for place, response in enumerate(rollout)]
    assert open_ones[0] > 0
    assert open_ones[-1] == 0
    plain = Engine(tiny.llama(), seed=7, max_rows=3).generate(tiny.queries(6), SAMPLING, n=2)
    assert all(map(torch.equal, rollout, plain))


def test_an_error_of_who_is_told_frees_the_engine():
    engine = Engine(tiny.llama())
    with pytest.raises(LookupError, match="enough"):
        engine.generate([[5], [6]], SAMPLING, on_response=_raise)
    assert len(engine.generate([[5]], SAMPLING)) == 1


def _raise(place, tokens):
    raise LookupError("enough")

"""The paged engine: the naive loop's tokens whatever the schedule, honest records, windows, turns, streams, memory."""

import pytest
import tiny
import torch
from test_engine import naive
from transformers import MistralConfig, MistralForCausalLM

from fastppo import Engine, SamplingConfig
from fastppo.engine import engine as engine_module


def mistral(**settings):
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, "sliding_window": 7}
    return MistralForCausalLM(MistralConfig(**(size | ids | settings))).eval()


MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "mistral": mistral}


@pytest.fixture(autouse=True)
def _paged(monkeypatch):
    """Decode on the paged cache even where its attention has no kernels."""
    monkeypatch.setattr(engine_module, "has_kernels", lambda device: True)


def bytes_of_a_block(model):
    engine = Engine(model)
    engine.generate([[5]], max_new_tokens=1)
    return engine._cache._block_bytes(engine._cache.windows[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("max_rows", "prefill_tokens", "blocks"), [(64, 2048, None), (3, 5, None), (64, 7, 5), (1, 1, 4)]
)
def test_equals_the_naive_loop_whatever_the_schedule(name, max_rows, prefill_tokens, blocks):
    model, queries = MODELS[name](), tiny.queries(6, longest=20)
    limits = [40, 30, 20, 10, 5, 1]
    memory = None if blocks is None else blocks * bytes_of_a_block(model)
    engine = Engine(model, seed=7, max_rows=max_rows, prefill_tokens=prefill_tokens, kv_memory=memory)
    rollout = engine.generate(queries, SamplingConfig(), n=2, max_new_tokens=limits)
    assert engine.metrics()["tier"] == "A"
    for i in range(12):
        tokens, logprobs = naive(model, queries[i // 2], limits[i // 2], seed=7, request=i)
        assert rollout[i].tolist() == tokens
        torch.testing.assert_close(rollout.split(rollout.logprobs)[i], torch.tensor(logprobs), atol=2e-5, rtol=0)

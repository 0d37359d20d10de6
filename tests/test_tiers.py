"""Generation by models that do not page: left-padded, by states, or whole; the same tokens as a naive loop."""

import families
import pytest
import torch
from test_engine import naive

from fastppo import AutoModelForCausalLMWithValueHead, Engine, PPOConfig, PPOTrainer, SamplingConfig
from fastppo.engine.tiers import capabilities
from fastppo.models import probe

TIERS = {"bloom": "B", "gpt_neo": "B", "mamba": "C", "lfm2": "C", "falcon_h1": "C", "openai-gpt": "D", "rwkv": "D"}


def prompts():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=draw) for length in (3, 1, 6, 3, 4)]


@pytest.mark.parametrize("family", TIERS)
def test_equals_the_naive_loop_whatever_the_tier(family):
    model, queries = families.build(family), prompts()
    assert capabilities(model).tier == TIERS[family]
    limits = [4, 12, 7, 1, 9]  # three rows: the others join as these leave
    rollout = Engine(model, seed=7, max_rows=3).generate(queries, SamplingConfig(stop_ids=()), max_new_tokens=limits)
    for i, (query, limit) in enumerate(zip(queries, limits, strict=True)):
        model.config.eos_token_id = None
        tokens, logprobs = naive(model, query, limit, seed=7, request=i)
        assert rollout[i].tolist() == tokens
        torch.testing.assert_close(rollout.split(rollout.logprobs)[i], torch.tensor(logprobs), atol=1e-4, rtol=0)


def test_a_slower_tier_says_why_the_faster_ones_are_wrong():
    found = capabilities(families.build("mamba"))
    assert list(found.refused) == ["A", "B"]
    assert "AttentionInterface" in found.refused["A"]
    assert "log-probs differ" in found.refused["B"]
    assert found.verdict.error <= found.verdict.bound < 1e-3


@pytest.mark.parametrize("kind", ["llama4_text", "qwen3_next", "mpt", "gptj", "falcon", "codegen", "mamba", "lfm2"])
def test_models_that_would_be_silently_wrong_do_not_page(kind):
    model = families.build(kind)
    assert not probe.paged(model)
    assert not probe.packed(model)
    assert probe.padded(model)


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "bloom", "rwkv"])
def test_what_generates_on_a_slower_tier_is_trained(family):
    """The update finds the log-probs that generation recorded, and moves the weights."""
    model = AutoModelForCausalLMWithValueHead(families.build(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = PPOTrainer(PPOConfig(batch_size=5, mini_batch_size=5, ppo_epochs=1, learning_rate=1e-3), model)
    rollout = Engine(model, seed=3).generate(prompts(), SamplingConfig(max_new_tokens=6, stop_ids=()))
    stats = trainer.step(rollout.queries, rollout, [0.0, 1.0, 0.5, 0.2, 0.7])
    assert stats["ppo/policy/logprob_gap_max"] < 1e-4
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

"""The same results on a GPU as on the host; run by benchmarks/gpu_run.sh on a machine that has one."""

import copy

import numpy as np
import pytest
import tiny
import torch

from fastppo import Engine, PPOConfig, PPOTrainer, SamplingConfig
from fastppo.engine import engine as engine_module

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_the_engine_draws_the_same_tokens(build):
    sampling, prompts = SamplingConfig(max_new_tokens=24), tiny.queries(12)
    model = tiny.with_value_head(build())
    host = Engine(model, max_rows=5).generate(prompts, sampling)
    device = Engine(copy.deepcopy(model).cuda(), max_rows=5).generate(prompts, sampling)
    # A token may differ where two candidates lie within rounding of each other; then all that follow do.
    same = [torch.equal(a, b.cpu()) for a, b in zip(host, device, strict=True)]
    assert sum(same) >= 11
    for a, b, is_same in zip(host.split(host.logprobs), device.split(device.logprobs), same, strict=True):
        if is_same:
            torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.8, "min_new_tokens": 9}, {"do_sample": False}])
def test_graphs_and_steps_that_nobody_looks_at_change_nothing(build, more, monkeypatch):
    model, rollouts = tiny.with_value_head(build()).cuda(), []
    sampling, prompts = SamplingConfig(max_new_tokens=40, **more), tiny.queries(21)
    for looks in ({"cuda": 8}, {"cuda": 3}, {}):
        monkeypatch.setattr(engine_module, "STEPS_PER_CHECK", looks)
        if not looks:
            monkeypatch.setattr(engine_module, "GraphStep", lambda model, cache: None)
        engine = Engine(model, max_rows=13, seed=4)
        rollouts.append(engine.generate(prompts, sampling, n=2))
        if looks:
            assert engine.metrics()["decoder"] == "graphs"
            assert engine._program.captures > 0, "nothing was captured"
    for other in rollouts[1:]:
        assert torch.equal(rollouts[0].tokens, other.tokens)
        torch.testing.assert_close(rollouts[0].logprobs, other.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(rollouts[0].values, other.values, atol=1e-5, rtol=0)


def test_graphs_see_weights_that_were_updated_in_place():
    model = tiny.llama().cuda()
    engine, prompts = Engine(model), tiny.queries(9)
    for _ in range(3):
        rollout = engine.generate(prompts, max_new_tokens=20, min_new_tokens=20)
        for query, response, logprobs in zip(prompts, rollout, rollout.split(rollout.logprobs), strict=True):
            with torch.no_grad():
                logits = model(torch.cat([query.cuda(), response])[None]).logits[0, len(query) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
            torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def test_a_step_agrees_and_a_skip_changes_nothing():
    queries, responses = tiny.queries(8), tiny.queries(8, seed=1)
    stats, trainers = [], []
    for accelerator in ({"cpu": True}, {}):
        config = PPOConfig(batch_size=8, mini_batch_size=8, ppo_epochs=2, accelerator_kwargs=accelerator)
        trainers.append(PPOTrainer(config, tiny.with_value_head(tiny.llama())))
        stats.append(trainers[-1].step(queries, responses, [float(i) for i in range(8)]))
    assert trainers[1].current_device.type == "cuda"
    for name, value in stats[0].items():
        if not name.startswith("time/"):
            np.testing.assert_allclose(stats[1][name], value, atol=1e-3, rtol=1e-3, err_msg=name)
    trainer = trainers[1]
    trainer.config.ratio_threshold = 1e-6
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    skipped = trainer.step(queries, responses, [1.0] * 8)
    assert skipped["ppo/skipped_steps"] == skipped["ppo/optimizer_steps"] == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def longer_step(trainer):
    queries, responses = (tiny.queries(8, seed=seed, longest=100) for seed in (0, 1))
    return trainer.step(queries, responses, [float(i) for i in range(8)])


def larger(**settings):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    config = PPOConfig(batch_size=8, mini_batch_size=8, ppo_epochs=1, learning_rate=1e-4, **settings)
    return PPOTrainer(config, tiny.with_value_head(tiny.llama(context=256, vocabulary=1000, **sizes)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_take_less_and_give_the_same(checkpointing):
    peaks, trainers = [], []
    for offload in (False, True):
        trainers.append(larger(activation_offload=offload, gradient_checkpointing=checkpointing))
        longer_step(trainers[-1])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        longer_step(trainers[-1])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] or checkpointing  # of so few layers' inputs hardly anything can be saved
    for a, b in zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_compact_moments_go_on_from_a_checkpoint(optim, tmp_path):
    trainer, other = (larger(optim=optim) for _ in range(2))
    longer_step(trainer)
    trainer.save_checkpoint(tmp_path / "checkpoint-000001")
    other.resume_from(tmp_path / "checkpoint-000001")
    for one in (trainer, other):
        states = [state["state1"] for state in one.optimizer.state.values()]
        is_paged = [getattr(state, "is_paged", False) for state in states if state.numel() >= 1e5]
        assert is_paged
        assert all(paged == optim.startswith("paged") for paged in is_paged)
        assert longer_step(one)["ppo/skipped_steps"] == 0
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

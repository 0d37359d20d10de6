"""The same results on a GPU as on the host; run by benchmarks/gpu_run.sh on a machine that has one."""

import copy

import numpy as np
import pytest
import tiny
import torch

from fastppo import Engine, PPOConfig, PPOTrainer, SamplingConfig

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

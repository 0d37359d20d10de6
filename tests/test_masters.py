"""bf16 training: fp32 masters, through steps, skips and checkpoints."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastppo import PPOConfig, PPOTrainer
from fastppo.trainers import masters
from fastppo.trainers.masters import MasterAdam
from tests.tiny_trainers import lora, policy


def gradients(parameter, seed):
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter.dtype)


def test_it_is_adam_on_the_masters():
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.nn.Parameter(start.clone())
    oracle = torch.nn.Parameter(start.double())
    ours = MasterAdam([weight], lr=1e-4, weight_decay=0.1)
    theirs = torch.optim.Adam([oracle], lr=1e-4, weight_decay=0.1)
    for step in range(20):
        gradients(weight, step)
        oracle.grad = weight.grad.double()
        ours.step()
        theirs.step()
    master = ours.state[weight]["master"]
    assert torch.allclose(master.double(), oracle, rtol=0, atol=3e-6)
    assert torch.equal(weight, master.bfloat16())
    # The updates, 20 of 1e-4, are too small for most bf16 weights to move one at a time.
    assert (master - start.float()).abs().mean() > 2e-4


@pytest.mark.parametrize("shape", [(300, 7), (5, 900), (1000,), (2, 3, 130), (), (0, 4)])
def test_slices_change_nothing_but_the_last_digit(monkeypatch, shape):
    steps = []
    for at_a_time in (2**20, 256):
        monkeypatch.setitem(masters._AT_A_TIME, "cpu", at_a_time)
        weight = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
        optimizer = MasterAdam([weight], lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True)
        for step in range(3):
            gradients(weight, step)
            optimizer.found_inf = torch.tensor(float(step == 1))
            optimizer.step()
        steps.append(optimizer.state[weight])
        assert torch.equal(weight, steps[-1]["master"].bfloat16())
    for name, whole in steps[0].items():  # torch's scalar tail rounds otherwise than its vectors
        assert torch.allclose(steps[1][name], whole, rtol=1e-6, atol=1e-9)
    assert float(steps[1]["step"]) == 2  # the bad one does not count


@pytest.mark.parametrize("at_a_time", [2**20, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_that_lies_transposed_is_updated_like_any_other(monkeypatch, dtype, at_a_time):
    monkeypatch.setitem(masters._AT_A_TIME, "cpu", at_a_time)
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    usual, turned = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.t().contiguous().t())
    for weight in (usual, turned):
        optimizer = MasterAdam([weight], lr=0.1)
        for step in range(3):
            gradients(weight, step)
            optimizer.step()
    assert not turned.is_contiguous()
    torch.testing.assert_close(turned, usual, rtol=1e-6, atol=1e-7)


def test_a_large_weight_is_updated_with_a_small_copy_of_its_gradient(monkeypatch):
    monkeypatch.setitem(masters._AT_A_TIME, "cpu", 1000)
    sizes, plain = [], masters.adam

    def watched(parameters, gradients, *rest, **named):
        sizes.append(gradients[0].numel())
        plain(parameters, gradients, *rest, **named)

    monkeypatch.setattr(masters, "adam", watched)
    weight = torch.nn.Parameter(torch.randn(95, 100).bfloat16())
    gradients(weight, 0)
    MasterAdam([weight]).step()
    assert sizes == [1000] * 9 + [500]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_first_step_that_runs_out_of_memory_can_be_taken_again(number):
    weight = torch.nn.Parameter(torch.full((4,), 300.0, dtype=torch.bfloat16))
    optimizer, calls = MasterAdam([weight], lr=0.1), []

    class Failing(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.zeros, torch.Tensor.to, torch.Tensor.float):
                calls.append(function)
                if len(calls) == number + 1:
                    raise MemoryError
            return function(*args, **(kwargs or {}))

    gradients(weight, 0)
    with pytest.raises(MemoryError), Failing():
        optimizer.step()
    optimizer.step()
    assert optimizer.state[weight]["master"].dtype == torch.float32
    assert float(optimizer.state[weight]["step"]) == 1
    assert (optimizer.state[weight]["master"] - 300.0).abs().max() > 0.05  # less than a bf16 number can move


def test_a_step_that_fails_leaves_no_verdict_behind(monkeypatch):
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4, bf16=True), policy("llama"))
    data = batch(trainer)

    def fail(*arguments, **named):
        raise MemoryError

    monkeypatch.setattr(masters, "adam", fail)
    with pytest.raises(MemoryError):
        trainer.step(*data)
    assert not hasattr(trainer.optimizer, "found_inf")


def test_a_bad_step_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdam([weight], lr=0.1)
    gradients(weight, 0)
    optimizer.step()
    before, master = weight.clone(), optimizer.state[weight]["master"].clone()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["master"], master)


def test_loading_keeps_fp32():
    weight = torch.nn.Parameter(torch.randn(3, 3).bfloat16())
    optimizer = MasterAdam([weight], lr=1e-3)
    gradients(weight, 0)
    optimizer.step()
    other = MasterAdam([torch.nn.Parameter(weight.detach().clone())], lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (loaded,) = other.state.values()
    assert loaded["master"].dtype == loaded["exp_avg"].dtype == torch.float32
    assert torch.equal(loaded["master"], optimizer.state[weight]["master"])


def batch(trainer, rows=4):
    generator = torch.Generator().manual_seed(3)
    queries = [torch.randint(2, 40, (5 + i,), generator=generator) for i in range(rows)]
    rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=6, min_new_tokens=6)
    return queries, rollout, [float(i) for i in range(rows)]


@pytest.mark.parametrize("make", [lambda: policy("llama"), lambda: policy("gpt2"), lambda: lora("llama")])
def test_a_step_in_bf16(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2, bf16=True), model)
    kinds = {name: p.dtype for name, p in model.pretrained_model.named_parameters()}
    assert all((dtype == torch.float32) == ("lora_" in name) for name, dtype in kinds.items())
    assert trainer.model.v_head.summary.weight.dtype == torch.float32
    stats = trainer.step(*batch(trainer))
    assert stats["ppo/skipped_steps"] == 0
    assert stats["ppo/policy/logprob_gap_max"] < 0.3
    trainer.save_checkpoint(tmp_path / "checkpoint-000001")
    other = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2, bf16=True), make())
    other.resume_from(tmp_path / "checkpoint-000001")
    for one in (trainer, other):
        torch.manual_seed(1)
        one.step(*batch(one))
    pairs = zip(trainer.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_optimizer_without_masters_is_refused():
    model = policy("gpt2")
    with pytest.raises(ValueError, match=r"PPOConfig.bf16=True came with an optimizer \(Adam\)"):
        PPOTrainer(PPOConfig(bf16=True), model, optimizer=torch.optim.Adam(model.parameters()))

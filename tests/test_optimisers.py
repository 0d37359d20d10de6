"""Optimisers by name: the one that is meant, its updates, its skips and its checkpoints."""

import pytest
import tiny_trainers as tiny
import torch

from fastppo import PPOConfig
from fastppo.checkpoint import load_checkpoint, save_checkpoint
from fastppo.trainers.masters import MasterAdam
from fastppo.trainers.setup import make_optimizer

# Large enough for 8-bit moments, which bitsandbytes keeps for 4,096 numbers and more.
SIZES = {"n_embd": 64, "n_head": 2}


def eight_bit(**settings):
    model = tiny.policy("gpt2", **SIZES)
    return tiny.trainer(model, optim="adamw_8bit", learning_rate=1e-3, **settings)


def test_the_default_is_adam_as_before():
    optimizer = tiny.trainer(kind="gpt2").optimizer
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["weight_decay"] == 0
    assert not optimizer.defaults["decoupled_weight_decay"]


def seeded_gradients(model, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_updates_are_those_of_adamw(optim):
    ours, theirs = (tiny.policy("gpt2", **SIZES) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, PPOConfig(optim=optim, learning_rate=1e-2, weight_decay=0.1))
    oracle = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    start = torch.cat([p.detach().flatten() for p in theirs.parameters()])
    for step in range(5):
        for model, one in ((ours, optimizer), (theirs, oracle)):
            seeded_gradients(model, step)
            one.step()
    moved = torch.cat([p.detach().flatten() for p in theirs.parameters()]) - start
    error = torch.cat([(a - b).detach().flatten() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)])
    # 8 bits round each moment to a part in about 100.
    assert float(error.norm() / moved.norm()) < (1e-6 if optim == "adamw_torch" else 3e-2)


def test_masters_decay_as_adamw_does():
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, oracle = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    ours = MasterAdam([weight], lr=1e-2, weight_decay=0.5, decoupled_weight_decay=True)
    theirs = torch.optim.AdamW([oracle], lr=1e-2, weight_decay=0.5)
    for _ in range(10):
        weight.grad = torch.full_like(weight, 0.25)
        oracle.grad = weight.grad.double()
        ours.step()
        theirs.step()
    assert torch.allclose(ours.state[weight]["master"].double(), oracle, rtol=0, atol=1e-6)


def test_moments_in_8_bits_are_a_quarter():
    compact, plain = eight_bit(), tiny.trainer(tiny.policy("gpt2", **SIZES))
    for trainer in (compact, plain):
        trainer.step(*tiny.batch())
    large = [p for p in compact.model.parameters() if p.numel() >= 4096]
    states = [compact.optimizer.state[p] for p in large]
    assert {state[name].dtype for state in states for name in ("state1", "state2")} == {torch.uint8}
    sizes = [trainer.memory_report().by_owner()["optimiser state"] for trainer in (compact, plain)]
    assert sizes[0] < 0.31 * sizes[1]


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_a_bad_minibatch_leaves_weights_and_moments_alone(optim):
    model = tiny.policy("gpt2", **SIZES)
    trainer = tiny.trainer(model, optim=optim, learning_rate=1e-3)
    trainer.step(*tiny.batch())
    before = tiny.snapshot(trainer)
    hook = model.v_head.summary.weight.register_hook(lambda gradient: gradient * torch.nan)
    stats = trainer.step(*tiny.batch())
    assert stats["ppo/nonfinite_steps"] == stats["ppo/optimizer_steps"] == 2
    tiny.assert_untouched(trainer, before)
    hook.remove()
    assert trainer.step(*tiny.batch())["ppo/skipped_steps"] == 0
    assert tiny.distance(tiny.weights(model), before[0]) > 0


def test_a_run_with_8_bit_moments_goes_on_bit_for_bit(tmp_path):
    trainer = eight_bit()
    trainer.step(*tiny.batch())
    trainer.save_checkpoint(tmp_path / "checkpoint-000001")
    other = eight_bit()
    other.resume_from(tmp_path / "checkpoint-000001")
    for one in (trainer, other):
        one.step(*tiny.batch())
    assert tiny.distance(tiny.weights(trainer.model), tiny.weights(other.model)) == 0
    wrong = tiny.trainer(tiny.policy("gpt2", **SIZES), learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"optim: 'adamw_8bit' then, 'adam' now"):
        wrong.resume_from(tmp_path / "checkpoint-000001")


def test_pages_are_taken_again_when_a_run_goes_on(tmp_path):
    """A GPU's page is made here by a stand-in: bitsandbytes loads into ordinary memory."""
    from bitsandbytes.optim import AdamW

    class Network(torch.nn.Linear):
        is_peft_model, critic = False, None

        def save_pretrained(self, directory):
            from safetensors.torch import save_file

            save_file(self.state_dict(), directory / "model.safetensors")

    class Paged(AdamW):
        def get_state_buffer(self, p, dtype=torch.float32):
            pages.append(torch.zeros(p.shape, dtype=dtype))
            return pages[-1]

    pages, models = [], [Network(64, 64, bias=False) for _ in range(2)]
    for model in models:
        model.optimizer = Paged(model.parameters(), lr=0.1, optim_bits=8, is_paged=True)
    seeded_gradients(models[0], 0)
    models[0].optimizer.step()
    save_checkpoint(tmp_path / "checkpoint-000001", models[0], None, models[0].optimizer, {})
    pages.clear()
    load_checkpoint(tmp_path / "checkpoint-000001", models[1], models[1].optimizer, lambda state: None)
    (loaded,), (saved,) = models[1].optimizer.state.values(), models[0].optimizer.state.values()
    assert loaded["state1"] is pages[0]
    assert loaded["state2"] is pages[1]
    assert torch.equal(loaded["state1"], saved["state1"])
    assert bool(loaded["state2"].any())


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_pages_need_a_gpu(optim):
    with pytest.raises(ValueError, match=f"optim='{optim}' pages between a GPU and its host, but the model is on cpu"):
        tiny.trainer(kind="gpt2", optim=optim)


def test_16_bit_weights_without_masters_are_refused():
    numbers = sum(p.numel() for p in tiny.policy("gpt2").pretrained_model.parameters())
    with pytest.raises(
        ValueError, match=rf"'adamw_8bit' keeps no fp32 masters, and {numbers:,} of the trained numbers"
    ):
        tiny.trainer(kind="gpt2", optim="adamw_8bit", bf16=True)
    trainer = tiny.trainer(tiny.lora("llama"), optim="adamw_8bit", bf16=True)  # adapters are fp32
    assert trainer.step(*tiny.batch())["ppo/skipped_steps"] == 0


def test_a_name_beside_an_optimiser_is_refused():
    model = tiny.policy("gpt2")
    with pytest.raises(ValueError, match=r"optim='adamw_8bit' came with an optimizer \(SGD\); leave out either"):
        tiny.trainer(model, optim="adamw_8bit", others={"optimizer": torch.optim.SGD(model.parameters())})


def test_weight_decay_needs_an_optimiser_that_decays():
    with pytest.raises(ValueError, match=r"weight_decay=0.1 has no effect with optim='adam'"):
        PPOConfig(weight_decay=0.1).check()
    PPOConfig(weight_decay=0.1, optim="adamw_torch").check()


def test_a_bitsandbytes_without_the_kernels_is_found_out_before_any_work(monkeypatch):
    from bitsandbytes.optim import AdamW

    def step(self):
        raise RuntimeError("all tensors must be on a GPU")

    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(
        ValueError, match=r"on cpu \(all tensors must be on a GPU\); upgrade it, or choose optim='adam'"
    ):
        tiny.trainer(kind="gpt2", optim="adamw_8bit")

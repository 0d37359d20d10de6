"""Critics: their gradients against plain PEFT and transformers, warm-up, where they start, saving and resuming."""

import copy

import peft
import pytest
import tiny_trainers as tiny
import torch
from transformers import LlamaForCausalLM

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, ppo
from fastppo.models.attach import is_attached
from fastppo.models.critic import CRITIC, critic_kind, critic_parameters, critic_pass
from fastppo.models.network import evaluating
from fastppo.models.passes import passing
from fastppo.ops.attention import has_kernels
from fastppo.trainers import ppo as ppo_trainer
from fastppo.trainers import update

OWN = ("adapter", "full")


def model_for(critic, kind="llama"):
    return tiny.lora(kind) if critic == "adapter" else tiny.policy(kind)


def trainer_of(critic="adapter", model=None, **settings):
    settings = {"critic": critic, "critic_learning_rate": 2e-2, **settings}
    return tiny.trainer(model_for(critic) if model is None else model, **settings)


def watched(monkeypatch, trainer):
    """Take a step; return the experience of its update, and the gradients of its first minibatch by name."""
    seen = {}
    optimise, step = update.optimise, update._step

    def watch_update(model, optimizer, experience, *rest):
        seen["experience"] = experience
        return optimise(model, optimizer, experience, *rest)

    def watch_step(optimizer, *rest):
        named = trainer.model.named_parameters()
        seen.setdefault("gradients", {name: p.grad.clone() for name, p in named if p.grad is not None})
        return step(optimizer, *rest)

    monkeypatch.setattr(ppo_trainer, "optimise", watch_update)
    monkeypatch.setattr(update, "_step", watch_step)
    trainer.step(*tiny.batch())
    return seen["experience"], seen["gradients"]


def plain_values(model, samples, critic):
    """The values of the response tokens, (T,), by transformers and PEFT alone, one sequence at a time."""
    network = model.critic if critic == "full" else model.pretrained_model
    if critic == "adapter":
        network.set_adapter(CRITIC)
    rows = []
    for query, response in zip(samples.queries, samples.responses, strict=True):
        output = network(input_ids=torch.cat([query, response])[None], output_hidden_states=True)
        rows.append(model.v_head(output.hidden_states[-1][0, len(query) - 1 : -1])[:, 0])
    return torch.cat(rows)


def plain_gradients(model, experience, config):
    """The gradients of PPO's loss at its first step, by autograd on plain forward passes, by name."""
    model.eval()
    samples = experience.samples
    values, old = plain_values(model, samples, config.critic), experience.evaluation.values
    clipped = old + (values - old).clamp(-config.cliprange_value, config.cliprange_value)
    errors = torch.maximum((values - experience.returns) ** 2, (clipped - experience.returns) ** 2)
    (config.vf_coef * errors.mean() / 2).backward()
    if config.critic_detach:
        for parameter in model.pretrained_model.parameters():
            parameter.grad = None
    if config.critic == "adapter":
        model.pretrained_model.set_adapter("default")
    rows = []
    for query, response in zip(samples.queries, samples.responses, strict=True):
        logits = model.pretrained_model(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(-1, response[:, None])[:, 0])
    (-experience.advantages * torch.cat(rows)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize(
    ("critic", "kind", "detach"),
    [
        ("adapter", "llama", False),
        ("adapter", "gpt2", False),
        ("full", "llama", False),
        ("full", "gpt2", False),
        ("head", "llama", True),
    ],
)
def test_the_gradients_of_policy_and_critic_are_those_of_plain_passes(
    monkeypatch, critic, kind, detach, is_checkpointed
):
    settings = {"critic_detach": detach, "gradient_checkpointing": is_checkpointed, "ppo_epochs": 1, "vf_coef": 0.7}
    trainer = trainer_of(critic, model_for(critic, kind), **settings)
    if critic == "adapter":  # it begins as the policy's: tell them apart
        with torch.no_grad():
            for parameter in critic_parameters(trainer.model):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    alone = copy.deepcopy(trainer.model)
    alone.gradient_checkpointing_disable()
    experience, got = watched(monkeypatch, trainer)
    expected = plain_gradients(alone, experience, trainer.config)
    assert got.keys() == expected.keys()
    assert any(CRITIC in name or name.startswith("critic.") for name in got) == (critic != "head")
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-2)
        torch.testing.assert_close(got[name], gradient, atol=1e-4 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("critic", OWN)
@pytest.mark.parametrize("exact", [False, True])
def test_values_come_from_the_critic_even_where_log_probs_are_recorded(monkeypatch, critic, exact):
    trainer = trainer_of(critic, consistency="exact" if exact else "bounded", learning_rate=0.1)
    queries, responses, scores = tiny.batch()
    trainer.step(queries, responses, scores)  # away from the policy, where it began
    alone, seen = copy.deepcopy(trainer.model).eval(), []
    monkeypatch.setattr(ppo_trainer, "optimise", lambda *a: seen.append(a[2]) or update.optimise(*a))
    rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=9, min_new_tokens=5)
    trainer.step(queries, rollout, scores)
    evaluation = seen[0].evaluation
    assert evaluation.is_recorded
    assert torch.equal(evaluation.logprobs, rollout.logprobs)
    with torch.no_grad():
        expected = plain_values(alone, seen[0].samples, critic)
    torch.testing.assert_close(evaluation.values, expected, atol=2e-5, rtol=0)
    assert float((evaluation.values - rollout.values).abs().max()) > 1e-3


def test_a_second_network_runs_in_the_layout_of_the_policy():
    model = trainer_of("full").model
    with evaluating(model), passing(model), critic_pass(model, "full") as network:
        assert network is model.critic
        assert is_attached(network) == is_attached(model)
        assert is_attached(model) or not has_kernels(model.device)
    assert not is_attached(network)


def test_sums_of_rewards_by_hand():
    rewards, offsets = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([0, 3, 4])
    returns = ppo.monte_carlo_returns(rewards, offsets, PPOConfig(gamma=0.5))
    assert returns.tolist() == [3.0, 4.0, 4.0, 3.0]


@pytest.mark.parametrize("compat", [None, "trl-0.7"])
@pytest.mark.parametrize("critic", ["head", *OWN])
def test_a_warm_up_leaves_the_policy_bitwise_as_it_was(monkeypatch, critic, compat):
    trainer = trainer_of(critic, critic_warmup_steps=2, gamma=0.9, init_kl_coef=0.3, compat=compat, entropy_coef=0.1)
    own = {id(parameter) for parameter in critic_parameters(trainer.model)}
    named = dict(trainer.model.named_parameters())
    policy = {name: p.detach().clone() for name, p in named.items() if id(p) not in own}
    values = {name: p.detach().clone() for name, p in named.items() if id(p) in own}
    experience, gradients = watched(monkeypatch, trainer)
    for start, end in zip(experience.samples.offsets[:-1], experience.samples.offsets[1:], strict=True):
        rewards = experience.rewards[start:end].double()
        sums = [sum(0.9 ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
        torch.testing.assert_close(experience.returns[start:end].double(), torch.stack(sums), atol=1e-5, rtol=1e-5)
    trainer.step(*tiny.batch())
    assert {id(named[name]) for name in gradients} == own
    assert all(torch.equal(named[name], before) for name, before in policy.items())
    assert not any(torch.equal(named[name], before) for name, before in values.items())
    assert trainer.kl_ctl.value == 0.3  # a policy that is held says nothing of the coefficient
    trainer.step(*tiny.batch())
    assert any(not torch.equal(named[name], before) for name, before in policy.items())


@pytest.mark.parametrize("critic", OWN)
def test_a_critic_starts_where_the_policy_does(critic):
    model = model_for(critic)
    with torch.no_grad():
        expected = model.eval().v_head(
            model.pretrained_model(torch.arange(2, 9)[None], output_hidden_states=True).hidden_states[-1]
        )
    trainer = trainer_of(critic, model)
    if critic == "adapter":
        model.pretrained_model.set_adapter(CRITIC)
    network = model.critic if critic == "full" else model.pretrained_model
    with torch.no_grad():
        hidden = network.eval()(torch.arange(2, 9)[None], output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(trainer.model.v_head(hidden), expected)


def test_a_full_critic_of_an_adapter_starts_from_the_merged_weights():
    model = tiny.lora("llama")
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        expected = model.eval().pretrained_model(ids, output_hidden_states=True).hidden_states[-1]
        trainer = trainer_of("full", model)
        actual = trainer.model.critic(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in trainer.model.critic.named_parameters())
    trainer.step(*tiny.batch())


def test_an_adapter_critic_adds_nothing_but_its_own_rank():
    model = tiny.lora("llama", trained=False)  # whose reference is the base
    before = {id(parameter) for parameter in model.parameters()}
    trainer = trainer_of("adapter", model, critic_peft_config={"r": 3, "target_modules": ["q_proj"]})
    added = {name: p.shape for name, p in model.named_parameters() if id(p) not in before}
    assert {name.split(".lora_")[1] for name in added} == {f"A.{CRITIC}.weight", f"B.{CRITIC}.weight"}
    assert all("q_proj" in name and 3 in shape for name, shape in added.items())
    assert len(added) == 4  # A and B of two layers
    trainer.step(*tiny.batch())


def test_a_full_critic_shares_the_head_that_it_never_uses():
    trainer = trainer_of("full")
    model = trainer.model
    assert model.critic.lm_head.weight is model.pretrained_model.lm_head.weight
    assert all(p is not model.pretrained_model.lm_head.weight for p in critic_parameters(model))
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in critic_parameters(model)} == {2e-2}
    assert {rates[id(p)] for p in model.pretrained_model.parameters()} == {1e-2}


@pytest.mark.parametrize("critic", OWN)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, critic):
    def run(trainer, steps):
        for _ in range(steps):
            queries, _, scores = tiny.batch()
            rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=8)
            trainer.step(queries, rollout, scores)

    whole = trainer_of(critic, critic_warmup_steps=2)
    run(whole, 1)
    whole.save_checkpoint(tmp_path / "checkpoint-000001")
    run(whole, 3)
    resumed = trainer_of(critic, critic_warmup_steps=2)
    resumed.resume_from(tmp_path)
    run(resumed, 3)
    tiny.assert_untouched(resumed, tiny.snapshot(whole))
    assert any(CRITIC in name or name.startswith("critic.") for name in whole.model.state_dict())
    with pytest.raises(ValueError, match=f"critic: '{critic}' then, 'head' now"):
        tiny.trainer(model_for(critic)).resume_from(tmp_path)


def test_a_changed_file_of_the_critic_is_noticed(tmp_path):
    trainer_of("full").save_checkpoint(tmp_path / "checkpoint-000001")
    path = tmp_path / "checkpoint-000001" / CRITIC / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"config.json is missing or damaged"):
        trainer_of("full").resume_from(tmp_path / "checkpoint-000001")


@pytest.mark.parametrize("critic", OWN)
def test_what_is_saved_is_open_to_plain_libraries_and_loads_with_its_critic(tmp_path, critic):
    base = tiny.network("llama")
    base.save_pretrained(tmp_path / "base")
    settings = {"peft_config": peft.LoraConfig(r=2, task_type="CAUSAL_LM")} if critic == "adapter" else {}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base", **settings)
    trainer = trainer_of(critic, model)
    trainer.step(*tiny.batch())
    trainer.save_pretrained(tmp_path / "run")
    ids, folder = torch.arange(2, 12)[None], tmp_path / "run"
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert critic_kind(loaded) == critic
    if critic == "adapter":
        opened = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), folder)
        critics = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), folder / CRITIC)
    else:
        opened, critics = (LlamaForCausalLM.from_pretrained(path) for path in (folder, folder / CRITIC))
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(ids).logits, model.eval()(ids)[0])
        torch.testing.assert_close(loaded.eval()(ids)[0], model(ids)[0])
        values = loaded.v_head(critics.eval()(ids, output_hidden_states=True).hidden_states[-1])[0, 2:-1, 0]
    again = trainer_of(critic, loaded, batch_size=1, ppo_epochs=1)
    flags = {name: p.requires_grad for name, p in again.model.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(ppo_trainer, "optimise", lambda *a: seen.append(a[2]) or update.optimise(*a))
        again.step([ids[0, :3]], [ids[0, 3:]], [1.0])
    torch.testing.assert_close(seen[0].evaluation.values, values, atol=1e-5, rtol=0)
    assert flags == {name: p.requires_grad for name, p in again.model.named_parameters()}
    with pytest.raises(
        ValueError, match=f"critic='head', but the model's value head was trained with critic='{critic}'"
    ):
        tiny.trainer(AutoModelForCausalLMWithValueHead.from_pretrained(folder))


def test_a_fresh_adapter_s_reference_leaves_every_flag_as_it_is():
    trainer = trainer_of("adapter", tiny.lora("llama", trained=False))
    flags = [p.requires_grad for p in trainer.model.parameters()]
    for context in (trainer.reference.active(), trainer.optional_peft_ctx()):
        with context:
            assert flags == [p.requires_grad for p in trainer.model.parameters()]
    assert flags == [p.requires_grad for p in trainer.model.parameters()]
    assert all(p.requires_grad for p in critic_parameters(trainer.model))
    assert len(critic_parameters(trainer.model)) == 2 + 8


def test_a_second_network_is_no_part_of_the_reference():
    model = trainer_of("full").model
    again = trainer_of("full", model)
    assert again.ref_model.critic is None
    assert model.critic is not None


def quantised():
    """A policy that says of its weights what transformers makes those in 8 bits say."""
    model = tiny.lora("llama")
    model.pretrained_model.get_base_model().is_quantized = True
    return model


WRONG = {
    "critic_detach": (lambda: PPOConfig(critic="full", critic_detach=True).check(), "critic_detach=True has no effect"),
    "critic_peft_config": (lambda: PPOConfig(critic_peft_config={"r": 2}).check(), "needs critic='adapter'"),
    "critic_init": (lambda: PPOConfig(critic_init="reward_adapter").check(), "needs critic='adapter' or 'full'"),
    "both": (
        lambda: PPOConfig(critic="adapter", critic_init="reward_adapter", critic_peft_config={"r": 2}).check(),
        "needs no critic_peft_config",
    ),
    "no adapter": (lambda: trainer_of("adapter", tiny.policy()), "load it with peft_config=LoraConfig"),
    "no field": (lambda: trainer_of(critic_peft_config={"rank": 2}), r"\['rank'\], which are no fields of LoraConfig"),
    "8 bits": (lambda: trainer_of("full", quantised()), "8-bit and 4-bit weights cannot be; set critic='adapter'"),
    "no reward": (lambda: trainer_of(critic_init="reward_adapter"), "the model has no reward adapter"),
    "an optimizer": (
        lambda: trainer_of("full", others={"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)}),
        "made before the critic that it would have to train",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_refused_with_the_remedy(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_one_gradient_step_of_a_bf16_policy_with_a_second_network():
    trainer = trainer_of("full", bf16=True)
    assert {p.dtype for p in trainer.model.critic.parameters()} == {torch.bfloat16}
    before = tiny.weights(trainer.model)
    trainer.step(*tiny.batch())
    after = tiny.weights(trainer.model)
    assert not torch.equal(
        before["critic.model.layers.0.mlp.up_proj.weight"], after["critic.model.layers.0.mlp.up_proj.weight"]
    )


def test_accumulated_groups_give_the_critic_the_gradient_of_the_whole(monkeypatch):
    settings = {"ppo_epochs": 1, "batch_size": 4}
    whole = watched(monkeypatch, trainer_of("adapter", mini_batch_size=4, **settings))[1]
    parts = watched(monkeypatch, trainer_of("adapter", mini_batch_size=1, gradient_accumulation_steps=4, **settings))[1]
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)

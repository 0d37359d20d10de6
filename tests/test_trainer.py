"""PPOTrainer: TRL's scripts, records and their refusal, overrides, learning, resuming, the loop around it."""

import copy
import json

import numpy as np
import peft
import pytest
import tiny
import torch

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from fastppo.core import LengthSampler

TARGET = 7  # the token that the toy reward likes


def make(model=None, tokenizer=None, optimizer=None, lr_scheduler=None, **settings):
    config = {"batch_size": 8, "mini_batch_size": 4, "learning_rate": 3e-3, "ppo_epochs": 2, "seed": 1} | settings
    model = tiny.with_value_head(tiny.llama()) if model is None else model
    return PPOTrainer(PPOConfig(**config), model, tokenizer=tokenizer, optimizer=optimizer, lr_scheduler=lr_scheduler)


def rewards_of(responses):
    return [float((response == TARGET).float().mean()) for response in responses]


def iterate(trainer, steps, shuffle=False, size=12):
    """Run TRL's loop; return the mean rewards."""
    means, order = [], np.random.default_rng(0)
    for step in range(steps):
        queries = tiny.queries(trainer.config.batch_size, seed=step)
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=size, min_new_tokens=size)
        scores = rewards_of(responses)
        means.append(float(np.mean(scores)))
        trainer.step(queries, responses, list(order.permutation(scores)) if shuffle else scores)
    return means


def state_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)


def test_it_learns_and_the_shuffled_control_does_not():
    settings = {"batch_size": 32, "mini_batch_size": 32, "ppo_epochs": 4, "learning_rate": 1e-2, "init_kl_coef": 0.01}
    learned = iterate(make(**settings), 25)
    control = iterate(make(**settings), 25, shuffle=True)
    assert np.mean(learned[-5:]) > np.mean(learned[:3]) + 0.3
    assert np.mean(control[-5:]) < np.mean(control[:3]) + 0.1


def test_adapters_learn_and_nothing_else_moves():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead(peft.get_peft_model(tiny.llama(), config))
    settings = {"batch_size": 32, "mini_batch_size": 32, "ppo_epochs": 4, "learning_rate": 3e-2, "init_kl_coef": 0.01}
    trainer = make(model, **settings)
    before = state_of(trainer)
    means = iterate(trainer, 25)
    assert np.mean(means[-5:]) > np.mean(means[:3]) + 0.15
    for name, tensor in trainer.model.state_dict().items():
        if "lora" not in name and "v_head" not in name:
            assert torch.equal(tensor, before[name]), name


def test_a_quick_start_written_for_trl_0_7():
    """The loop of TRL 0.7's quick start, from its documented API; only the import line is another."""
    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny.llama())
    model_ref = create_reference_model(model)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = {"batch_size": 32, "mini_batch_size": 32, "learning_rate": 1e-2, "init_kl_coef": 0.01, "log_with": None}
    ppo_trainer = PPOTrainer(PPOConfig(**config), model, model_ref, tokenizer)
    query_txt = "w5 w9 w11"
    query_tensor = tokenizer.encode(query_txt, return_tensors="pt").to(ppo_trainer.accelerator.device)
    generation_kwargs = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.eos_token_id,
        "max_new_tokens": 20,
    }
    rewards = []
    for _ in range(25):
        queries = [query_tensor[0]] * config["batch_size"]
        response_tensors = ppo_trainer.generate(queries, return_prompt=False, **generation_kwargs)
        response_txts = [tokenizer.decode(response) for response in response_tensors]
        reward = [torch.tensor(text.split().count(f"w{TARGET}") / len(text.split())) for text in response_txts]
        stats = ppo_trainer.step(queries, response_tensors, reward)
        batch = {"query": [query_txt] * config["batch_size"], "response": response_txts}
        ppo_trainer.log_stats(stats, batch, reward)
        rewards.append(float(torch.stack(reward).mean()))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.3
    assert stats["objective/kl"] > 0


def test_the_sentiment_notebooks_loop_one_query_at_a_time():
    tokenizer = tiny.tokenizer()
    dataset = [{"input_ids": ids, "query": tokenizer.decode(ids)} for ids in tiny.queries(20)]

    def collator(data):
        return {key: [row[key] for row in data] for key in data[0]}

    config = PPOConfig(model_name="x", learning_rate=1.41e-5, log_with=None, batch_size=8, mini_batch_size=4)
    trainer = PPOTrainer(
        config, tiny.with_value_head(tiny.gpt2()), None, tokenizer, dataset=dataset, data_collator=collator
    )
    sampler = LengthSampler(4, 8)
    kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 0}
    seen = 0
    for batch in trainer.dataloader:
        responses = []
        for query in batch["input_ids"]:
            length = sampler()
            response = trainer.generate(query, max_new_tokens=length, **kwargs)
            assert response.dim() == 2
            assert torch.equal(response[0, : len(query)], query)
            responses.append(response.squeeze()[len(query) :])
        stats = trainer.step(batch["input_ids"], responses, [torch.tensor(1.0)] * 8)
        seen += 1
        assert stats["ppo/learning_rate"] == pytest.approx(1.41e-5)
    assert seen == len(trainer.dataloader) == 2


def test_records_and_plain_lists_give_the_same_step():
    trainers = [make(max_grad_norm=1.0) for _ in range(2)]
    queries = tiny.queries(8)
    rollout = trainers[0].generate(queries, return_prompt=False, max_new_tokens=10)
    stats = [
        trainers[0].step(queries, rollout, rewards_of(rollout)),
        trainers[1].step(queries, list(rollout), rewards_of(rollout)),
    ]
    assert {name for name in stats[0] if "/agreement/" not in name} == stats[1].keys() - {"ppo/agreement/recomputed"}
    for name in stats[1]:
        if not name.startswith("time/"):
            np.testing.assert_allclose(stats[0][name], stats[1][name], atol=1e-4, rtol=1e-4, err_msg=name)
    assert_same(state_of(trainers[0]), state_of(trainers[1]), atol=1e-4)
    assert stats[0]["ppo/policy/logprob_gap_max"] <= 5e-5


def evaluations(trainer, monkeypatch):
    """Record whether each step believed the rollout's records."""
    from fastppo.trainers import ppo as module

    believed, original = [], module.evaluate

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        believed.append(result.is_recorded)
        return result

    monkeypatch.setattr(module, "evaluate", spy)
    return believed


@pytest.mark.filterwarnings("ignore:the KL from the reference:UserWarning")  # tokens are edited by hand here
def test_records_are_believed_only_while_weights_and_tokens_stand(monkeypatch):
    trainer, queries = make(), tiny.queries(8)
    believed = evaluations(trainer, monkeypatch)

    def rollout():
        return trainer.generate(queries, return_prompt=False, max_new_tokens=8)

    fresh = rollout()
    trainer.step(queries, fresh, [1.0] * 8)
    trainer.step(queries, fresh, [1.0] * 8)  # the weights have moved since
    edited = rollout()
    trainer.model.pretrained_model.lm_head.weight.data[3] += 0.5
    stats = trainer.step(queries, edited, [1.0] * 8)
    assert stats["ppo/policy/logprob_gap_max"] <= 5e-5  # recomputed, so there is no gap
    touched = rollout()
    touched[0][0] = 5
    trainer.step(queries, touched, [1.0] * 8)
    others = rollout()
    trainer.step([torch.cat([q, q]) for q in queries], others, [1.0] * 8)  # other queries
    trainer.step(queries, rollout(), [1.0] * 8)
    assert believed == [True, False, False, False, False, True]


def test_temperature_of_plain_lists_is_that_of_the_last_generate():
    trainer, queries = make(), tiny.queries(8)
    rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=8, temperature=0.5)
    stats = trainer.step(queries, list(rollout), [0.0] * 8)
    rows = stats["objective/logprobs"]
    recorded = rollout.split(rollout.logprobs)
    for row, query, logprobs in zip(rows, queries, recorded, strict=True):
        start = len(query) - 1
        np.testing.assert_allclose(row[start : start + len(logprobs)], logprobs.numpy(), atol=5e-5)
        assert np.isnan(row[:start]).all()
        assert np.isnan(row[start + len(logprobs) :]).all()


def test_masked_tokens_have_no_influence():
    """Whatever stands under a zero of the mask changes nothing but what the model attends to; its loss weight is 0."""
    trainer = make()
    queries, responses = tiny.queries(8), [torch.arange(3, 9) for _ in range(8)]
    masks = [torch.tensor([1, 0, 0, 1, 1, 0])] * 8
    stats = trainer.step(queries, responses, [1.0] * 8, masks)
    assert np.isfinite(stats["objective/logprobs"]).sum() == 8 * 3
    assert np.isfinite(stats["ppo/policy/ratio"]).sum() == 2 * 8 * 3


class Halved(PPOTrainer):
    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        rewards, non_score, kls = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
        return rewards * 0.5, non_score * 0.5, kls

    def compute_advantages(self, values, rewards, mask):
        values, advantages, returns = super().compute_advantages(values, rewards, mask)
        return values, advantages, returns + 1.0


def test_overrides_of_rewards_and_advantages_are_honoured():
    settings = PPOConfig(batch_size=8, mini_batch_size=8, init_kl_coef=0.0, ppo_epochs=1, gamma=1.0, lam=1.0)
    plain = PPOTrainer(copy.deepcopy(settings), tiny.with_value_head(tiny.llama()))
    halved = Halved(copy.deepcopy(settings), tiny.with_value_head(tiny.llama()))
    queries = tiny.queries(8)
    responses = [r.clone() for r in plain.generate(queries, return_prompt=False, max_new_tokens=6)]
    a, b = (t.step(queries, responses, [2.0] * 8) for t in (plain, halved))
    # With gamma = lambda = 1 every return is the score: 2, and 2 / 2 + 1.
    assert a["ppo/returns/mean"] == pytest.approx(2.0, abs=1e-5)
    assert b["ppo/returns/mean"] == pytest.approx(2.0, abs=1e-5)
    assert b["ppo/mean_non_score_reward"] == pytest.approx(0.0, abs=1e-6)
    assert b["ppo/loss/policy"] == pytest.approx(a["ppo/loss/policy"], abs=1e-4)


def test_overrides_without_effect_are_refused():
    class Wrong(PPOTrainer):
        def batched_forward_pass(self, *args):
            return args

    with pytest.raises(TypeError, match="batched_forward_pass, which fastppo would never call"):
        Wrong(PPOConfig(batch_size=2), tiny.with_value_head(tiny.llama()))


def test_resuming_is_bit_for_bit(tmp_path):
    settings = {"use_score_scaling": True, "use_score_norm": True, "lr_scheduler_type": "linear", "warmup_steps": 2}
    settings |= {"steps": 800, "max_grad_norm": 0.5}

    def run(trainer, steps):
        return [self_step(trainer) for _ in range(steps)]

    def self_step(trainer):
        length = LengthSampler(4, 12)()  # draws from numpy's global generator
        queries = tiny.queries(8, seed=trainer.current_step)
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=length)
        return trainer.step(queries, responses, [len(set(r.tolist())) + torch.rand(()).item() for r in responses])

    whole = make(**settings)
    run(whole, 3)
    whole.save_checkpoint(tmp_path / "checkpoint-000003")
    expected = run(whole, 3)
    resumed = make(**settings)
    resumed.resume_from(tmp_path)
    got = run(resumed, 3)
    for a, b in zip(expected, got, strict=True):
        for name in a:
            if not name.startswith("time/"):
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert_same(state_of(whole), state_of(resumed))
    assert resumed.kl_ctl.value == whole.kl_ctl.value


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    trainer = make()
    iterate(trainer, 1)
    trainer.save_checkpoint(tmp_path / "checkpoint-000001")
    before = state_of(other := make(model=tiny.with_value_head(tiny.llama(seed=9))))
    with pytest.raises(ValueError, match="another reference model"):
        other.resume_from(tmp_path)
    with pytest.raises(ValueError, match="seed: 1 then, 2 now"):
        make(seed=2).resume_from(tmp_path)
    assert_same(before, state_of(other))
    path = tmp_path / "checkpoint-000001" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        make().resume_from(tmp_path)
    with pytest.raises(ValueError, match="missing or damaged"):
        make().resume_from(tmp_path / "checkpoint-000001")


def test_tensorboard_gets_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)}, tracker_project_name="runs")
    queries = tiny.queries(8)
    for _ in range(2):
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=5)
        stats = trainer.step(queries, responses, rewards_of(responses))
        batch = {"query": ["a"] * 8, "response": ["b"] * 8}
        trainer.log_stats(stats, batch, [torch.tensor(1.0)] * 8)
    trainer.accelerator.end_training()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("objective/kl")] == [0, 1]
    assert events.Scalars("env/reward_mean")[0].value == 1.0


def test_schedules_warm_up_and_decay():
    trainer = make(lr_scheduler_type="linear", warmup_steps=2, steps=6 * 8, learning_rate=1e-3)
    rates = []
    for step in range(6):
        queries = tiny.queries(8, seed=step)
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=4)
        rates.append(trainer.step(queries, responses, [0.0] * 8)["ppo/learning_rate"])
    np.testing.assert_allclose(rates, [0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4], atol=1e-9)


def test_the_critic_can_have_a_learning_rate_of_its_own():
    trainer = make(learning_rate=1e-4, critic_learning_rate=1e-2, lr_scheduler_type="linear", steps=80)
    before = state_of(trainer)
    queries = tiny.queries(8)
    trainer.step(queries, tiny.queries(8, seed=2), [1.0] * 8)
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in trainer.model.state_dict().items()}
    assert moved["v_head.summary.bias"] > 1e-2
    assert max(distance for name, distance in moved.items() if "v_head" not in name) < 1e-3
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([9e-5, 9e-3])


def test_missing_eos_is_penalised():
    trainer = make(missing_eos_penalty=3.0)
    queries, responses = tiny.queries(8), [torch.tensor([5, 6, 2])] * 4 + [torch.tensor([5, 6, 7])] * 4
    assert trainer.step(queries, responses, [1.0] * 8)["ppo/mean_scores"] == pytest.approx(1.0 - 1.5)


def test_a_rollout_is_a_list_that_tokenizers_decode():
    trainer, tokenizer, queries = make(), tiny.tokenizer(), tiny.queries(8)
    rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=5)
    assert tokenizer.batch_decode(rollout) == [tokenizer.decode(response) for response in rollout]
    assert type(rollout[2:4]) is list
    rollout[0] = rollout[0].clone()  # another tensor, which the records were not made for
    assert not rollout.is_untouched
    with torch.inference_mode():
        assert not trainer.generate(queries, return_prompt=False, max_new_tokens=5).is_untouched


def test_gradients_left_behind_do_not_enter_a_step():
    a, b = make(), make()
    queries, responses = tiny.queries(8), tiny.queries(8, seed=3)
    for parameter in b.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    stats = [trainer.step(queries, responses, [float(i) for i in range(8)]) for trainer in (a, b)]
    assert stats[0]["ppo/policy/grad_norm"] == stats[1]["ppo/policy/grad_norm"]
    assert_same(state_of(a), state_of(b))


def test_answers_of_the_reference_are_not_taken_for_the_policys(monkeypatch):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make(AutoModelForCausalLMWithValueHead(peft.get_peft_model(tiny.llama(), config)))
    iterate(trainer, 1)
    believed, queries = evaluations(trainer, monkeypatch), tiny.queries(8)
    with trainer.optional_peft_ctx():
        of_reference = trainer.generate(queries, return_prompt=False, max_new_tokens=6)
    trainer.step(queries, of_reference, [1.0] * 8)
    assert believed == [False]


def test_own_stop_ids_end_a_response_properly():
    trainer, queries = make(missing_eos_penalty=5.0), tiny.queries(8)
    every = list(range(tiny.VOCABULARY))
    responses = trainer.generate(queries, return_prompt=False, max_new_tokens=5, eos_token_id=every)
    for given in (responses, [response.clone() for response in responses]):
        assert trainer.step(queries, given, [1.0] * 8)["ppo/mean_scores"] == pytest.approx(1.0)


def test_reference_responses_come_along():
    trainer, queries = make(), tiny.queries(8)
    both = trainer.generate(queries, return_prompt=False, generate_ref_response=True, max_new_tokens=6, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    single = trainer.generate(queries[0], generate_ref_response=True, max_new_tokens=6)
    assert [tensor.dim() for tensor in single] == [2, 2]


def test_saving_writes_what_plain_transformers_opens(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make(tokenizer=tiny.tokenizer())
    iterate(trainer, 1)
    trainer.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.lm_head.weight, trainer.model.pretrained_model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "</s>"
    assert not list(tmp_path.rglob("*.bin"))
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == tiny.VOCABULARY

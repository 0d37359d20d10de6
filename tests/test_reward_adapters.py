"""Reward adapters: what RewardTrainer writes, scored on the policy's base as plain PEFT scores it, without a trace."""

import json

import peft
import pytest
import tiny
import torch
from test_rewards import COMPLETIONS, PROMPTS, TEXTS, classifier, score
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from fastppo.models.critic import CRITIC, critic_parameters
from fastppo.reward_models import AdapterReward, ModelReward, is_same_tokenizer
from fastppo.trainers.reward import RewardConfig, RewardTrainer

ROWS = [{"chosen": f"w{i} w7 w{i + 1}", "rejected": f"w{i} w9"} for i in range(10, 26)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, a reward adapter that RewardTrainer made on it, and the same without a tokenizer beside it."""
    base, adapter, bare = (tmp_path_factory.mktemp(name) for name in ("base", "adapter", "bare"))
    tiny.llama().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    args = RewardConfig(output_dir=str(adapter), max_steps=12, learning_rate=3e-2, **quiet)
    network = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = peft.LoraConfig(r=3, target_modules=targets, lora_dropout=0.3)
    trainer = RewardTrainer(network, args, train_dataset=ROWS, processing_class=tiny.tokenizer(), peft_config=settings)
    trainer.train()
    trainer.save_model()
    trainer.model.save_pretrained(bare)
    return base, adapter, bare


def policy(folders, bare=False, **kwargs):
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    kwargs = {"peft_config": settings, "reward_adapter": folders[2 if bare else 1], **kwargs}
    return AutoModelForCausalLMWithValueHead.from_pretrained(folders[0], **kwargs)


@torch.no_grad()
def plain_scores(folders, rows):
    """The score of each row of token ids by PEFT and transformers, one at a time."""
    network = LlamaForSequenceClassification.from_pretrained(folders[0], num_labels=1)
    network = peft.PeftModel.from_pretrained(network, folders[1]).eval()
    return torch.tensor([network(torch.tensor([row])).logits.item() for row in rows])


def state_of(model):
    """Everything that scoring might leave changed."""
    tuner = model.pretrained_model
    layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
    return (
        [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
        [(list(layer.active_adapters), layer.disable_adapters) for layer in layers],
        (tuner.active_adapter, tuner.base_model.active_adapter),
    )


def assert_same_state(first, second):
    for (name, flag, tensor), (other, other_flag, other_tensor) in zip(first[0], second[0], strict=True):
        assert (name, flag) == (other, other_flag)
        assert torch.equal(tensor, other_tensor), name
    assert first[1:] == second[1:]


def ids_of(texts, end=()):
    return [[int(word[1:]) for word in text.split()] + list(end) for text in texts]


def test_scores_are_those_of_plain_peft_at_the_last_token_on_either_side_of_padding(folders):
    model, rows = policy(folders), ids_of(TEXTS)
    expected = plain_scores(folders, rows)
    assert float(expected.std()) > 0.01
    longest = max(map(len, rows))
    for left in (False, True):
        padded = torch.tensor(
            [[0] * (longest - len(r)) * left + r + [0] * (longest - len(r)) * (not left) for r in rows]
        )
        mask = (padded != 0).long()
        scores = model.compute_reward_score(padded, attention_mask=mask, ppo_adapter_name="default")
        assert (scores.shape, scores.dtype, scores.requires_grad) == ((3, longest, 1), torch.float32, False)
        last = torch.tensor([longest - 1 if left else len(row) - 1 for row in rows])
        torch.testing.assert_close(scores[torch.arange(3), last, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("is_off", [False, True])
@pytest.mark.parametrize("whole", [None, ["embed_tokens"]])
def test_nothing_is_left_of_a_scoring_even_of_one_that_fails(folders, failing, is_off, whole, monkeypatch):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    model = policy(folders, peft_config=settings).train()
    ids = torch.tensor(ids_of(TEXTS[:1]))
    expected = plain_scores(folders, ids.tolist())
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # a user's own choice
    model.v_head.eval()
    context = model.pretrained_model.disable_adapter() if is_off else torch.enable_grad()
    with context:
        before = state_of(model)
        if failing:
            monkeypatch.setattr(model.score, "forward", lambda hidden: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model.compute_reward_score(ids)
        else:
            torch.testing.assert_close(model.compute_reward_score(ids)[:, -1, 0], expected, atol=1e-5, rtol=0)
        assert_same_state(before, state_of(model))


def trainer_of(model, **settings):
    settings = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "rescore_every": 10**6, **settings}
    return PPOTrainer(PPOConfig(**settings), model, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("bare", [False, True])
def test_a_run_takes_the_model_itself_as_its_reward(folders, bare, monkeypatch):
    trainer, seen = trainer_of(policy(folders, bare)), []
    frozen = {
        n: p.clone() for n, p in trainer.model.named_parameters() if "reward_model_adapter" in n or n == "score.weight"
    }
    add_eos = not bare  # what tells of it was not saved by PEFT alone
    generate = trainer.engine.generate
    monkeypatch.setattr(trainer.engine, "generate", lambda *a, **k: seen.append(generate(*a, **k)) or seen[-1])
    history = trainer.train([*PROMPTS, "w9 w8"], trainer.model, max_steps=2, max_new_tokens=6, console=False)
    for stats, rollout in zip(history, seen, strict=True):
        rows = [[*q.tolist(), *r.tolist()] for q, r in zip(rollout.queries, rollout, strict=True)]
        rows = [row[:-1] if row[-1] == 2 else row for row in rows]
        expected = plain_scores(folders, [[*row, 2] if add_eos else row for row in rows])
        assert stats["env/reward_mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert stats["ppo/agreement/recomputed"] == 0.0  # the records were still those of the policy
    assert len(frozen) == 2 * 2 * 3 + 1
    named = dict(trainer.model.named_parameters())
    assert all(torch.equal(named[name], before) and not named[name].requires_grad for name, before in frozen.items())


def test_tokens_are_scored_as_they_are_and_texts_are_encoded_with_the_adapters_tokenizer(folders):
    model, words = policy(folders), tiny.tokenizer()
    ids = {"prompt_ids": ids_of(PROMPTS), "completion_ids": ids_of([" w20", " w21 w22", " w23"], [2])}
    reward = AdapterReward(model, words, batch_size=2)
    by_tokens = plain_scores(folders, [[*p, *c] for p, c in zip(*ids.values(), strict=True)])
    by_text = plain_scores(folders, ids_of(TEXTS, [2]))
    torch.testing.assert_close(reward(PROMPTS, COMPLETIONS, **ids), by_tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(reward(PROMPTS, COMPLETIONS), by_text, atol=1e-5, rtol=0)
    other = tiny.tokenizer(50)  # more words: not provably the same
    assert not is_same_tokenizer(other, words)
    torch.testing.assert_close(AdapterReward(model, other)(PROMPTS, COMPLETIONS, **ids), by_text, atol=1e-5, rtol=0)
    plain = AdapterReward(model, words, add_eos=False)(PROMPTS, COMPLETIONS, **ids)
    expected = plain_scores(folders, [[*p, *c[:-1]] for p, c in zip(*ids.values(), strict=True)])
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)
    with pytest.raises(
        ValueError, match=r"has to read the text of a completion, got \[5\].*give the trainer its token"
    ):
        AdapterReward(model)(["w3"], [[5]], prompt_ids=[[3]], completion_ids=[[5]])


def test_equal_tokenizers_are_known_by_their_rules_words_and_template():
    first, second = tiny.tokenizer(), tiny.tokenizer()
    first("w3", truncation=True, max_length=2, padding="max_length")
    assert is_same_tokenizer(first, second)
    second.chat_template = "{{ messages }}"
    assert not is_same_tokenizer(first, second)
    second = tiny.tokenizer()
    second.add_tokens(["w1000"])
    assert not is_same_tokenizer(first, second)
    assert not is_same_tokenizer(first, None)


TEMPLATE = "{% for m in messages %}{{ 'w30' if m['role'] == 'user' else 'w31' }} {{ m['content'] }} {% endfor %}w32"


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_chat_is_put_into_the_reward_models_own_template(folders, is_adapter):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rows = ids_of(
        [f"w30 {p} w31 {c} w32" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], [2] if is_adapter else []
    )
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    if is_adapter:
        reward, expected = AdapterReward(policy(folders, bare=True), words, add_eos=True), plain_scores(folders, rows)
        ids = {"prompt_ids": ids_of(PROMPTS), "completion_ids": ids_of(COMPLETIONS)}
    else:
        network, ids = classifier(0, context=32), {}
        reward = ModelReward(network, words)
        with torch.no_grad():
            expected = torch.cat([network(torch.tensor([row])).logits[:, 0] for row in rows])
    torch.testing.assert_close(score(reward, chats, COMPLETIONS, **ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("critic", ["adapter", "full"])
def test_a_critic_that_starts_as_the_reward_adapter_values_tokens_as_that_scores_them(folders, critic):
    model = policy(folders)
    ids = torch.tensor(ids_of([TEXTS[2]]))
    expected = model.compute_reward_score(ids)
    trainer = trainer_of(model, critic=critic, critic_init="reward_adapter")
    network = model.critic if critic == "full" else model.pretrained_model
    if critic == "adapter":
        network.set_adapter(CRITIC)
    with torch.no_grad():
        hidden = network.eval()(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model.v_head(hidden), expected, atol=1e-5, rtol=0)
    if critic == "adapter":
        network.set_adapter("default")
    assert not any(p is q for p in critic_parameters(model) for q in model.score.parameters())
    trainer.train(PROMPTS, trainer.model, max_steps=1, max_new_tokens=4, console=False)


def test_the_adapter_opens_in_plain_peft_and_says_how_texts_end(folders):
    assert peft.PeftConfig.from_pretrained(folders[1]).task_type == "SEQ_CLS"
    assert json.loads((folders[1] / "reward_adapter.json").read_text()) == {"fastppo_text_ends_with_eos": True}
    chosen, rejected = (
        plain_scores(folders, ids_of([row[name] for row in ROWS], [2])) for name in ("chosen", "rejected")
    )
    assert float((chosen > rejected).float().mean()) == 1.0


def test_adapters_that_cannot_score_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"needs a policy that is an adapter too.*pass peft_config"):
        policy(folders, peft_config=None)
    peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="has nothing beside its own weights, expected one score head"):
        policy(folders, reward_adapter=tmp_path / "lm")
    peft.get_peft_model(tiny.llama(hidden_size=32), peft.LoraConfig(r=2)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        policy(folders, reward_adapter=tmp_path / "wide")
    with pytest.raises(ValueError, match="has an adapter named 'default' already"):
        policy(folders, reward_adapter_name="default")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors.*never opened"):
        policy(folders, reward_adapter=tmp_path / "pickled")
    model = AutoModelForCausalLMWithValueHead(LlamaForCausalLM.from_pretrained(folders[0]))
    with pytest.raises(ValueError, match="the model has no reward adapter"):
        model.compute_reward_score(torch.tensor([[3]]))
    with pytest.raises(ValueError, match="has no reward adapter; load it with"):
        trainer_of(model).train(PROMPTS, model, max_steps=1, max_new_tokens=4, console=False)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_four_parts_live_on_one_quantised_base(folders, bits):
    """Policy, frozen reference, critic and reward: adapters on codes that are there once, and stay what they are."""
    settings = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = policy(folders, **settings)
    config = PPOConfig(batch_size=4, mini_batch_size=2, critic="adapter", learning_rate=1e-2)
    trainer = PPOTrainer(config, model, tokenizer=tiny.tokenizer())
    codes = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    assert len(codes) == 14
    expected = sum(part.nbytes for part in codes.values())
    reports, step = [trainer.memory_report()], trainer.optimizer.step
    trainer.optimizer.step = lambda: (reports.append(trainer.memory_report()), step())
    trainer.train(tiny.queries(8), model, max_steps=2, max_new_tokens=6, console=False)
    reports.append(trainer.memory_report())
    assert len(reports) > 4
    for report in reports:
        base = [part for part in report.storages if part.owner == "base" and part.dtype in ("int8", "uint8")]
        weights = [part for part in base if part.name.endswith(".weight")]
        assert sum(part.bytes for part in weights) == expected
        assert {part.used_by for part in weights} == {("policy", "reference", "critic", "reward")}
        assert {"policy adapter", "critic adapter", "reward adapter", "value head"} <= set(report.by_owner())
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], before) for name, before in codes.items())

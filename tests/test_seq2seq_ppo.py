"""A PPO step of an encoder-decoder against plain PyTorch over transformers' own forward of one sample at a time."""

import copy
import json

import pytest
import tiny_seq2seq as tiny
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSeq2SeqLM

from fastppo import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    create_reference_model,
)
from fastppo.cli import main
from fastppo.demo import pairs

GAMMA, LAMBDA, KL, VF = 0.9, 0.8, 0.3, 0.1


def batch():
    """Ragged queries, responses down to one token, ids of padding and of the end in both, scores and masks."""
    queries = tiny.queries()
    responses = [response.clone() for response in tiny.queries((1, 6, 4, 1, 9, 2, 5, 3), seed=5)]
    responses[1][0] = tiny.PAD
    masks = [torch.ones(len(response), dtype=torch.int64) for response in responses]
    masks[4][2:5] = 0
    return queries, responses, [0.5, -1.0, 2.0, -0.25, 1.0, 0.0, -2.0, 0.75], masks


def plain_step(model, reference, rate):
    """Take the step on `model` itself, one optimiser step of SGD; the advantages are a loop over tokens."""
    queries, responses, scores, masks = batch()
    parts = []
    for query, response, score, mask in zip(queries, responses, scores, masks, strict=True):
        logprobs, hidden = tiny.plain(model.pretrained_model, query, response)
        with torch.no_grad():
            ref_logprobs, _ = tiny.plain(reference.pretrained_model, query, response)
        chosen = mask.bool()
        logprobs, values = logprobs[chosen], model.v_head(hidden)[chosen, 0]
        rewards = -KL * (logprobs.detach() - ref_logprobs[chosen])
        rewards[-1] += score
        advantages, last, following = torch.zeros_like(rewards), 0.0, 0.0
        for t in reversed(range(len(rewards))):
            last = rewards[t] + GAMMA * following - values[t].detach() + GAMMA * LAMBDA * last
            following = values[t].detach()
            advantages[t] = last
        parts.append((logprobs, values, advantages))
    logprobs, values, advantages = (torch.cat(part) for part in zip(*parts, strict=True))
    returns = advantages + values.detach()
    white = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
    ratio = (logprobs - logprobs.detach()).exp()
    loss = (-white * ratio).mean() + VF * 0.5 * ((values - returns) ** 2).mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if grad is not None:
            parameter.data -= rate * grad
    return logprobs.detach(), values.detach(), rewards


@pytest.mark.filterwarnings("ignore:the KL from the reference")  # the responses are not the policy's
@pytest.mark.parametrize("family", tiny.CASES)
def test_a_step_is_that_of_plain_pytorch(family):
    check_step(family, gradient_checkpointing=False)


@pytest.mark.filterwarnings("ignore:the KL from the reference")
@pytest.mark.parametrize("family", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_step_that_computes_layers_twice_is_the_same(family):
    check_step(family, gradient_checkpointing=True)


def check_step(family, **settings):
    model = tiny.policy(family)
    reference = tiny.policy(family)
    with torch.no_grad():  # another policy than the reference's, so that the KL counts
        for parameter in model.pretrained_model.parameters():
            parameter.mul_(1.1)
    plain, rate = copy.deepcopy(model), 0.1
    trainer = tiny.trainer(
        model,
        ref_model=copy.deepcopy(reference),
        optimizer=torch.optim.SGD(model.parameters(), lr=rate),
        gamma=GAMMA,
        lam=LAMBDA,
        init_kl_coef=KL,
        vf_coef=VF,
        mini_batch_size=2,
        gradient_accumulation_steps=4,
        **settings,
    )
    model.train()  # dropout and layerdrop stay off all the same
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    queries, responses, scores, masks = batch()
    stats = trainer.step(queries, responses, scores, masks)
    logprobs, _, _ = plain_step(plain, reference, rate)
    own = torch.as_tensor(stats["objective/logprobs"])
    torch.testing.assert_close(own[~own.isnan()], logprobs, rtol=4e-6, atol=2e-5)
    assert not own[torch.arange(8), 0].isnan().any(), "the first token has its log-prob"
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    moved = {name: float((theirs[name].detach() - before[name]).abs().max()) for name in theirs}
    largest = max(moved.values())
    assert largest > 1e-3
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=3e-5 * largest + 1e-7)
    assert any("encoder" in name and moved[name] > 1e-4 for name in moved), "the encoder learns as well"


def test_the_first_token_alone_is_trained():
    model = tiny.policy()
    queries = tiny.queries()
    responses = [torch.tensor([5 + i]) for i in range(8)]
    trainer = tiny.trainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), vf_coef=0.0)
    before = [tiny.plain(model.pretrained_model, *pair)[0].item() for pair in zip(queries, responses, strict=True)]
    scores = [1.0, -1.0] * 4
    stats = trainer.step(queries, responses, scores)
    after = [tiny.plain(model.pretrained_model, *pair)[0].item() for pair in zip(queries, responses, strict=True)]
    assert stats["objective/logprobs"].shape == (8, 1)
    gains = [(b - a) * score for a, b, score in zip(before, after, scores, strict=True)]
    assert sum(gains) > 0.05


def test_a_rollouts_records_spare_the_policys_pass_and_agree_with_it():
    model, queries = tiny.policy("bart"), tiny.queries()
    trainer = tiny.trainer(model, rescore_every=1)
    rollout = trainer.generate(queries, max_new_tokens=6)
    assert rollout[0].dim() == 1, "what the encoder reads is no part of a response"
    stats = trainer.step(queries, trainer.generate(queries, return_prompt=False, max_new_tokens=6), [1.0] * 8)
    assert stats["ppo/agreement/gap_max"] < 2e-5
    assert not stats["ppo/agreement/recomputed"]
    pair = trainer.generate(queries, generate_ref_response=True, do_sample=False, max_new_tokens=4)
    assert [len(part) for part in pair] == [8, 8]


@pytest.mark.parametrize(
    ("family", "critic"),
    [("t5", "head"), *(pytest.param(f, "adapter", marks=pytest.mark.slow) for f in ("t5", "bart"))],
)
def test_an_adapter_is_trained_on_a_base_that_stays(family, critic, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny.network(family), peft_config=lora)
    base = {name: tensor.clone() for name, tensor in model.named_parameters() if "base_layer" in name}
    trainer, queries = tiny.trainer(model, critic=critic, learning_rate=1e-2), tiny.queries()
    for _ in range(2):
        rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=4)
        stats = trainer.step(queries, rollout, [float(len(response)) for response in rollout])
    assert stats["objective/kl"] > 1e-4, "the reference is the base with the adapter off"
    assert trainer.ref_model is None
    assert all(torch.equal(tensor, dict(model.named_parameters())[name]) for name, tensor in base.items())
    query, response = queries[1], rollout[1]
    with torch.no_grad(), model.pretrained_model.disable_adapter():
        off, _ = tiny.plain(model.pretrained_model.get_base_model(), query, response)
    own, _ = tiny.plain(tiny.network(family), query, response)
    torch.testing.assert_close(off, own)
    assert {part.owner for part in trainer.memory_report().storages} >= {"base", "policy adapter", "value head"}
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny.network(family), tmp_path)
    expected, _ = tiny.plain(model.pretrained_model.get_base_model(), query, response)
    torch.testing.assert_close(tiny.plain(plain.get_base_model(), query, response)[0], expected)


@pytest.mark.parametrize("family", ["t5", "t5 v1.1", "bart"])
def test_a_checkpoint_opens_in_transformers_and_keeps_the_head(family, tmp_path):
    model = tiny.policy(family)
    model.save_pretrained(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == model.pretrained_model.state_dict().keys()
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    query, response = tiny.queries()[1], torch.tensor([4, 0, 6])
    logits, loss, values = again(input_ids=query[None], labels=response[None])
    expected, hidden = tiny.plain(plain, query, response)
    found = logits[0].log_softmax(-1)[torch.arange(3), response]
    if len(tiny.prefix(plain)) == 1:
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(loss, -expected.mean())
        torch.testing.assert_close(values[0], model.v_head(hidden)[:, 0])
    with pytest.raises(ValueError, match="AutoModelForSeq2SeqLMWithValueHead"):
        AutoModelForCausalLMWithValueHead(plain)


def distinct(prompts, completions):
    return [float(len(set(ids))) for ids in completions]


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_where_one_without_a_break_does(tmp_path):
    def run(folder, steps, **more):
        trainer = tiny.trainer(tiny.policy(), learning_rate=1e-2, critic="full")
        options = {"max_new_tokens": 5, "console": False, "save_every": 1, "eval_prompts": tiny.queries(seed=9)}
        prompts = [query.tolist() for query in tiny.queries()]
        trainer.train(prompts, distinct, max_steps=steps, output_dir=tmp_path / folder, **options, **more)
        return trainer

    whole = run("whole", 3)
    run("part", 2)
    resumed = run("part", 3, resume_from=tmp_path / "part")
    state = whole.model.state_dict()
    assert any(name.startswith("critic.") for name in state)
    assert all(torch.equal(tensor, resumed.model.state_dict()[name]) for name, tensor in state.items())
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path / "part")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())


def test_lower_layers_are_shared_with_the_encoder_below_them():
    for family, pattern in (("t5", "decoder.block.0."), ("bart", "decoder.layers.0.")):
        model = tiny.policy(family)
        reference = create_reference_model(model, num_shared_layers=1)
        pairs = zip(model.named_parameters(), reference.parameters(), strict=True)
        shared = [name for (name, own), other in pairs if own is other]
        assert any(pattern in name for name in shared)
        encoder = [name for name, _ in model.named_parameters() if ".encoder." in name]
        assert encoder
        assert set(encoder) <= set(shared)
        assert not any("block.1" in name or "layers.1" in name for name in shared if "decoder" in name)


def test_what_no_step_can_mean_is_refused(tmp_path):
    trainer, queries = tiny.trainer(tiny.policy()), tiny.queries()
    own = [torch.cat([torch.tensor([tiny.PAD]), torch.tensor([5, 6])])] * 8
    with pytest.raises(ValueError, match=r"begins with 0, the decoder's start token.*response\[1:\]"):
        trainer.step(queries, own, [1.0] * 8)
    with pytest.raises(ValueError, match=r"first token.*leave compat out"):
        tiny.trainer(tiny.policy(), compat="trl-0.7")
    with pytest.raises(ValueError, match="pass the reward model to train"):
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny.network(), reward_adapter="somewhere")
    tiny.policy().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load it with AutoModelForSeq2SeqLMWithValueHead"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    long = [torch.full((64,), 5)] * 8
    trainer = tiny.trainer(tiny.policy("bart"))
    trainer.step(long, [response[:63] for response in long], [1.0] * 8)
    with pytest.raises(ValueError, match=r"have 64 and 1 \+ 64 tokens, but encoder and decoder have room for 64"):
        trainer.step(long, long, [1.0] * 8)


@pytest.mark.slow
def test_the_command_line_finds_out_what_a_model_is(tmp_path, capsys):
    tokenizer = pairs.new_tokenizer()
    model = AutoModelForSeq2SeqLMWithValueHead(pairs.new_model(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": pair.source, "target": pair.target} for pair in pairs.translations(8, seed=0)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "prompts.jsonl", "batch_size": 4}
    given |= {"mini_batch_size": 4, "reward": "fastppo.demo.pairs:reward", "max_steps": 1, "max_new_tokens": 4}
    flags = [f"--{name}={value}" for name, value in (given | {"output_dir": tmp_path / "run"}).items()]
    assert main(["ppo", *flags, "--use_peft", "true"]) == 0
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"
    run = str(tmp_path / "run")
    assert main(["generate", "--model_name_or_path", run, "--prompt", "4 2", "--max_new_tokens", "3"]) == 0
    assert main(["inspect", "--model_name_or_path", run]) == 0
    assert "tier B" in capsys.readouterr().out
    assert main(["export", run, str(tmp_path / "merged"), "--merged", "--dtype", "fp32"]) == 0
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").config.model_type == "t5"
    assert main(["plan", str(tmp_path / "model")]) != 0
    assert "cannot be planned yet" in capsys.readouterr().err


def test_the_decoder_may_have_a_vocabulary_of_its_own():
    settings = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 30, "tie_word_embeddings": False}
    model, queries = tiny.policy("marian", **settings), tiny.queries()
    assert max(int(query.max()) for query in queries) >= 30
    trainer = tiny.trainer(model)
    rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=4)
    trainer.step(queries, rollout, [1.0] * 8)
    with pytest.raises(ValueError, match=r"response 0 has token ids 30\.\.30, outside 0\.\.29"):
        trainer.step(queries, [torch.tensor([30])] * 8, [1.0] * 8)


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_bf16_trains_with_fp32_masters(family):
    trainer, queries = tiny.trainer(tiny.policy(family), bf16=True, rescore_every=1), tiny.queries()
    for _ in range(2):
        rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=4)
        stats = trainer.step(queries, rollout, [float(len(response)) for response in rollout])
    assert trainer.model.pretrained_model.dtype == torch.bfloat16
    assert stats["ppo/agreement/gap_median"] < 0.02
    assert stats["ppo/policy/grad_norm"] > 0

"""What cannot be meant is refused with the value and the remedy before any weight changes; the rest is defined."""

import numpy as np
import pytest
import tiny_trainers as tiny
import torch

from fastppo import PPOConfig, PPOTrainer

NAN, INF = float("nan"), float("inf")

# Arguments of `step` that are wrong: changes to a good batch (queries, responses, scores, masks), and what is said.
WRONG_STEPS = {
    "queries too few": (lambda q, r, s, m: (q[:3], r, s, m), "got 3 queries, but PPOConfig.batch_size is 4"),
    "responses too many": (lambda q, r, s, m: (q, [*r, r[0]], s, m), "got 5 responses, .* is 4; pass a whole batch"),
    "scores too few": (lambda q, r, s, m: (q, r, s[:1], m), "got 1 scores, .* is 4; pass a whole batch"),
    "masks too few": (lambda q, r, s, m: (q, r, s, m[:1]), "got 1 response masks for 4 responses; give one per"),
    "nothing": (lambda q, r, s, m: ([], [], [], None), "got 0 queries, .* is 4"),
    "queries None": (lambda q, r, s, m: (None, r, s, m), "got NoneType queries, .* is 4"),
    "masks a number": (lambda q, r, s, m: (q, r, s, 1), "got int response masks for 4"),
    "scores a text": (lambda q, r, s, m: (q, r, "good", m), "the scores are 'good' of type str; expected a list"),
    "scores a mapping": (lambda q, r, s, m: (q, r, dict(enumerate(s)), m), "of type dict; expected a list"),
    "scores a set": (lambda q, r, s, m: (q, r, {1.0, 2.0, 3.0, 4.0}, m), "got set scores, .* is 4"),
    "scores one tensor": (lambda q, r, s, m: (q, r, torch.tensor(1.0), m), "got Tensor scores, .* is 4"),
    "score a text": (lambda q, r, s, m: (q, r, [1, "2", 3, 4], m), "score 1 is '2' of type str; expected a number"),
    "score a numpy text": (lambda q, r, s, m: (q, r, [1, 2, np.str_("3"), 4], m), "score 2 is .*'3'.* of type str_"),
    "score complex": (lambda q, r, s, m: (q, r, [1j, 2, 3, 4], m), "score 0 is 1j of type complex"),
    "score a list": (lambda q, r, s, m: (q, r, [[1.0], 2, 3, 4], m), r"score 0 is \[1.0\] of type list"),
    "scores of pairs": (lambda q, r, s, m: (q, r, torch.ones(4, 2), m), r"score 0 has shape \(2,\); a score is one"),
    "numpy pairs": (lambda q, r, s, m: (q, r, np.ones((4, 2)), m), r"score 0 has shape \(2,\); a score is one"),
    "score infinite": (lambda q, r, s, m: (q, r, [1, -INF, 3, 4], m), "score 1 is -inf .* return None to leave"),
    "score overflows": (lambda q, r, s, m: (q, r, [1, 2, 3, 1e300], m), "score 3 is inf .* or bound the reward"),
    "no score at all": (lambda q, r, s, m: (q, r, [None, NAN] * 2, m), "none of 4 responses can be trained on: 4 wit"),
    "response a list": (lambda q, r, s, m: (q, [r[0].tolist(), *r[1:]], s, m), "response 0 must be a tensor .* list"),
    "query None": (lambda q, r, s, m: ([q[0], None, *q[2:]], r, s, m), "query 1 must be a tensor .* NoneType"),
    "responses 2-D": (lambda q, r, s, m: (q, [x[None] for x in r], s, None), r"1-D .* shape \(1, 6\) .*squeeze\(\)"),
    "tokens as floats": (lambda q, r, s, m: ([x.float() for x in q], r, s, m), "query 0 .* integers.* torch.float32"),
    "tokens as bools": (lambda q, r, s, m: (q, [x.bool() for x in r], s, m), "response 0 .* integers.* torch.bool"),
    "token too high": (lambda q, r, s, m: ([*q[:3], q[3] + 40], r, s, m), r"query 3 has token ids .* outside 0\.\.39"),
    "token negative": (lambda q, r, s, m: (q, [r[0] - 40, *r[1:]], s, m), r"response 0 has .* outside 0\.\.39"),
    "query empty": (lambda q, r, s, m: ([q[0][:0], *q[1:]], r, s, m), "query 0 is empty; .* such as the BOS token"),
    "too long": (lambda q, r, s, m: ([q[0].repeat(170), *q[1:]], r, s, m), r"510 \+ 6 tokens, .* is 512; drop the"),
    "mask too short": (lambda q, r, s, m: (q, r, s, [m[0][1:], *m[1:]]), r"mask 0 has shape \(5,\), .* \(6,\)"),
    "mask a list": (
        lambda q, r, s, m: (q, r, s, [x.tolist() for x in m]),
        "mask 0 is .*; expected a tensor of 0 and 1",
    ),
    "mask of halves": (lambda q, r, s, m: (q, r, s, [x * 0.5 for x in m]), "mask 0 is .*0.5.*; expected a tensor of"),
    "masks all zero": (lambda q, r, s, m: (q, r, s, [x * 0 for x in m]), "none of 4 .* 4 empty or masked out"),
    "responses all empty": (lambda q, r, s, m: (q, [x[:0] for x in r], s, None), "none of 4 .* 4 empty or masked out"),
}


@pytest.fixture(scope="module")
def trainer():
    return tiny.trainer()


def good_batch():
    queries, responses, scores = tiny.batch()
    return queries, responses, scores, [torch.ones(len(response)) for response in responses]


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_step_refuses(trainer, name):
    spoil, message = WRONG_STEPS[name]
    before, step, moments = tiny.snapshot(trainer), trainer.current_step, vars(trainer.running).copy()
    with pytest.raises(ValueError, match=message):
        trainer.step(*spoil(*good_batch()))
    tiny.assert_untouched(trainer, before)
    assert (trainer.current_step, vars(trainer.running)) == (step, moments)


SAME_SCORES = {
    "numbers": [1, 0, 1, 0],
    "bools": [True, False, True, False],
    "tensors": [torch.tensor(1.0), torch.tensor([0.0]), torch.tensor(True), torch.tensor(0)],
    "a tensor": torch.tensor([1.0, 0.0, 1.0, 0.0]),
    "a column": torch.tensor([[1.0], [0.0], [1.0], [0.0]]),
    "an array": np.array([1.0, 0.0, 1.0, 0.0]),
    "numpy scalars": [np.float64(1), np.int32(0), np.bool_(True), np.array([0.0])],
}


def weights_after(queries, responses, scores, masks=None, **settings):
    trainer = tiny.trainer(**settings)
    trainer.step(queries, responses, scores, masks)
    return tiny.weights(trainer.model)


@pytest.mark.parametrize("kind", SAME_SCORES)
def test_scores_mean_the_same_in_every_form(kind):
    queries, responses, _ = tiny.batch()
    first = weights_after(queries, responses, [1.0, 0.0, 1.0, 0.0])
    assert tiny.distance(first, weights_after(queries, responses, SAME_SCORES[kind])) == 0.0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_tokens_mean_the_same_in_every_integer_type(dtype):
    queries, responses, scores = tiny.batch()
    narrow = [x.to(dtype) for x in queries], [x.to(dtype) for x in responses]
    assert tiny.distance(weights_after(queries, responses, scores), weights_after(*narrow, scores)) == 0.0


@pytest.mark.parametrize("missing", [None, NAN, torch.tensor(NAN), np.float32("nan")])
def test_a_response_without_a_score_has_no_influence(missing):
    queries, responses, scores = tiny.batch()
    scores[2], results = missing, []
    settings = {"use_score_scaling": True, "use_score_norm": True, "whiten_rewards": True}
    for tokens in (responses[2], responses[2].flip(0), responses[2][:1]):
        given = [*responses[:2], tokens, responses[3]]
        with pytest.warns(UserWarning, match=r"left 1 of 4 responses out of this update: 1 without a score"):
            results.append(weights_after(queries, given, scores, **settings))
    assert tiny.distance(results[0], results[1]) == tiny.distance(results[0], results[2]) == 0.0
    assert tiny.distance(results[0], tiny.weights(tiny.policy())) > 0


def test_updates_without_a_finite_gradient_are_counted_and_then_refused():
    trainer = tiny.trainer(mini_batch_size=2, max_skipped_steps=3)
    trainer.step(*tiny.batch())
    trainer.generate(tiny.batch()[0], max_new_tokens=2)
    with torch.no_grad():
        trainer.model.pretrained_model.transformer.ln_f.bias.fill_(NAN)
    state = tiny.snapshot(trainer)[1]
    with pytest.raises(FloatingPointError, match=r"4 optimiser steps in a row .*ln_f.bias.*lower the learning rate"):
        trainer.step(*tiny.batch())
    torch.testing.assert_close(trainer.optimizer.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(FloatingPointError, match=r"not finite \(.*first in prompt 0\); check the weights"):
        trainer.generate(tiny.batch()[0], max_new_tokens=2)


# --- train ------------------------------------------------------------------------------------------------------


def zeros(prompts, completions, **columns):
    return [0.0] * len(completions)


def returning(value):
    return lambda prompts, completions: value


WRONG_TRAININGS = {
    "no prompts": (([], zeros), "there are no prompts; pass at least one"),
    "prompts None": ((None, zeros), "must be a list or a dataset, got NoneType; a single prompt goes into a list"),
    "one text": (("w3 w4", zeros), "must be a list or a dataset, got str; a single prompt goes into a list"),
    "empty prompt": (([[3], []], zeros), "1 of 2 prompts have no tokens, first: number 1; remove them"),
    "prompt None": (([[3], None], zeros), "a prompt is None of type NoneType; expected a text, a chat or token ids"),
    "prompt 2-D": (([torch.ones(1, 3).long()], zeros), r"1-D tensor .* got shape \(1, 3\) of torch.int64; pass one"),
    "prompt of floats": (([torch.ones(3)], zeros), "got shape .* of torch.float32; pass one tensor per prompt"),
    "token too high": (([[3], [40, 41]], zeros), r"prompt 1 has .*\[40, 41\], outside 0\.\.39; use the tokenizer"),
    "token negative": (([[-1]], zeros), r"prompt 0 has .*\[-1\], outside 0\.\.39; use the tokenizer"),
    "text alone": ((["w3"], zeros), "need a tokenizer; pass one to the engine, or pass token ids"),
    "no prompt column": (([{"ids": [3]}], zeros), r"columns \['ids'\], but one of prompt, query, text is needed"),
    "rows differ": (([{"prompt": [3], "x": 1}, {"prompt": [3]}], zeros), r"row 1 .* \['prompt'\], .* the same columns"),
    "too long": (
        ([[3], [3] * 511], zeros),
        r"1 of 2 prompts are longer than 510 .* number 1 with 511 .* set overlong_pr",
    ),
    "reward None": (([[3]], None), r"a reward must be a callable .*, got None"),
    "reward silent": (
        ([[3]], returning(None)),
        "reward <lambda>: the scores are None of type NoneType; expected a list",
    ),
    "reward one number": (
        ([[3]], returning(0.5)),
        "reward <lambda>: the scores are 0.5 of type float; expected a list",
    ),
    "reward lazy": (([[3]], returning(iter([1.0] * 4))), "of type list_iterator; expected a list"),
    "reward too short": (
        ([[3]], returning([1.0])),
        "reward <lambda>: got 1 scores for 4 responses; return exactly one",
    ),
    "reward of texts": (
        ([[3]], returning(["1"] * 4)),
        "reward <lambda>: score 0 is '1' of type str; expected a number",
    ),
    "reward infinite": (([[3]], returning([0, 0, 0, INF])), "reward <lambda>: score 3 is inf .* return None to leave"),
    "one weight too many": (([[3]], [zeros], {"reward_weights": [1, 2]}), "got 2 reward weights for 1 rewards"),
    "unknown argument": (([[3]], zeros, {"beams": 2}), "unknown generation argument beams=2; known: .*temperature"),
    "beam search": (([[3]], zeros, {"num_beams": 2}), "num_beams=2 would sample from another .*; leave it out"),
    "temperature 0": (([[3]], zeros, {"temperature": 0.0}), "temperature must be greater than 0; use do_sample=False"),
}


@pytest.mark.parametrize("name", WRONG_TRAININGS)
def test_train_refuses(trainer, name):
    (prompts, reward, *rest), message = WRONG_TRAININGS[name]
    options = {"max_steps": trainer.current_step + 1, "max_new_tokens": 2, "console": False, **dict(*rest)}
    before, served = tiny.snapshot(trainer), trainer.engine.num_requests
    with pytest.raises(ValueError, match=message):
        trainer.train(prompts, reward, **options)
    tiny.assert_untouched(trainer, before)
    assert trainer.engine.num_requests == served or name.startswith("reward")


def test_an_exception_of_a_reward_comes_through_and_leaves_the_weights(trainer):
    before = tiny.snapshot(trainer)

    def broken(prompts, completions):
        raise LookupError("no such film")

    with pytest.raises(LookupError, match="no such film"):
        trainer.train([[3]], broken, max_steps=trainer.current_step + 1, max_new_tokens=2, console=False)
    tiny.assert_untouched(trainer, before)


def test_prompts_beyond_the_context_are_dropped_or_truncated_from_the_left_if_asked():
    long, seen = [2] * 300 + [3] * 300, []

    def reward(prompts, completions, ids):
        seen.extend(zip(ids, prompts, strict=True))
        return [0.0] * len(prompts)

    rows = [{"prompt": [5, 6], "ids": 0}, {"prompt": long, "ids": 1}]
    options = {"max_steps": 1, "max_new_tokens": 2, "console": False}
    with pytest.warns(UserWarning, match=r"1 of 2 prompts .* number 1 with 600 tokens\); they are dropped"):
        tiny.trainer(overlong_prompts="drop").train(rows, reward, **options)
    assert {number for number, _ in seen} == {0}
    with pytest.raises(ValueError, match="none is left after dropping them"):
        tiny.trainer(overlong_prompts="drop").train(rows[1:], reward, **options)
    seen.clear()
    with pytest.warns(UserWarning, match=r"1 of 2 prompts .*; only their ends are kept"):
        tiny.trainer(overlong_prompts="truncate").train(rows, reward, **options)
    assert sorted({(number, tuple(ids)) for number, ids in seen}) == [(0, (5, 6)), (1, tuple(long[-510:]))]


# --- the constructor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mini_batch_size": 3}, r"batch_size \(4\) must be a multiple of .* \(3 \* 1 = 3\)"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
        ({"batch_size": None}, "batch_size must be a whole number from 1, got None"),
        ({"batch_size": NAN}, "batch_size must be a whole number from 1, got nan"),
        ({"batch_size": "4"}, "batch_size must be a whole number from 1, got '4'"),
        ({"learning_rate": "1e-5"}, "learning_rate must be greater than 0, got '1e-5'"),
        ({"kl_penalty": "KL"}, "kl_penalty must be one of kl, abs, .*, got 'KL'"),
    ],
)
def test_settings_are_checked_when_a_trainer_starts(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(**settings)


def test_models_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="config must be a PPOConfig, got dict"):
        PPOTrainer({}, tiny.policy())
    with pytest.raises(ValueError, match=r"got GPT2LMHeadModel; wrap it with AutoModelForCausalLMWithValueHead"):
        PPOTrainer(PPOConfig(), tiny.network())
    with pytest.raises(ValueError, match="ref_model must be a model or None, got str"):
        PPOTrainer(PPOConfig(), tiny.policy(), "gpt2")
    with pytest.raises(ValueError, match="tokenizer must be a transformers tokenizer, got str"):
        PPOTrainer(PPOConfig(), tiny.policy(), tokenizer="gpt2")
    with pytest.raises(ValueError, match="no trainable parameter; load it with is_trainable=True"):
        tiny.trainer(tiny.policy().requires_grad_(False))


def test_more_than_one_process_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="one process for now, got WORLD_SIZE=2; start it with python"):
        tiny.trainer()


@pytest.mark.parametrize("name", ["loss", "train_minibatch", "batched_forward_pass", "_kl_penalty", "_evaluate"])
def test_an_override_without_effect_is_refused(name):
    useless = type("Mine", (PPOTrainer,), {name: lambda self, *args: None})
    with pytest.raises(TypeError, match=f"Mine overrides {name}, .*; overrides of compute_rewards"):
        tiny.trainer(trainer_class=useless)


def test_overrides_of_rewards_advantages_and_logging_are_honoured():
    called = []

    class Mine(PPOTrainer):
        def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
            called.append("rewards")
            rewards, penalties, kls = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
            return rewards + 1.0, penalties, kls

        def compute_advantages(self, values, rewards, mask):
            called.append("advantages")
            return super().compute_advantages(values, rewards, mask)

        def log_stats(self, stats, batch, rewards, columns_to_log=("query", "response")):
            called.append("log")

    trainer = tiny.trainer(trainer_class=Mine, gamma=1.0, lam=1.0)
    stats = trainer.step(*tiny.batch())
    plain = tiny.trainer(gamma=1.0, lam=1.0).step(*tiny.batch())
    # One more on each of n tokens, undiscounted: (n + 1) / 2 more in the mean return of a response of n tokens.
    more = sum(n * (n + 1) / 2 for n in (6, 2, 11, 4)) / 23
    assert stats["ppo/returns/mean"] == pytest.approx(plain["ppo/returns/mean"] + more, abs=1e-4)
    trainer.log_stats(stats, {}, [])
    assert called == ["rewards", "advantages", "log"]

"""What a reward may do wrong, each with its outcome: returns, exceptions, timeouts; and calls of finished samples."""

import asyncio
import decimal
import functools
import math
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastppo.rewards import Guarded, Reward, RewardPolicy, guard
from fastppo.rewards import calls as calls_module

PROMPTS, COMPLETIONS = ["a", "b", "c", "d"], ["1", "22", "333", "4444"]
INF, NAN = math.inf, math.nan


def score(reward, *, problems=None, **settings):
    note = None if problems is None else problems.append
    return Reward(reward, on_problem=note, **settings)(PROMPTS, COMPLETIONS, {"label": [1, 2, 3, 4]}).tolist()


def returning(value):
    def reward(completions):
        return value

    return reward


BAD = {
    "nothing": (None, "are None of type NoneType"),
    "one number": (0.5, "are 0.5 of type float"),
    "a text": ("1234", "are '1234' of type str"),
    "bytes": (b"1234", "of type bytes"),
    "a mapping": ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "of type dict"),
    "a set": ({1.0, 2.0, 3.0, 4.0}, "of type set"),
    "an iterator": (iter([1.0] * 4), "of type list_iterator"),
    "one tensor": (torch.tensor(1.0), "of type Tensor"),
    "one of length 1, which would broadcast": ([1.0], "got 1 scores for 4 responses"),
    "one too many": ([1.0] * 5, "got 5 scores for 4 responses"),
    "none at all": ([], "got 0 scores for 4 responses"),
    "texts": ([1, 2, "3", 4], "score 2 is '3' of type str"),
    "lists": ([1, [2], 3, 4], r"score 1 is \[2\] of type list"),
    "mappings of a pipeline": ([{"label": "x", "score": 1.0}] * 4, "score 0 is .* of type dict"),
    "complex": ([1j, 2, 3, 4], "score 0 is 1j of type complex"),
    "a decimal": ([1, 2, 3, decimal.Decimal(4)], r"score 3 is Decimal\('4'\) of type Decimal"),
    "a table": (torch.ones(4, 2), r"score 0 has shape \(2,\)"),
    "an array of texts": (np.array(["1", "2", "3", "4"]), "score 0 is .* of type str"),
    "infinite": ([1, 2, INF, 4], "score 2 is inf .* or bound the reward"),
    "minus infinite": (np.array([1.0, -np.inf, 3, 4]), "score 1 is -inf"),
    "beyond fp32": ([1e39, 2, 3, 4], "score 0 is inf"),
    "beyond any float": ([1, 2, 3, -(10**400)], "score 3 is -inf"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("on_error", ["raise", "drop", 0.0])
def test_a_wrong_return_is_an_error_under_every_policy(name, on_error):
    value, message = BAD[name]
    problems = []
    with pytest.raises(ValueError, match=f"reward reward: .*{message}") as raised:
        score(guard(returning(value), on_error=on_error), problems=problems)
    assert [(p.kind, p.rows, p.error) for p in problems] == [("error", (0, 1, 2, 3), raised.value)]


def test_every_kind_of_number_is_a_number_and_none_and_nan_are_none():
    for value in ([1, 2.0, True, Fraction(1, 2)], [np.float16(1), torch.tensor(2), np.bool_(True), np.array([0.5])]):
        assert score(returning(value)) == [1.0, 2.0, 1.0, 0.5]
    got = score(returning([None, NAN, torch.tensor(NAN), 4.0]))
    assert [math.isnan(x) for x in got] == [True, True, True, False]


def test_infinity_is_a_number_only_where_a_bound_says_which():
    given = [INF, -INF, NAN, 2.5]
    got = score(guard(returning(given), clip=3.0))
    assert [*got[:2], got[3]] == [3.0, -3.0, 2.5]
    assert math.isnan(got[2])
    with pytest.raises(ValueError, match=r"weighted sum of the scores of response 0 is inf: weights .*1e\+20"):
        score([returning([1e30, 0, 0, 0])], weights=[1e20])
    # inf - inf would be NaN, and look as if no score had been given.
    with pytest.raises(ValueError, match="score 0 is inf"):
        score([returning([INF, 0, 0, 0]), returning([-1.0] * 4)], weights=[1, 1])
    with pytest.raises(ValueError, match=r"weights must be finite numbers, got \[inf\]"):
        Reward(returning([1.0]), [INF])


@pytest.mark.parametrize(
    ("field", "value"),
    [("timeout", 0), ("on_error", "ignore"), ("on_error", NAN), ("clip", INF), ("batch_size", 0), ("concurrency", 0)],
)
def test_a_policy_that_cannot_work_is_refused(field, value):
    with pytest.raises(ValueError, match=f"RewardPolicy.{field} must be .*, got {value!r}"):
        RewardPolicy(**{field: value})


def test_policies_add_up():
    careful = guard(guard(returning([1.0]), timeout=5, on_error="drop"), clip=2.0)
    assert careful == Guarded(careful.function, RewardPolicy(timeout=5, on_error="drop", clip=2.0))
    assert careful(["x"]) == [1.0]

    class Own:
        reward_policy = RewardPolicy(clip=1.0)

        def __call__(self, completions):
            return [9.0] * len(completions)

    assert score(Own()) == [1.0] * 4
    assert score(guard(Own(), timeout=9)) == [1.0] * 4


# --- exceptions -------------------------------------------------------------------------------------------------


def fails_on(*bad):
    def judge(prompts, completions):
        if set(bad) & set(completions):
            raise LookupError(f"cannot read {completions}")
        return [float(len(text)) for text in completions]

    return judge


def test_an_exception_is_raised_dropped_or_a_number():
    problems = []
    with pytest.raises(LookupError, match="cannot read"):
        score(fails_on("22"), problems=problems)
    assert (problems[0].reward, problems[0].kind, problems[0].rows) == ("judge", "error", (0, 1, 2, 3))
    assert "LookupError: cannot read" in problems[0].text
    assert "in judge" in problems[0].text
    # One sample a call: only that one is lost, and the record says which.
    problems.clear()
    got = score(guard(fails_on("22"), on_error="drop", batch_size=1), problems=problems)
    assert [*got[:1], *got[2:]] == [1.0, 3.0, 4.0]
    assert math.isnan(got[1])
    assert [(p.rows, p.samples) for p in problems] == [((1,), (("b", "22"),))]
    assert score(guard(fails_on("22"), on_error=-2.0, batch_size=1)) == [1.0, -2.0, 3.0, 4.0]
    assert all(map(math.isnan, score(guard(fails_on("22"), on_error="drop"))))


def test_an_interrupt_is_no_exception_to_drop():
    def interrupted(completions):
        raise KeyboardInterrupt

    for settings in ({}, {"timeout": None}, {"batch_size": 2}):
        with pytest.raises(KeyboardInterrupt):
            score(guard(interrupted, on_error="drop", **settings))


def test_dropping_one_in_a_hundred_leaves_the_mean_where_it_was():
    draw = np.random.default_rng(3)
    values = draw.normal(1.0, 1.0, 4000)

    def flaky(completions):
        if draw.random() < 0.01:
            raise RuntimeError("flaky")
        return [values[int(text)] for text in completions]

    reward, problems = Reward(guard(flaky, on_error="drop", batch_size=1, concurrency=1)), []
    reward.on_problem = problems.append
    texts = [str(i) for i in range(len(values))]
    scores = reward(texts, texts, {})
    known = scores[~scores.isnan()]
    assert 15 <= len(problems) == 4000 - len(known) <= 80
    assert float(known.mean()) == pytest.approx(values.mean(), abs=4 * 0.1 / math.sqrt(4000))
    torch.testing.assert_close(known.double(), torch.tensor(values)[~scores.isnan()], rtol=1e-6, atol=1e-6)


# --- timeouts ---------------------------------------------------------------------------------------------------


def hangs_on(bad, released):
    def judge(completions):
        if bad in completions:
            released.wait(30)
        return [1.0] * len(completions)

    return judge


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_call_that_hangs_is_left_behind_and_its_samples_have_no_score(concurrency):
    released, problems = threading.Event(), []
    reward = Reward(guard(hangs_on("22", released), timeout=0.15, batch_size=1, concurrency=concurrency))
    reward.on_problem = problems.append
    start = time.monotonic()
    for _ in range(2):  # what was left behind does not stand in the way of the next batch
        got = reward(PROMPTS, COMPLETIONS, {}).tolist()
        assert [math.isnan(x) for x in got] == [False, True, False, False]
    assert time.monotonic() - start < 5
    assert [(p.kind, p.rows, p.error) for p in problems] == [("timeout", (1,), None)] * 2
    assert "no answer within 0.15 seconds" in problems[0].text
    released.set()


def test_a_whole_batch_that_hangs_has_no_scores_even_under_raise_and_number():
    released = threading.Event()
    for on_error in ("raise", 7.0):
        got = score(guard(hangs_on("22", released), timeout=0.05, on_error=on_error))
        assert all(map(math.isnan, got))
    released.set()


def test_a_timeout_error_of_the_reward_itself_counts_as_one():
    def judge(completions):
        raise TimeoutError("the judge is asleep")

    for settings in ({}, {"timeout": None}):
        problems = []
        assert all(map(math.isnan, score(guard(judge, **settings), problems=problems)))
        assert problems[0].kind == "timeout"
        assert "the judge is asleep" in problems[0].text


def test_without_a_timeout_a_function_runs_on_the_callers_thread():
    threads = []

    def reward(completions):
        threads.append(threading.current_thread())
        return [1.0] * len(completions)

    score(guard(reward, timeout=None))
    score(reward)
    assert (threads[0] is threading.current_thread(), threads[1] is threads[0]) == (True, False)


def test_functions_of_the_whole_batch_never_run_side_by_side():
    running, most = [], []

    def reward(completions):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return [1.0] * len(completions)

    assert score([reward, reward, guard(reward, timeout=None)]) == [3.0] * 4
    assert most == [1, 1, 1]


# --- asynchronous rewards ---------------------------------------------------------------------------------------


async def slow_length(completions):
    await asyncio.sleep(0.2)
    return [float(len(text)) for text in completions]


class AsyncJudge:
    async def __call__(self, prompts, completions):
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)


def test_asynchronous_rewards_run_in_one_loop_side_by_side():
    loops = []

    async def noted(completions):
        loops.append(asyncio.get_running_loop())
        return await slow_length(completions)

    async def scaled(factor, completions):
        return [factor * x for x in await noted(completions)]

    start = time.monotonic()
    rewards = [noted, noted, AsyncJudge(), functools.partial(scaled, 10.0), lambda completions: noted(completions)]
    assert score(rewards) == [13.0 * n + 1 for n in (1, 2, 3, 4)]
    # Four beside each other, then the plain function that returns an awaitable: 1 s one after the other.
    assert time.monotonic() - start < 0.8
    assert len(set(map(id, loops))) == 1
    assert score(noted) == [1.0, 2.0, 3.0, 4.0]
    assert len(set(map(id, loops))) == 1  # clients may live in it from step to step


def test_asynchronous_calls_are_bounded_and_cancelled_when_they_are_late():
    running, most, cancelled = [], [], []

    async def judge(completions):
        running.append(1)
        most.append(len(running))
        try:
            await asyncio.sleep(30 if completions == ["333"] else 0.05)
        except asyncio.CancelledError:
            cancelled.append(completions)
            raise
        finally:
            running.pop()
        return [1.0] * len(completions)

    got = score(guard(judge, batch_size=1, concurrency=2, timeout=0.3))
    assert [math.isnan(x) for x in got] == [False, False, True, False]
    assert max(most) == 2
    end = time.monotonic() + 5
    while not cancelled and time.monotonic() < end:
        time.sleep(0.01)
    assert cancelled == [["333"]]


def test_a_coroutine_that_never_awaits_does_not_hold_up_the_others_for_ever(monkeypatch):
    monkeypatch.setattr(calls_module, "_STUCK", 0.05)
    released = threading.Event()

    async def blocks(completions):
        if completions == ["1"]:
            released.wait(30)
        return [1.0] * len(completions)

    reward = Reward(guard(blocks, batch_size=1, concurrency=1, timeout=0.1))
    for _ in range(2):
        got = reward(PROMPTS, COMPLETIONS, {}).tolist()
        assert math.isnan(got[0])
        assert got[-1] == 1.0
    released.set()


# --- samples as they are finished -------------------------------------------------------------------------------


def test_a_reward_with_a_batch_size_starts_while_completions_are_still_to_come():
    seen, started = [], threading.Event()

    def judge(prompts, completions, label, completion_ids):
        seen.append((prompts, completions, label, completion_ids))
        started.set()
        return [float(number) for number in label]

    whole = []

    def at_once(completions):
        whole.append(list(completions))
        return [0.0] * len(completions)

    reward = Reward([guard(judge, batch_size=2), at_once], [1.0, 1.0])
    with reward.scoring(PROMPTS, {"label": [1, 2, 3, 4]}, late=["completion_ids"]) as scoring:
        scoring.add(3, "4444", completion_ids=[4])
        assert not started.is_set()
        scoring.add(1, "22", completion_ids=[2])
        assert started.wait(5)
        assert whole == []
        for row in range(4):
            scoring.add(row, COMPLETIONS[row], completion_ids=[row + 1])  # those that are there stay as they are
        assert scoring.scores().tolist() == [1.0, 2.0, 3.0, 4.0]
    assert seen[0] == (["d", "b"], ["4444", "22"], [4, 2], [[4], [2]])
    assert seen[1] == (["a", "c"], ["1", "333"], [1, 3], [[1], [3]])
    assert whole == [COMPLETIONS]


def test_a_failure_is_raised_while_completions_are_still_to_come():
    failed = threading.Event()

    def judge(completions):
        failed.set()
        raise LookupError("cannot read")

    reward = Reward(guard(judge, batch_size=1))
    with reward.scoring(PROMPTS, {}) as scoring:
        scoring.add(0, COMPLETIONS[0])
        assert failed.wait(5)
        time.sleep(0.05)
        with pytest.raises(LookupError, match="cannot read"):
            scoring.add(1, COMPLETIONS[1])


def test_what_is_called_in_parts_must_be_free_of_the_policys_network():
    import tiny
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from fastppo.rewards import ModelReward

    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1, num_labels=1, pad_token_id=0)
    model = ModelReward(GPT2ForSequenceClassification(config), tiny.tokenizer())
    with pytest.raises(ValueError, match=r"batch_size=2 is for rewards that run elsewhere .*ModelReward\(model, batch"):
        Reward(guard(model, batch_size=2))
    assert not Reward(model, policy=RewardPolicy(batch_size=2)).takes_parts


def test_a_url_alone_is_not_guarded():
    with pytest.raises(ValueError, match=r"expected a reward; for a server use URLReward\(url") as raised:
        guard("http://user:secret@host/", timeout=5)
    assert "secret" not in str(raised.value)

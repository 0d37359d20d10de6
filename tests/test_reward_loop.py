"""Rewards in a training run: what is dropped, counted, written down and kept when one fails; scoring meanwhile."""

import dataclasses
import json
import math
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from reward_servers import server

from fastppo import Engine, PPOConfig, PPOTrainer, SamplingConfig
from fastppo.rewards import Reward, RewardPolicy, URLReward, guard
from fastppo.trainers.prompts import Prompts
from fastppo.trainers.rollout import generate_and_score

PROMPTS = ["w5 w6", "w7", "w8 w9 w10", "w11 w12", "w13"]
SECRETS = {
    "user information": "hunter2hunter2",
    "query": "qu3ryvalue12",
    "path": "s3cretpath",
    "hub token": "hf_abcdefghijklmnop",
    "bearer": "b3arert0kenb3arer",
    "key": "sk-abcdefghijkl",
    "named": "plainpassw0rd",
    "forty": "0123456789abcdef0123456789abcdef01234567",
}


def make(**settings):
    config = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "learning_rate": 1e-3, "seed": 3} | settings
    return PPOTrainer(PPOConfig(**config), tiny.with_value_head(tiny.llama()), tokenizer=tiny.tokenizer())


def train(trainer, reward, prompts=PROMPTS, **kwargs):
    kwargs = {"max_steps": 3, "max_new_tokens": 6, "console": False} | kwargs
    return trainer.train(prompts, reward, **kwargs)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def length(completions):
    return [float(len(text.split())) for text in completions]


class Failing:
    """Fails on the samples of its batch numbered `rows`, in the batch numbered `batch`; late for those of `late`."""

    def __init__(self, batch, rows=(), late=(), error=LookupError):
        self.batch, self.rows, self.late, self.error = batch, set(rows), set(late), error
        self.calls, self.lock, self.released = 0, threading.Lock(), threading.Event()

    def __call__(self, prompts, completions):
        with self.lock:
            number, self.calls = self.calls, self.calls + len(completions)
        if number // 4 == self.batch and number % 4 in self.rows:
            raise self.error(f"cannot read {completions}")
        if number // 4 == self.batch and number % 4 in self.late:
            self.released.wait(30)
        return length(completions)


def one_by_one(reward, **settings):
    return guard(reward, **({"on_error": "drop", "batch_size": 1, "concurrency": 1, "timeout": 0.5} | settings))


# --- dropped samples --------------------------------------------------------------------------------------------


def test_what_is_lost_is_left_out_counted_and_written_down(tmp_path):
    reward = Failing(1, rows=[2], late=[3])
    with pytest.warns(UserWarning, match="left 2 of 4 responses out of this update: 2 without a score"):
        history = train(make(), one_by_one(reward), output_dir=tmp_path)
    reward.released.set()
    names = ("env/reward_errors", "env/reward_timeouts", "ppo/dropped_samples", "env/skipped_batches")
    assert [[stats[name] for name in names] for stats in history] == [[0, 0, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0]]
    assert [line["env/reward_errors"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 0]
    error, timeout = lines(tmp_path / "errors.jsonl")
    assert (error["step"], error["reward"], error["kind"]) == (2, "Failing", "error")
    assert error["samples"][0]["prompt"] in PROMPTS
    assert f"LookupError: cannot read {[error['samples'][0]['completion']]}" in error["text"]
    assert "__call__" in error["text"]
    assert (timeout["kind"], len(timeout["rows"])) == ("timeout", 1)
    assert set(error["rows"]).isdisjoint(timeout["rows"])


def test_a_dropped_sample_changes_nothing_but_the_count():
    """Two runs whose third sample is lost in different ways, one with a reward beside it that would be enormous."""
    weights = []
    for beside in (lambda completions: [0.0] * len(completions), lambda completions: [0, 0, 1e30, 0]):
        trainer = make(whiten_rewards=True, use_score_scaling=True, use_score_norm=True)
        with pytest.warns(UserWarning, match="left 1 of 4"):
            train(trainer, [lambda completions: [1.0, 2.0, None, 4.0], beside], max_steps=1)
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.filterwarnings("ignore:left:UserWarning")
def test_a_batch_with_too_few_scores_is_skipped_and_counted(tmp_path):
    def some(lost):
        def reward(completions):
            calls.append(1)
            return [None] * lost + [1.0] * (4 - lost) if len(calls) == 2 else length(completions)

        calls = []
        return reward

    with pytest.warns(UserWarning, match=r"1 of 4 responses of a batch have a score \(reward_min_valid=0.5\)"):
        history = train(make(), some(lost=3), output_dir=tmp_path, max_steps=2)
    assert [stats["env/skipped_batches"] for stats in history] == [0, 1]
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_batches"] == 1
    assert [s["env/skipped_batches"] for s in train(make(), some(lost=2), max_steps=2)] == [0, 0]
    history = train(make(), some(lost=3), reward_min_valid=0.0, max_steps=2)
    assert [stats["env/skipped_batches"] for stats in history] == [0, 0]
    with pytest.raises(ValueError, match=r"reward_min_valid must be a share from 0 to 1, got 1\.5"):
        train(make(), length, reward_min_valid=1.5)


def test_a_reward_that_is_always_late_ends_the_run_and_says_so():
    released = threading.Event()
    late = guard(lambda completions: released.wait(30), timeout=0.02)
    with (
        pytest.warns(UserWarning, match=r"0 of 4 .*, 4 in timeouts\); going on"),
        pytest.raises(ValueError, match=r"2 batches in a row had too few scores; of the last .*, 8 in timeouts\)"),
    ):
        train(make(max_skipped_steps=2), late)
    released.set()


def test_a_run_that_ends_for_want_of_scores_can_be_continued(tmp_path):
    calls = []

    def falls_silent(completions):
        calls.append(1)
        return length(completions) if len(calls) < 2 else [None] * len(completions)

    with (
        pytest.warns(UserWarning, match="0 of 4 responses"),
        pytest.raises(ValueError, match="2 batches in a row had too few scores"),
    ):
        train(make(max_skipped_steps=2), falls_silent, output_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"]


# --- errors that end a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [LookupError, pytest.param(None, marks=pytest.mark.slow)])
def test_a_checkpoint_is_written_before_an_error_of_a_reward_comes_through(tmp_path, wrong):
    whole = train(make(), length)

    def fails(completions):
        calls.append(1)
        if len(calls) < 2:
            return length(completions)
        if wrong is None:
            return [1.0]
        raise wrong("no such film")

    calls = []
    with pytest.raises(wrong or ValueError, match=r"no such film|got 1 scores for 4 responses"):
        train(make(), fails, output_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"]
    (written,) = lines(tmp_path / "errors.jsonl")
    assert (written["step"], written["rows"], len(written["samples"])) == (2, [0, 1, 2, 3], 4)
    rest = train(make(), length, resume_from=tmp_path)
    for name in ("ppo/loss/total", "env/reward_mean", "objective/kl"):
        assert [stats[name] for stats in rest] == [stats[name] for stats in whole[1:]]


def test_an_interrupt_does_not_wait_for_a_reward_that_hangs():
    released, interrupted = threading.Event(), threading.Lock()

    def hangs(completions):
        if interrupted.acquire(blocking=False):  # a second signal would reach whoever comes after the run
            os.kill(os.getpid(), signal.SIGINT)
        released.wait(30)
        return length(completions)

    for settings in ({}, {"batch_size": 1}):
        interrupted = threading.Lock()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            train(make(), guard(hangs, **settings))
        assert time.monotonic() - start < 15
    released.set()


def test_no_secret_of_a_reward_reaches_a_file(tmp_path, monkeypatch):
    def says_too_much(completions):
        said = (
            f"GET https://me:{SECRETS['user information']}@host/x?sig={SECRETS['query']} "
            f"Authorization: Bearer {SECRETS['bearer']} {SECRETS['hub token']} api_key={SECRETS['key']} "
            f"password={SECRETS['named']} {SECRETS['forty']}"
        )
        raise ConnectionError(said)

    with server(otherwise=404) as served:
        url = served.url.replace("//", f"//me:{SECRETS['user information']}@")
        url += f"/{SECRETS['path']}?x={SECRETS['query']}"
        remote = URLReward(url, headers={"X": SECRETS["bearer"]}, on_error="drop")
        command = ["fastppo", "ppo", "--reward", url, "--output_dir", "x"]
        monkeypatch.setattr("sys.argv", command)
        arguments = {"reward": [remote], "other": remote}
        failing = guard(says_too_much, on_error=1.0)
        with (
            pytest.warns(UserWarning, match=r"0 of 4 .*, 8 in errors"),
            pytest.raises(ValueError, match=r"2 batches in a row had too few scores"),
        ):
            train(make(max_skipped_steps=2), [failing, remote], output_dir=tmp_path, arguments=arguments)
    written = {path: path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".txt")}
    assert {"errors.jsonl", "run.json", "summary.json"} <= {path.name for path in written}
    leaks = [(name, path.name) for name, s in SECRETS.items() for path, text in written.items() if s in text]
    assert leaks == []
    errors = (tmp_path / "errors.jsonl").read_text()
    assert "ConnectionError" in errors
    assert "status 404" in errors


# --- scoring while generating -----------------------------------------------------------------------------------


class SlowEngine:
    """Hands out the responses of a rollout, one every `pause` seconds, the last one first."""

    def __init__(self, rollout, pause):
        self.rollout, self.pause = rollout, pause

    def generate(self, prompts, sampling, on_response=None):
        for row in reversed(range(len(self.rollout))):
            time.sleep(self.pause)
            if on_response is not None:
                on_response(row, self.rollout[row].tolist())
        return self.rollout


def test_a_step_takes_as_long_as_the_slower_of_generating_and_scoring():
    count, pause = 8, 0.06
    queries = tiny.queries(count)
    rollout = Engine(tiny.llama(), seed=1).generate(queries, max_new_tokens=5)
    trainer = SimpleNamespace(tokenizer=tiny.tokenizer(), engine=SlowEngine(rollout, pause))
    prompts = Prompts([f"w{5 + i}" for i in range(count)], queries, {"number": list(range(count))})
    seen = []

    def judge(prompts, completions, number, completion_ids, prompt_ids):
        seen.append((prompts[0], completions[0], number[0], completion_ids[0], prompt_ids[0]))
        time.sleep(pause * len(completions))
        return [float(n) for n in number]

    seconds, results = {}, []
    for name, settings in (("whole", {}), ("parts", {"batch_size": 1, "concurrency": 1})):
        start = time.monotonic()
        results.append(generate_and_score(trainer, prompts, Reward(guard(judge, **settings)), SamplingConfig()))
        seconds[name] = time.monotonic() - start
    assert torch.equal(results[0][2], torch.arange(count).float())
    assert torch.equal(results[0][2], results[1][2])
    texts = tiny.tokenizer().batch_decode([r.tolist() for r in rollout], skip_special_tokens=True)
    expected = [(f"w{5 + i}", texts[i], i, rollout[i].tolist(), queries[i].tolist()) for i in reversed(range(count))]
    assert seen == [expected[-1], *expected]
    # 0.48 s for each of the two: their sum, or one of them and the reward of what was finished last.
    assert seconds["whole"] >= 2 * count * pause
    assert seconds["parts"] < 0.8 * seconds["whole"]
    assert results[1][3]["time/score"] < 0.5 * results[0][3]["time/score"]


def test_training_is_the_same_however_the_samples_are_handed_over():
    histories = []
    for settings in ({"timeout": None}, {}, {"batch_size": 1}, {"batch_size": 3, "concurrency": 2}):
        history = train(make(), guard(length, **settings), stop_strings=["w1"], max_new_tokens=9, max_steps=2)
        histories.append([(stats["ppo/loss/total"], stats["env/reward_mean"]) for stats in history])
    assert histories[0] == histories[1] == histories[2] == histories[3]


def test_a_policy_for_all_rewards_and_one_of_its_own():
    def fails(completions):
        raise LookupError("no such film")

    dropping = RewardPolicy(on_error=2.5)
    assert train(make(), fails, reward_policy=dropping)[0]["env/reward_mean"] == 2.5
    own = guard(fails, on_error=-1.0)
    history = train(make(), [fails, own], reward_policy=dropping, max_steps=1, eval_prompts=["w20"], eval_reward=own)
    assert history[0]["env/reward_mean"] == 1.5
    assert dataclasses.asdict(dropping)["batch_size"] is None


def test_a_server_scores_what_is_finished_while_the_rest_is_generated(monkeypatch):
    from fastppo.engine import engine as engine_module

    ends, real = [], engine_module.Call.rollout
    monkeypatch.setattr(engine_module.Call, "rollout", lambda call: (ends.append(time.monotonic()), real(call))[1])
    first = []

    def answer(request):
        first.append(time.monotonic())
        return {"scores": [float(len(text)) for text in request["completions"]]}

    with server(otherwise=answer) as served:
        history = train(
            make(batch_size=8), URLReward(served.url, batch_size=1), max_steps=1, max_new_tokens=40, stop_strings=["w1"]
        )
        assert len(served.requests) == 8
        assert {len(request["completions"]) for request in served.requests} == {1}
    assert first[0] < ends[0]
    assert math.isfinite(history[0]["env/reward_mean"])

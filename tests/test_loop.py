"""`train`: any prompts and rewards, held-out measurement, the run's folder, resuming, stopping."""

import json
import os
import signal
import warnings

import numpy as np
import pytest
import tiny
import torch

from fastppo import PPOConfig, PPOTrainer
from fastppo.trainers.held_out import distinct_2
from fastppo.trainers.interrupts import Interrupts

PROMPTS = ["w5 w6", "w7", "w8 w9 w10", "w11 w12", "w13"]


def make(**settings):
    config = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "learning_rate": 1e-3, "seed": 3} | settings
    return PPOTrainer(PPOConfig(**config), tiny.with_value_head(tiny.llama()), tokenizer=tiny.tokenizer())


def length(completions):
    return [float(len(text.split())) for text in completions]


def train(trainer, prompts=PROMPTS, reward=length, **kwargs):
    kwargs = {"max_steps": 3, "max_new_tokens": 6, "console": False} | kwargs
    return trainer.train(prompts, reward, **kwargs)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_everything_in_its_folder(tmp_path):
    history = train(make(), eval_prompts=["w20", "w21 w22"], eval_every=1, output_dir=tmp_path / "run")
    folder = tmp_path / "run"
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3]
    assert lines(folder / "metrics.jsonl")[0]["objective/kl"] == history[0]["objective/kl"]
    assert {"query", "completion", "reward", "step"} == set(lines(folder / "samples.jsonl")[0])
    summary = json.loads((folder / "summary.json").read_text())
    assert {"reward_before", "reward_after", "reward_std_before", "kl", "distinct_2_before"} <= set(summary)
    assert summary["kl_before"] == pytest.approx(0.0, abs=1e-4)
    assert (folder / "best" / "model.safetensors").exists()
    assert (folder / "model.safetensors").exists()
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "run.json").read_text())["versions"]["torch"]


def test_measuring_does_not_disturb_the_training(tmp_path):
    """With and without held-out prompts the training draws the same tokens and takes the same steps."""
    plain = train(make())
    measured = train(make(), eval_prompts=["w20"], eval_every=1)
    assert [s["objective/kl"] for s in plain] == [s["objective/kl"] for s in measured]
    assert [s["ppo/loss/total"] for s in plain] == [s["ppo/loss/total"] for s in measured]


def test_resuming_a_run_is_bit_for_bit(tmp_path):
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 1}
    whole = train(make(**settings), max_steps=4)
    train(make(**settings), max_steps=4, output_dir=tmp_path / "run", save_every=2)
    again = make(**settings)
    rest = train(again, max_steps=4, output_dir=tmp_path / "other", resume_from=tmp_path / "run" / "checkpoint-000002")
    for a, b in zip(whole[2:], rest, strict=True):
        for name in a:
            if not name.startswith(("time/", "tokens/per_second")):
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    with pytest.raises(ValueError, match="5 prompts, and now there are 2"):
        train(make(**settings), ["w5", "w6"], resume_from=tmp_path / "run" / "checkpoint-000002", max_steps=9)


def test_another_runs_folder_is_not_written_into(tmp_path):
    train(make(), output_dir=tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="overwrite"):
        train(make(), output_dir=tmp_path / "run")
    trainer = make()
    queries = tiny.queries(4)
    trainer.step(queries, trainer.generate(queries, return_prompt=False, max_new_tokens=3), [0.0] * 4)
    with pytest.raises(ValueError, match="overwrite"):  # a step of one's own does not make it a continued run
        train(trainer, output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_max_steps_counts_from_the_first_step():
    trainer = make(lr_scheduler_type="linear", learning_rate=8e-4)
    first = train(trainer, max_steps=4)
    np.testing.assert_allclose([s["ppo/learning_rate"] for s in first], [8e-4, 6e-4, 4e-4, 2e-4])
    with pytest.raises(ValueError, match="max_steps=4 counts from the trainer's first step, and 4 are done"):
        train(trainer, max_steps=4)
    second = train(trainer, max_steps=8)
    np.testing.assert_allclose([s["ppo/learning_rate"] for s in second], [4e-4, 3e-4, 2e-4, 1e-4])


def test_several_rewards_and_columns():
    seen = {}

    def fits(completions, target, **columns):
        seen.update(columns)
        return [float(t) for t in target]

    rows = [{"query": prompt, "target": i, "other": "x"} for i, prompt in enumerate(PROMPTS)]
    history = train(make(), rows, [fits, length], reward_weights=[2.0, 0.0], max_steps=5)
    means = [stats["env/reward_mean"] * 4 / 2 for stats in history]
    assert sum(means) == pytest.approx(4 * (0 + 1 + 2 + 3 + 4))  # 20 draws are 4 epochs of 5 prompts
    assert seen["prompts"] is not None
    assert seen["other"] == ["x"] * 4


def test_prompts_of_every_kind():
    def same(prompts, completions):
        kinds.append(prompts)
        return [0.0] * len(completions)

    kinds = []
    trainer = make()
    trainer.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chats = [[{"role": "user", "content": "w5 w6"}]] * 4
    train(trainer, chats, same, max_steps=1)
    train(make(), [[5, 6]] * 4, same, max_steps=1)
    train(make(), [torch.tensor([5, 6])] * 4, same, max_steps=1)
    assert kinds[0] == chats
    assert kinds[1] == kinds[2] == ["w5 w6"] * 4


def test_stop_strings_end_responses():
    history = train(make(), max_steps=1, stop_strings=["w"], max_new_tokens=9)  # every ordinary token has one
    assert history[0]["tokens/responses_len_mean"] < 4


def test_a_batch_without_scores_is_passed_over_and_many_are_an_error():
    calls = []

    def flaky(completions):
        calls.append(1)
        return [None] * len(completions) if len(calls) == 2 else length(completions)

    with pytest.warns(UserWarning, match="0 of 4 responses of a batch have a score"):
        assert len(train(make(), reward=flaky)) == 3
    assert len(calls) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"5 batches in a row had too few scores; .* mend the reward"):
            train(make(), reward=lambda completions: [None] * len(completions))


def test_metrics_show_the_reward_as_it_came():
    history = train(make(use_score_scaling=True, use_score_norm=True), reward=lambda completions: [50.0, 70, 10, 30])
    assert [stats["env/reward_mean"] for stats in history] == [40.0] * 3
    assert abs(history[0]["ppo/mean_scores"]) < 1e-5


def test_held_out_prompts_can_have_a_reward_of_their_own(tmp_path):
    train(make(), eval_prompts=["w20"], eval_reward=lambda completions: [7.0] * len(completions), output_dir=tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["reward_after"] == 7.0


def test_an_error_in_the_reward_leaves_what_was_finished(tmp_path):
    def fails(completions):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("server gone")
        return length(completions)

    calls = []
    with pytest.raises(RuntimeError, match="server gone"):
        train(make(), reward=fails, output_dir=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["stopped_by"]) == (2, "RuntimeError")
    assert len(lines(tmp_path / "metrics.jsonl")) == 2


def test_an_interrupt_in_the_rollout_can_be_continued(tmp_path):
    whole = train(make(), max_steps=4)

    def interrupted(completions):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return length(completions)

    calls = []
    with pytest.raises(KeyboardInterrupt):
        train(make(), reward=interrupted, max_steps=4, output_dir=tmp_path)
    rest = train(make(), max_steps=4, output_dir=tmp_path, resume_from=tmp_path)
    assert [s["ppo/loss/total"] for s in rest] == [s["ppo/loss/total"] for s in whole[2:]]
    assert [s["env/reward_mean"] for s in rest] == [s["env/reward_mean"] for s in whole[2:]]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_first_signal_waits_for_the_update_and_a_second_does_not():
    interrupts, done = Interrupts(), []
    with interrupts.handled():
        for signals in (1, 2):
            try:
                with interrupts.deferred():
                    for _ in range(signals):
                        os.kill(os.getpid(), signal.SIGINT)
                    done.append(signals)
            except KeyboardInterrupt:
                done.append("raised")
    assert done == [1, "raised", "raised"]


def test_distinct_2_by_hand():
    assert distinct_2(["a b c", "a b d"]) == 3 / 4
    assert distinct_2(["a", ""]) == 0.0

"""The edges of a step: which responses ended, which columns a reward sees, padded rewards, what a tracker is sent."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from fastppo import Engine, PPOConfig, SamplingConfig
from fastppo.trainers import padded, report
from fastppo.trainers.prompts import read_prompts
from fastppo.trainers.samples import check_samples


def ended(queries, responses, scores=None):
    scores = torch.zeros(len(queries)) if scores is None else scores
    settings = {"vocabulary": tiny.VOCABULARY, "context": None, "temperature": 1.0, "device": torch.device("cpu")}
    return check_samples(queries, responses, scores, None, end_ids={2}, **settings).ended.tolist()


def test_a_rollout_knows_which_responses_ended_by_other_stops():
    model, queries = tiny.llama(), tiny.queries(12)
    for sampling, stops in (
        (SamplingConfig(max_new_tokens=4, stop_ids=tuple(range(5, 12))), range(5, 12)),
        (SamplingConfig(max_new_tokens=4, stop_ids=(), stop_strings=("w7", "w8", "w9")), range(7, 10)),
    ):
        rollout = Engine(model, tiny.tokenizer(), seed=1).generate(queries, sampling)
        expected = [int(response[-1]) in stops for response in rollout]
        assert set(expected) == {True, False}
        assert ended(queries, rollout) == expected
        assert ended(queries, list(rollout)) == [int(response[-1]) == 2 for response in rollout]


@pytest.mark.filterwarnings("ignore:left 1 of 12 responses:UserWarning")
def test_what_ended_stays_beside_its_response_when_others_are_left_out():
    queries = tiny.queries(12)
    sampling = SamplingConfig(max_new_tokens=4, stop_ids=tuple(range(5, 12)))
    rollout = Engine(tiny.llama(), seed=1).generate(queries, sampling)
    scores = torch.zeros(12)
    scores[4] = math.nan
    finished = rollout.finished.tolist()
    assert ended(queries, rollout, scores) == finished[:4] + finished[5:]


def test_edited_tokens_are_looked_at_again():
    queries = tiny.queries(4)
    rollout = Engine(tiny.llama(), seed=1).generate(queries, SamplingConfig(max_new_tokens=6, stop_ids=()))
    rollout[0][-1] = 2
    for response in rollout.responses[1:]:
        response[-1] = 3
    assert ended(queries, rollout) == [True, False, False, False]


def test_columns_named_like_the_rewards_own_arguments_are_left_out():
    rows = [{"prompt": "w5", "prompts": "x", "completions": "y", "label": 1}] * 2
    engine = Engine(tiny.llama(), tiny.tokenizer())
    with pytest.warns(UserWarning, match=r"columns \['prompts', 'completions'\] are not handed .*rename them"):
        prompts = read_prompts(rows, engine, room=None, overlong="error")
    assert prompts.columns == {"label": [1, 1]}
    chosen = read_prompts([{"prompts": "w5", "label": 1}], engine, room=None, overlong="error", column="prompts")
    assert (chosen.given, chosen.columns) == (["w5"], {"label": [1]})


def test_padded_rewards_of_the_exact_kl_need_distributions():
    sampled, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) .*kl_penalty='full' needs \(B, L - 1, V\)"):
        padded.compute_rewards([1.0, 2.0], sampled, sampled, mask, 0.1, "full")
    logp = torch.log_softmax(torch.randn(2, 3, 5), -1)
    ref_logp = torch.log_softmax(torch.randn(2, 3, 5), -1)
    _, _, kls = padded.compute_rewards([1.0, 2.0], logp, ref_logp, mask, 0.1, "full")
    torch.testing.assert_close(kls, (logp.exp() * (logp - ref_logp)).sum(-1))


class Accelerator:
    """Remembers what it was asked to log."""

    is_main_process, trackers = True, (object(),)

    def __init__(self):
        self.calls = []

    def log(self, values, step=None):
        self.calls.append((values, step))


def test_a_tracker_is_told_the_step_or_gets_the_number_of_the_call():
    accelerator, config = Accelerator(), PPOConfig(log_with="tensorboard")
    for step in (None, None, 7):
        report.log(accelerator, config, {"a": 1.0}, {}, [1.0], [], step=step)
    assert [step for _, step in accelerator.calls] == [0, 1, 7]


def test_wandb_gets_a_table_also_of_responses_without_a_score(monkeypatch):
    class Table(SimpleNamespace):
        pass

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=Table))
    accelerator = Accelerator()
    batch = {"query": ["a", "b", "c"], "response": ["d", "e", "f"]}
    rewards = [1.0, None, np.float32(2.0)]
    report.log(accelerator, PPOConfig(log_with="wandb"), {}, batch, rewards, ["query", "response"])
    values, _ = accelerator.calls[0]
    assert values["game_log"].rows == [["a", "d", 1.0], ["b", "e", None], ["c", "f", 2.0]]
    assert values["env/reward_mean"] == 1.5

"""The benchmark of rollouts on a GPU, tried on the host: its gate, its floor, its file."""

import json
import sys

import pytest
import torch
from conftest import ROOT

# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import rollout

TINY = ["--device", "cpu", "--model", "tiny", "--lora", "2", "--samples", "1"]
TINY += ["--rows", "1", "3", "--prompt", "6", "--new", "5"]


def test_it_writes_what_it_measured(tmp_path, capsys):
    rollout.main([*TINY, "--output", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["case"] for row in found["rows"][::2]] == ["1 x 6 + 5, rollout"] * 2 + ["3 x 6 + 5, rollout"] * 2
    assert all(gate["same_tokens"] and gate["logprob_gap"] < 1e-4 for gate in found["gate"].values())
    assert capsys.readouterr().out.count("of the roofline") == 4


def test_wrong_logprobs_are_not_timed(monkeypatch):
    monkeypatch.setattr(rollout, "gap", lambda model, rollout: 0.06)
    with pytest.raises(SystemExit, match=r"off by 0\.06 in the mean, over 0\.05: not timed"):
        rollout.main(TINY)


def test_the_floor_is_that_of_a_hand_count():
    model = rollout.build("tiny", "cpu", 0)
    hidden, layers, _, _, intermediate, vocabulary = rollout.MODELS["tiny"]
    layer = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * intermediate + 2 * hidden
    weights = layers * layer + hidden + hidden * vocabulary
    kv = 2 * layers * hidden // 2 * (2 * (7 + 8))  # two rows, whose steps see 7 and 8 tokens
    assert rollout.floor_seconds(model, "tiny", 2, 6, 3, rate=4.0) == weights * 2 + kv


def test_the_gap_is_that_of_the_models_own_forward():
    model = rollout.build("tiny", "cpu", 0)
    way = rollout.Way(model, 2, rollout.WAYS[0])
    made = way.run([torch.tensor([4, 5, 6]), torch.tensor([7])], 6)
    made.logprobs[:] -= 0.25
    assert rollout.gap(model, made) == pytest.approx(0.25, abs=1e-5)

"""The benchmarks of fine-tuning and reward models: that they run, and that their checks see what is wrong."""

import json
import sys

import pytest
import torch
from conftest import ROOT

# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import reward_pairs, sft

TEXTS = [("a good film", 1), ("a bad film", 0), ("good, very good", 1), ("a very bad plot", 0)]


def test_a_tie_is_no_success_in_any_pair():
    scores = torch.tensor([2.0, 1.0, 1.0, -1.0])
    assert reward_pairs.pair_accuracy(scores, TEXTS) == 3 / 4


def test_the_regression_is_at_its_optimum():
    known = reward_pairs.vocabulary(TEXTS)
    assert set(known) == {"<pad>", "</s>", "<unk>", "a", "bad", "film", "good", "very"}
    weight = reward_pairs.Regression(known).fit(TEXTS, 1.0).weight
    # Counts by hand, in the order of the words' numbers; what is unknown, a comma or a plot, counts as one word.
    counts = torch.zeros(len(TEXTS), len(known) + 1, dtype=torch.float64)
    for row, (text, _) in enumerate(TEXTS):
        for word in text.replace(",", " ,").split():
            counts[row, known.get(word, 2)] += 1
        counts[row, -1] = 1
    labels = torch.tensor([label for _, label in TEXTS], dtype=torch.float64)
    slope = counts.T @ (torch.sigmoid(counts @ weight) - labels)
    slope[:-1] += weight[:-1]
    assert slope.abs().max() < 1e-4
    assert weight[known["good"]] > 0.3 > -0.3 > weight[known["bad"]]


@pytest.mark.slow  # several fits
def test_the_reward_benchmark_runs(tmp_path, capsys):
    data = tmp_path / "reviews.jsonl"
    rows = [{"text": f"the {w} {t} film", "label": y} for w in "abcdefgh" for t, y in (("good", 1), ("bad", 0))] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(data), "--texts", "60", "--seeds", "1", "--epochs", "12", "--output", str(tmp_path / "found.json")]
    reward_pairs.main(arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    assert str(tmp_path) not in found["command"].split("--output")[0]
    assert [row["accuracy"] for row in found["rows"]] == [1.0, 1.0]
    assert capsys.readouterr().out.count("1.0000") == 2


class Fake:
    """A side that answers with given losses."""

    def __init__(self, name, command):
        self.name, self.hello = name, {"losses": [2.0, 1.0 + (2e-3 if "wrong" in command else 2e-5)]}

    def close(self):
        pass


def test_other_losses_are_not_timed(monkeypatch):
    monkeypatch.setattr(sft, "Side", Fake)
    right, wrong = {"a": ["x"], "b": ["y"]}, {"a": [], "b": ["wrong"]}
    assert sft.gate("texts", "fp32", right)["a"] == [2.0, 1.0 + 2e-5]
    with pytest.raises(SystemExit, match=r"losses differ by 0\.002"):
        sft.gate("texts", "fp32", wrong)
    assert sft.gate("texts", "bf16", wrong)


def test_ratios_are_of_speed_and_of_memory():
    rows = [
        {"case": "texts fp32", "who": "fastppo", "median_s": 0.5, "peak_bytes": 100},
        {"case": "texts fp32", "who": sft.PEER, "median_s": 1.25, "peak_bytes": 400},
        {"case": "equal fp32", "who": "fastppo", "median_s": 0.5, "peak_bytes": 100},
    ]
    assert sft.ratios(rows) == ["texts fp32: 2.50 times the tokens a second, 0.25 of the peak memory"]


@pytest.mark.slow  # two processes that import everything
def test_the_fine_tuning_benchmark_runs(tmp_path, capsys):
    small = ["--size", "tiny", "--case", "completions", "--dtype", "fp32", "--longest", "24", "--batch_size", "2"]
    output = tmp_path / "found.json"
    sft.main([*small, "--iterations", "1", "--foreign-limit", "inf", "--output", str(output)])
    found = json.loads(output.read_text())
    assert [row["case"] for row in found["rows"]] == ["completions fp32"]
    assert len(found["checks"]["completions fp32"]["losses"]["fastppo"]) == sft.GATE_STEPS
    assert "tokens/s" in capsys.readouterr().out

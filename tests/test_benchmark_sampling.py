"""The benchmark of the sampler: that it runs, that its gate sees a wrong draw, that its ratios are right."""

import json
import sys

import pytest
import torch
from conftest import ROOT

# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import sampling
from benchmarks.sampling import LIMITS, OURS, Case

CASE = Case(4, 700, "fp32", "peaked", "plain")


def test_the_quick_run_writes_a_row_for_everybody(tmp_path, capsys):
    sampling.main(["--quick", "--shapes", "flat", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"machine", "versions", "command", "rows", "ratios"} <= found.keys()
    assert len(found["rows"]) == 2 * (3 + 2 + 2)  # two dtypes; plain has two peers, top-k and top-p one each
    assert all(row["median_s"] > 0 for row in found["rows"])
    assert capsys.readouterr().out.count("\n") == len(found["rows"]) + 2


@pytest.mark.parametrize("limit", LIMITS)
def test_the_gate_passes_what_is_right_and_sees_what_is_not(limit):
    logits, how = sampling.make_logits(CASE, "cpu"), LIMITS[limit]
    tokens, logprobs = sampling.draw_ours(logits, how)
    assert sampling.fault(OURS, (tokens, logprobs), logits, how) == ""
    assert sampling.fault("a peer", sampling.draw_multinomial(logits, how), logits, how) == ""
    assert "log-probs are off" in sampling.fault(OURS, (tokens, logprobs + 1e-4), logits, how)
    logp = torch.log_softmax(logits.double(), -1)
    best = logp.argsort(-1, descending=True)
    # The next best token has another interval, and the least probable one is kept by neither limit.
    other = torch.where(tokens == best[:, 0], best[:, 1], best[:, 0])
    drawn = other, logp.gather(-1, other[:, None])[:, 0]
    assert "from where its random number lies" in sampling.fault(OURS, drawn, logits, how)
    drawn = best[:, -1], logp.gather(-1, best[:, -1:])[:, 0]
    assert ("may not be drawn" in sampling.fault(OURS, drawn, logits, how)) == (limit != "plain")


def test_ratios_are_those_of_the_medians():
    cases = [CASE, Case(4, 700, "fp32", "peaked", "top-k 50"), Case(4, 700, "bf16", "peaked", "plain")]
    rows = [
        {"case": str(cases[0]), "who": OURS, "median_s": 0.002},
        {"case": str(cases[0]), "who": "a peer", "median_s": 0.1},
        {"case": str(cases[1]), "who": OURS, "median_s": 0.003},
    ]
    assert sampling.ratios(rows, cases) == [
        {"case": str(cases[0]), "times_faster_than": {"a peer": 50.0}, "over_plain": None},
        {"case": str(cases[1]), "times_faster_than": {}, "over_plain": 1.5},
    ]

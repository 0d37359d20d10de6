"""The benchmark of attention: that it runs, and that its gate sees a wrong result."""

import json
import sys

import pytest
from conftest import ROOT

# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import attention
from benchmarks.attention import OURS, PEER, QUICK


def test_the_quick_run_writes_a_row_for_everybody(tmp_path, capsys):
    attention.main(["--quick", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"machine", "versions", "command", "rows", "times_faster"} <= found.keys()
    assert [row["who"] for row in found["rows"]] == 2 * len(QUICK) * [OURS, PEER]
    assert len(found["times_faster"]) == 2 * len(QUICK)
    assert capsys.readouterr().out.count("times as fast") == 2 * len(QUICK)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_gate_sees_a_wrong_number(case):
    found, expected = attention.our_run(case)(), attention.truth(case)
    assert attention.fault(found, expected, 1e-5) == ""
    for i, name in enumerate(("output", "dq", "dk", "dv")[: len(found)]):
        wrong = [part.clone() for part in found]
        wrong[i].view(-1)[-1] += 1e-4 * expected[i].abs().max()
        assert attention.fault(tuple(wrong), expected, 1e-5).startswith(f"{name} is off by")

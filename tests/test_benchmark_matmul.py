"""The benchmark of the matmul of few rows: that it runs, and that its gate sees a wrong product."""

import json
import sys

import torch
from conftest import ROOT

# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import matmul


def test_the_quick_run_writes_a_row_for_everybody(tmp_path, capsys):
    matmul.main(["--quick", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"machine", "versions", "command", "rows", "ratios"} <= found.keys()
    peers = 3 if torch.backends.mkldnn.is_available() else 2
    assert len(found["rows"]) == 2 * (1 + peers)
    assert capsys.readouterr().out.count("\n") == len(found["rows"]) + 2


def test_the_gate_passes_what_is_right_and_sees_what_is_not():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(3, 50).to(dtype), torch.randn(20, 50).to(dtype)
        for run in matmul.contenders(x, weight).values():
            product = run()
            assert matmul.fault(product, x, weight) == ""
            wrong = product.clone()
            wrong[1, 4] += 0.2
            assert "is off by" in matmul.fault(wrong, x, weight)


def test_the_ratio_is_the_peers_time_over_ours():
    rows = [{"case": "a", "who": who, "median_s": s} for who, s in ((matmul.OURS, 0.5), ("peer", 0.75))]
    assert matmul.ratios(rows) == [{"case": "a", "times_faster_than": {"peer": 1.5}}]

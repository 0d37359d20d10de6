"""The benchmarks of quantised layers: that they run, that wrong products and log-probs are seen."""

import json
import sys

import pytest
import torch
from conftest import ROOT

# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import adapters, int8


def test_int8_writes_who_takes_how_long(tmp_path):
    int8.main(["--quick", "--output", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["case"] for row in found["rows"]} == {"1 rows, 64x48", "3 rows, 64x48"}
    assert all(int8.EXACT in times for times in found["ratios"].values())


def test_a_wrong_product_is_seen_and_one_of_rounded_activations_is_borne_where_it_is_named():
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(7, 40).double()
    right = x.double() @ weight.t()
    off = right + 0.02 * (x.double().abs() @ weight.abs().t())
    assert int8.fault("a peer", right, x, weight) == ""
    assert "is off by 2.0e-02" in int8.fault("a peer", off, x, weight)
    assert int8.fault("a peer, rounds x", off, x, weight) == ""


@pytest.mark.slow
def test_adapters_times_both_and_refuses_wrong_logprobs(tmp_path, monkeypatch):
    adapters.main(["--quick", "--dtypes", "fp32", "--output", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["ratios"]) == {"fp32, rollout", "fp32, step", "fp32, iteration"}
    assert found["gate"][f"fp32: {adapters.OURS}"]["mean"] < 1e-5
    monkeypatch.setitem(adapters.BARS, "fp32", 0.0)
    with pytest.raises(SystemExit, match=r"recorded log-probs are off by .* not timed"):
        adapters.main(["--quick", "--dtypes", "fp32"])

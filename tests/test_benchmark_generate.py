"""The benchmark of generation: that it runs, that its gate sees wrong log-probs, that its counts are right."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import generate, generate_checks, generate_side, recompute, roofline
from benchmarks.generate_cases import Case, cases_of
from benchmarks.roofline import Rates, Shape
from benchmarks.step import write_model

TINY = Case("ragged", "tiny", "fp32", (3, 9, 1), (5, 5, 5), rows=2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "tiny")
    return str(folder)


def test_the_roofline_is_that_of_hand_counts():
    shape = Shape(hidden=2, layers=3, intermediate=4, vocabulary=5, element_bytes=4)
    assert (shape.body, shape.head) == (3 * (4 * 4 + 3 * 8), 10)
    read = roofline.prefill(shape, [3, 1])
    assert read.flops == 2 * 120 * 4 + 2 * 10 * 2 + 4 * 2 * 3 * (1 + 2 + 3 + 1)
    assert read.read_bytes == 130 * 4
    # Two steps for the first response, over contexts of 4 and 5 tokens; the second has all from the prefill.
    steps = roofline.decode(shape, [3, 1], [3, 1], rows=2)
    assert steps.flops == 2 * 130 * 2 + 4 * 2 * 3 * 9
    assert steps.read_bytes == 4 * (130 * 2 + 2 * 2 * 3 * 9)
    # Bound by FLOPs in the prefill and by bytes in the decode.
    rates = Rates(bytes_per_s=1000.0, flops_per_s=1168.0)
    assert roofline.floor_seconds(shape, rates, [3, 1], [3, 1], rows=2) == pytest.approx(1.0 + 1.472)


def test_rows_decide_how_often_the_weights_are_read():
    shape = Shape(hidden=2, layers=1, intermediate=2, vocabulary=3, element_bytes=2)
    weights = 2 * (shape.body + shape.head)
    few, many = (roofline.decode(shape, [1] * 8, [3] * 8, rows).read_bytes for rows in (2, 8))
    assert few - many == (8 - 2) * weights


def test_several_samples_read_a_prompt_once():
    shape = Shape(hidden=2, layers=1, intermediate=2, vocabulary=3, element_bytes=2)
    rates = Rates(1e9, 1.0)
    one, three = (roofline.floor_seconds(shape, rates, [50], [4], rows=9, samples=n) for n in (1, 3))
    assert three - one == pytest.approx(2 * roofline.decode(shape, [50], [4], rows=9).flops)


def test_blocks_are_shared_where_they_are_whole():
    case = Case("", "tiny", "fp32", (32, 20), (5, 30), rows=6, samples=3)
    # 32 + 5 - 1 tokens: 3 blocks, 2 of them common; 20 + 30 - 1: 4 blocks, 1 common.
    assert case.kv_blocks(is_shared=True) == (2 + 3 * 1) + (1 + 3 * 3)
    assert case.kv_blocks(is_shared=False) == 3 * 3 + 3 * 4


def test_lognormal_answers_differ_and_stay_in_their_limits():
    (case,) = cases_of("lognormal", "fp32", is_quick=False)
    counts = sorted(case.new_tokens)
    assert len(counts) == 256
    assert 4 <= counts[0] < 20
    assert 250 < counts[-1] <= 384
    assert 50 < counts[128] < 80


@pytest.mark.parametrize("name", generate_side.TITLES)
def test_every_contender_gives_the_log_probs_of_the_model(name, model_dir):
    samples = 2 if name in ("fastppo", "fastppo-repeated") else 1
    # Calls of as many prompts as rows are for answers of several lengths.
    counts = (5, 2, 4) if name.startswith("fastppo") else (5, 5, 5)
    case = Case("", "tiny", "fp32", (3, 9, 1), counts, 2, samples=samples)
    responses, logprobs = generate_side.contender(name, case.workload(model_dir))()
    hello = {"responses": responses, "logprobs": logprobs}
    gaps, fault = generate.verdict(SimpleNamespace(hello=hello), case, recompute.load(model_dir), generate.BARS)
    assert not fault
    assert (gaps == {}) == (name == "transformers-tokens")


def test_the_gate_sees_wrong_log_probs_and_wrong_lengths(model_dir):
    model = recompute.load(model_dir)
    responses, logprobs = generate_side.contender("fastppo", TINY.workload(model_dir))()

    def fault(responses, logprobs):
        side = SimpleNamespace(hello={"responses": responses, "logprobs": logprobs})
        return generate.verdict(side, TINY, model, generate.BARS)[1]

    assert fault(responses, logprobs) == ""
    off = [*logprobs[:2], [*logprobs[2][:4], logprobs[2][4] + 1e-4]]
    assert "log-probs are off by" in fault(responses, off)
    assert "other numbers of tokens" in fault([responses[0][:4], *responses[1:]], logprobs)


def test_the_quick_run_writes_the_whole_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "LLAMA", ROOT / ".venv-generate" / "is" / "not" / "here")
    path = tmp_path / "found.json"
    arguments = ["--quick", "--cases", "15m", "--dtypes", "fp32", "--peers", "llama.cpp", "--output", str(path)]
    generate.main(arguments)
    found = json.loads(path.read_text())
    assert {"machine", "versions", "command", "rows", "gate", "rates", "absent", "notes"} <= found.keys()
    (row,) = found["rows"]
    assert row["who"] == generate.OURS
    assert found["ratios"] == {row["case"]: {}}
    assert row["tokens_per_s"] == pytest.approx(15 / row["median_s"], rel=0.01)
    assert row["peak_bytes"] > 50e6
    assert 0 < row["roofline_share"] < 1
    assert found["gate"][row["case"]][row["who"]]["logprob_gap"]["max"] <= 5e-5
    assert len(found["absent"]) == 2
    assert all("make bench-peers" in reason for reason in found["absent"].values())
    assert row["who"] in capsys.readouterr().out


def test_ratios_are_those_of_the_medians():
    rows = [
        {"case": "a", "who": generate.OURS, "median_s": 0.5},
        {"case": "a", "who": "a peer", "median_s": 2.0},
        {"case": "b", "who": "a peer", "median_s": 2.0},
    ]
    assert generate.ratios(rows) == {"a": {"a peer": 4.0}}


def test_growth_leaves_the_warm_up_out_and_sees_a_leak():
    assert generate_checks.growth([0, 50, 100, 100, 100, 100, 101, 100, 100, 100]) < 30
    assert generate_checks.growth([5 * step for step in range(50)]) == 5 * 30


def test_live_tensors_are_counted():
    before = generate_checks.live_tensors()
    kept = [torch.zeros(1) for _ in range(7)]
    assert generate_checks.live_tensors() - before == len(kept)


def test_schedules_find_a_wrong_record(shared_path, monkeypatch):
    stories = shared_path("models/stories260k")
    found = generate_checks.run_schedules(stories, "fp32", 2)
    assert max(found["max"], found["update_max"]) <= 5e-5
    assert found["tokens"] > 50
    plain = recompute.logprobs
    monkeypatch.setattr(recompute, "logprobs", lambda *inputs: [each + 0.01 for each in plain(*inputs)])
    assert generate_checks.run_schedules(stories, "fp32", 1)["mean"] == pytest.approx(0.01, abs=1e-4)


def test_a_gguf_file_holds_the_model_with_its_rotation(model_dir, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is in .venv-generate alone, which `make bench-peers` makes")
    from safetensors.torch import load_file

    from benchmarks.peers import gguf_model

    gguf_model.write_gguf(generate.Path(model_dir), tmp_path / "model.gguf", "fp32")
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = load_file(f"{model_dir}/model.safetensors")
    assert len(written) == len(weights)
    value = weights["model.layers.1.mlp.up_proj.weight"].numpy()
    assert np.array_equal(written["blk.1.ffn_up.weight"].data, value)
    # llama.cpp rotates entries 2i and 2i + 1 together, transformers i and i + half.
    query = weights["model.layers.1.self_attn.q_proj.weight"].numpy().reshape(2, 2, 16, 64)
    rotated = written["blk.1.attn_q.weight"].data.reshape(2, 16, 2, 64)
    assert np.array_equal(rotated[:, :, 0], query[:, 0])
    assert np.array_equal(rotated[:, :, 1], query[:, 1])

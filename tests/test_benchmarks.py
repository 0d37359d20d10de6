"""The benchmark of the loss head: that it runs, that its gate sees what is wrong, that its ratios are right."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from tolerances import close

# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import head, head_contenders, head_gate, head_memory, head_problem, head_report, matmul_count, measure
from benchmarks.head_contenders import EVERYTHING, FLOOR, OURS, Contender
from benchmarks.head_problem import Case, Outputs

TINY = Case(vocabulary=331, tokens=60, hidden=20, sequences=3)


def judge(run, dtype="fp32", is_trained=True, who=OURS, objective=head_problem.PPO, gives=EVERYTHING):
    contender = Contender(who, gives, objective, run)
    problem = head_problem.make_problem(replace(TINY, dtype=dtype))
    verdicts = head_gate.run_gate([contender], problem, [is_trained], lambda line: None)
    return verdicts[who, is_trained]


def without_entropy_gradient(problem):
    logprobs, entropies = head_problem.logprobs_and_entropies(problem.hidden, problem.weight, problem.labels)
    return head_problem.descend(problem, head_problem.PPO, logprobs, entropies.detach())


def unclipped(problem):
    far = replace(problem, old_logprobs=head_problem.plain(problem).logprobs)
    problem.clear_gradients()
    return head_problem.plain(far)


def with_low_logprobs(problem):
    outputs = head_problem.plain(problem)
    return replace(outputs, logprobs=outputs.logprobs.bfloat16().float())


def with_a_wrong_weight_gradient(problem):
    outputs = head_problem.plain(problem)
    problem.weight.grad[problem.labels[0]] *= 1.01
    return outputs


def without_weight_gradient(problem):
    outputs = head_problem.plain(problem)
    problem.weight.grad = None
    return outputs


def with_nan(problem):
    outputs = head_problem.plain(problem)
    problem.hidden.grad[3, 3] = torch.nan
    return outputs


def with_the_loss_alone(problem):
    return Outputs(head_problem.plain(problem).loss)


WRONG = {
    without_entropy_gradient: "gradient",
    unclipped: "loss",
    with_low_logprobs: "logprobs",
    with_a_wrong_weight_gradient: "weight gradient",
    without_weight_gradient: "weight gradient",
    with_nan: "hidden gradient",
    with_the_loss_alone: "logprobs",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_the_gate_names_what_is_wrong(wrong):
    verdict = judge(wrong)
    assert not verdict.has_passed
    beyond = [name for name, multiple in verdict.multiples.items() if multiple > head_gate.BAR]
    assert any(WRONG[wrong] in name for name in beyond), beyond
    assert "fails" in str(verdict)


@pytest.mark.parametrize("dtype", head_problem.DTYPES)
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_the_gate_lets_ours_and_plain_torch_in_chunks_pass(dtype, is_trained):
    for run in (head_contenders.run_ours, head_contenders.run_checkpointed):
        verdict = judge(run, dtype, is_trained)
        assert verdict.has_passed, verdict
        assert ("weight gradient, max" in verdict.errors) == is_trained
        assert {"loss", "logprobs, rms", "entropies, max", "hidden gradient, rms"} <= verdict.errors.keys()


def test_the_gate_catches_what_bf16_hides():
    assert not judge(without_entropy_gradient, "bf16").has_passed
    assert not judge(unclipped, "bf16").has_passed


def test_whoever_gives_less_is_held_to_what_it_gives():
    def cross_entropy(problem):
        return Outputs(head_problem.plain(problem, head_problem.CROSS_ENTROPY).loss)

    arguments = {"who": "a peer", "objective": head_problem.CROSS_ENTROPY, "gives": "cross-entropy only, gradients"}
    assert judge(cross_entropy, **arguments).has_passed
    assert not judge(with_the_loss_alone, **arguments).has_passed


def test_an_error_of_a_peer_is_a_verdict_and_one_of_ours_is_raised():
    def broken(problem):
        raise RuntimeError("needs a newer device\nand more")

    verdict = judge(broken, who="a peer")
    assert not verdict.has_passed
    assert str(verdict) == "could not run: RuntimeError: needs a newer device"
    with pytest.raises(RuntimeError, match="needs a newer device"):
        judge(broken, who=OURS)


def test_the_truth_does_not_depend_on_its_chunks(monkeypatch):
    problem = head_problem.make_problem(TINY)
    whole = head_gate.quantities(*head_problem.truth(problem, head_problem.PPO))
    monkeypatch.setattr(head_problem, "TRUTH_BYTES", 17 * 8 * TINY.vocabulary)
    parts = head_gate.quantities(*head_problem.truth(problem, head_problem.PPO))
    assert len(whole) == 6
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, **close(torch.float64), msg=name)


def test_the_problem_clips_rows_of_both_signs_and_none_near_an_edge():
    problem = head_problem.make_problem(replace(TINY, tokens=600, sequences=30))
    ratio = torch.exp(head_problem.plain(problem).logprobs - problem.old_logprobs)
    up, down = (ratio > 1.2) & (problem.advantages > 0), (ratio < 0.8) & (problem.advantages < 0)
    assert up.any()
    assert down.any()
    assert 0.15 < (up | down).float().mean() < 0.35
    assert torch.minimum((ratio - 1.2).abs(), (ratio - 0.8).abs()).min() > 0.05


def row(case, who, median, gives=EVERYTHING, has_passed=True):
    return {"case": case, "who": who, "median_s": median, "gives": gives, "has_passed": has_passed}


def test_ratios_come_from_the_rows():
    rows = [
        row("a", OURS, 3.0),
        row("a", "wrong but fast", 1.0, has_passed=False),
        row("a", "fast but less", 1.5, gives="cross-entropy only, gradients"),
        row("a", "equal", 6.0),
        row("a", "slow", 9.0),
        row("a", "matmuls, whole", 2.5, gives=FLOOR),
        row("a", "matmuls, in our chunks", 2.0, gives=FLOOR),
        row("b", OURS, 1.0),
        row("b", "matmuls, whole", 4.0, gives=FLOOR),
        row("c", "equal", 1.0),
    ]
    first, second = head_report.ratios(rows)
    assert first.pop("ours_over") == {
        "wrong but fast": 3.0, "fast but less": 2.0, "equal": 0.5, "slow": 0.3333, "matmuls, whole": 1.2,
        "matmuls, in our chunks": 1.5,
    }  # fmt: skip
    assert second.pop("ours_over") == {"matmuls, whole": 0.25}
    assert first == {
        "case": "a", "floor_s": 2.0, "ours_over_floor": 1.5, "fastest_equal": "equal", "ours_over_fastest": 0.5,
    }  # fmt: skip
    assert second == {"case": "b", "floor_s": 4.0, "ours_over_floor": 0.25}


def test_turns_drop_what_others_disturbed_and_give_up():
    foreign = {"calm": iter([0.0, 0.5, 0.0]), "busy": iter([0.9] * 6)}
    sides = {who: lambda load=load: measure.Sample({"case": 1.0}, 0, next(load)) for who, load in foreign.items()}
    turns = measure.take_turns(sides, wanted=2, limit=0.12)
    assert (len(turns["calm"].samples), turns["calm"].dropped) == (2, 1)
    assert (len(turns["busy"].samples), turns["busy"].dropped) == (0, 6)


def test_who_has_no_clean_sample_is_named_and_nothing_is_concluded(tmp_path, monkeypatch, capsys):
    def take_turns(sides, wanted, limit):
        taken = {who: measure.Turns([take()]) for who, take in sides.items()}
        return taken | {OURS: measure.Turns([], dropped=3)}

    monkeypatch.setattr(measure, "take_turns", take_turns)
    memory = {"peak_bytes": 2, "extra_bytes": 1}
    monkeypatch.setattr(head_memory, "measure", lambda who, case: memory)
    path = tmp_path / "head.json"
    arguments = ["--quick", "--device", "cpu", "--dtypes", "fp32", "--heads", "frozen", "--samples", "1"]
    with pytest.raises(SystemExit, match="too few clean samples"):
        head.main([*arguments, "--output", str(path)])
    result = json.loads(path.read_text())
    (line,) = result["not_timed"]
    assert line.endswith(f"{OURS}: 3 samples, none clean")
    assert line in capsys.readouterr().out
    assert result["rows"]
    assert not result["ratios"]


def test_a_killed_run_leaves_the_cases_before_it(tmp_path, monkeypatch):
    def killed(rows, case):
        raise KeyboardInterrupt

    monkeypatch.setattr(head, "add_memory", killed)
    path = tmp_path / "head.json"
    with pytest.raises(KeyboardInterrupt):
        head.main(["--quick", "--device", "cpu", "--dtypes", "fp32", "--samples", "1", "--output", str(path)])
    result = json.loads(path.read_text())
    assert {row["case"] for row in result["rows"]} == result["flops"].keys()
    assert len(result["flops"]) == 1
    assert result["ratios"]


@pytest.mark.parametrize(("device", "waits"), [("cpu", 1), ("cuda", 0)])
def test_samples_repeat_everywhere_and_are_guarded_on_the_cpu(device, waits, monkeypatch):
    waited, asked = [], []
    monkeypatch.setattr(measure.ForeignLoad, "wait_for_idle", lambda self, limit, patience_s: waited.append(limit))

    def seconds_of(repeats):
        asked.append(repeats)
        return 0.01

    take = measure.sampler(seconds_of, "a", device, 0.12)
    sample = take()
    assert sample.seconds == {"a": 0.01}
    assert len(waited) == waits
    assert asked == [1, 1, {"cpu": 30, "cuda": 10}[device]]
    assert device == "cpu" or sample.foreign is None


def test_an_addmm_with_a_dtype_is_counted():
    shapes = [(3, 7), (3, 5), (5, 7)]
    parts = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with matmul_count.counting() as count:
        torch.addmm(*parts)
        torch.ops.aten.addmm.dtype(*parts, torch.float32)
    assert count.flops == 2 * 2 * 3 * 5 * 7


def test_the_bare_matmuls_are_those_of_the_head():
    problem = head_problem.make_problem(TINY)
    with matmul_count.counting() as count:
        head_contenders.bare_matmuls(problem, 7)(problem)
    assert count.flops == 3 * 2 * TINY.tokens * TINY.hidden * TINY.vocabulary


def test_the_quick_run_writes_the_whole_result(tmp_path, capsys):
    path = tmp_path / "head.json"
    head.main(["--quick", "--no-memory", "--device", "cpu", "--samples", "2", "--output", str(path)])
    result = json.loads(path.read_text())
    cases = {row["case"] for row in result["rows"]}
    assert len(cases) == 4
    for case in cases:
        here = {row["who"]: row for row in result["rows"] if row["case"] == case}
        assert OURS in here
        assert sum(row["gives"] == FLOOR for row in here.values()) == 2
        assert all(row["min_s"] <= row["median_s"] <= row["max_s"] for row in here.values())
        assert result["flops"][case]["units_of_2THV"] == pytest.approx(3 if "trained" in case else 2, abs=0.05)
        assert result["flops"][case]["is_complete"]
        assert result["flops"][case]["share_with_half_the_rows_weightless"] == pytest.approx(0.5, abs=0.01)
        assert set(result["gate"][case]) >= {OURS}
    assert {line["case"] for line in result["ratios"]} == cases
    assert OURS in capsys.readouterr().out


def test_memory_is_the_growth_of_a_process_of_its_own():
    # Full logits are 24 MB here, of which plain torch holds several copies; the gradients are far smaller.
    case = Case(vocabulary=6000, tokens=1000, hidden=8, sequences=10)
    full = next(one.who for one in head_contenders.standing() if "full logits" in one.who)
    found = head_memory.measure(full, case)
    assert found["gradient_bytes"] == 4 * (1000 * 8 + 6000 * 8)
    assert found["peak_bytes"] == found["gradient_bytes"] + found["extra_bytes"]
    assert 2 * 24e6 < found["extra_bytes"] < 10 * 24e6

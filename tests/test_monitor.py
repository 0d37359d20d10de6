"""The run folder: what is in it after a run, after a crash, after a resume, and what must never be in it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastppo.monitor import RunFolder, read_metrics
from fastppo.monitor.curve import draw_curve, smoothed
from fastppo.monitor.provenance import plain, redact_command

STATS = {"env/reward_mean": 0.5, "objective/kl": 1.25, "tokens/responses_len_mean": 12.0, "tokens/per_second": 800.0}


def new_folder(path: Path, **options) -> RunFolder:
    return RunFolder(path, **{"total_steps": 4, "arguments": {}, "console": False, **options})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sample(step: int) -> dict:
    return {"query": "naïve", "completion": "a\nb", "reward": torch.tensor(0.5), "step": step}


def test_a_run_leaves_every_file(tmp_path):
    with new_folder(tmp_path, arguments={"learning_rate": 1e-3}) as folder:
        for step in (1, 2):
            folder.step(STATS, [sample(step)])
        folder.held_out("before", [{"query": "q", "completion": "c", "reward": float("nan")}])
        folder.finish({"reward_after": 0.75, "worst": float("nan")})
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert lines(tmp_path / "samples.jsonl")[1] == {"query": "naïve", "completion": "a\nb", "reward": 0.5, "step": 2}
    assert lines(tmp_path / "held_out_before.jsonl") == [{"query": "q", "completion": "c", "reward": None}]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"reward_after": 0.75, "worst": None}
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["arguments"] == {"learning_rate": 1e-3}
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run["machine"]["cores"] >= 1
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_single_numbers_and_valid_json(tmp_path):
    stats = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "tensor": torch.tensor(2.0),
        "numpy": np.float64(3.0),
        "count": np.int64(4),
        "array": np.ones(3),
        "vector": torch.ones(3),
        "text": "no",
    }
    with new_folder(tmp_path) as folder:
        folder.step(stats, [])
        # On disk before the next step begins: a crash loses none of what is finished.
        assert read_metrics(tmp_path) == [
            {"step": 1, "nan": None, "inf": None, "tensor": 2.0, "numpy": 3.0, "count": 4}
        ]


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x0cb", "a\u2029b\x1cc"])
def test_a_resumed_run_keeps_samples_with_line_separators_in_them(tmp_path, text):
    with new_folder(tmp_path) as folder:
        folder.step(STATS, [{**sample(1), "completion": text}])
        folder.step(STATS, [{**sample(2), "completion": text}])
    with new_folder(tmp_path, start_step=1):
        pass
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["step"], row["completion"]) for row in rows] == [(1, text)]


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path):
    with new_folder(tmp_path) as folder:
        for step in (1, 2, 3):
            folder.step({"x": float(step)}, [sample(step)])
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "x"')  # the process died here
    with new_folder(tmp_path, start_step=2) as folder:
        folder.step({"x": 30.0}, [sample(3)])
    assert [(row["step"], row["x"]) for row in lines(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [1, 2, 3]


def test_the_folder_of_another_run_is_refused(tmp_path):
    with new_folder(tmp_path) as folder:
        folder.step(STATS, [])
    (tmp_path / "checkpoint-000001").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"another run.*output_dir.*resume_from.*overwrite"):
        new_folder(tmp_path)
    assert read_metrics(tmp_path), "a refusal must not touch the other run"
    new_folder(tmp_path, overwrite=True).close()
    assert not read_metrics(tmp_path)
    assert not (tmp_path / "checkpoint-000001").exists()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_run_that_did_no_step_is_no_obstacle(tmp_path):
    new_folder(tmp_path).close()
    new_folder(tmp_path).close()


@pytest.mark.skipif(sys.platform == "win32", reason="the lock is POSIX's")
def test_a_second_process_is_refused(tmp_path):
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
        "f.write('4242'); f.flush(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another run \(process 4242\).*output_dir"):
            new_folder(tmp_path)
        other.stdin.close()
    new_folder(tmp_path).close()


SECRETS = {
    "hub": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "openai": "sk-proj-abcdefghijklmnopqrstuv",
    "wandb": "0123456789abcdef0123456789abcdef01234567",
    "github": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "userinfo": "s3cretpassw0rd",
    "bearer": "eyJhbGciOiJIUzI1NiJ9.e30.abc",
    "named": "hunter2hunter2",
    "query": "qwertyuiop123",
    "flag": "plainvalue987",
}


def test_no_secret_reaches_a_file(tmp_path, monkeypatch):
    arguments = {
        "model": f"x {SECRETS['hub']} y",
        "nested": {"deep": [SECRETS["openai"], {"more": (SECRETS["wandb"],)}]},
        "reward": f"https://me:{SECRETS['userinfo']}@host/score?api_key={SECRETS['query']}&n=1",
        "headers": f"Authorization: Bearer {SECRETS['bearer']}",
        "tracker_kwargs": {"wandb": {"api_key": SECRETS["named"]}},
        "max_new_tokens": 32,
        "tokenizer_name": "gpt2",
    }
    command = ["fastppo", "ppo", "--hub_token", SECRETS["flag"], f"--note=see {SECRETS['github']}", "--max_steps", "3"]
    monkeypatch.setattr(sys, "argv", command)
    with new_folder(tmp_path, arguments=arguments) as folder:
        folder.step(STATS, [])
        folder.finish({"error": f"401 for {SECRETS['hub']}"})
    written = "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert {name for name, secret in SECRETS.items() if secret in written} == set()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["arguments"]["max_new_tokens"] == 32
    assert run["arguments"]["tokenizer_name"] == "gpt2"
    assert run["command"][-2:] == ["--max_steps", "3"]


def test_what_is_no_secret_stays():
    told = {"pad_token": "<pad>", "path": "runs/a/b", "sha": "0123abc", "url": "https://host/x?page=2", "f": sample}
    assert plain(told) == {**told, "f": f"{sample.__module__}:sample"}
    assert redact_command(["fastppo", "--max_new_tokens", "32"]) == ["fastppo", "--max_new_tokens", "32"]


def test_plain_lines_where_nobody_watches(tmp_path, capsys):
    with new_folder(tmp_path, console=True) as folder:
        folder.step(STATS, [])
        folder.step({**STATS, "env/reward_mean": float("nan")}, [])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/4")
    assert "reward  0.500" in first
    assert "KL  1.25" in first
    assert first.endswith("left")
    assert "reward      -" in second


def test_one_live_line_on_a_terminal(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    with new_folder(tmp_path, console=True) as folder:
        folder.step(STATS, [])
        folder.step(STATS, [])
    shown = terminal.getvalue()
    assert shown.count("\n") == 1
    assert shown.endswith("\n")
    assert [len(line) for line in shown.rstrip("\n").split("\r")[1:]] == [39, 39]


def test_a_curve_can_be_drawn_of_anything(tmp_path):
    few = [{"step": 1, **STATS}]
    many = [{"step": i, **STATS, "ppo/val/var_explained": -1e9 if i == 1 else 0.5} for i in range(1, 60)]
    pictures = []
    for name, rows in {
        "none": [{"step": 1}],
        "nulls": [{"step": 1, "objective/kl": None}],
        "few": few,
        "many": many,
    }.items():
        draw_curve(rows, tmp_path / f"{name}.png")
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 3


def test_smoothing_keeps_a_line_and_its_length():
    line = [2.0 * i for i in range(10)]
    assert smoothed(line, 3)[1:-1] == pytest.approx(line[1:-1])
    assert len(smoothed(line, 5)) == 10

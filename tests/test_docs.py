"""What a user reads first runs: the README's blocks; and it names everything that is public."""

import contextlib
import io
import re
import runpy
import warnings
from pathlib import Path

import pytest

import fastppo

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    scope: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), scope)
    before, after = (float(number) for number in printed.getvalue().split("->"))
    assert after > before
    assert "objective/kl" in scope["stats"]


def test_environment_blocks_run(capsys):
    page = (Path(__file__).parents[1] / "docs" / "environments.md").read_text(encoding="utf-8")
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "environments.md", "exec"), scope)
    assert len(scope["histories"]) == 4
    assert "12+30=" in capsys.readouterr().out


def test_readme_names_every_public_name():
    assert [name for name in fastppo.__all__ if f"`{name}`" not in README] == []


def test_readme_links_exist():
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (root / link).exists()] == []


CALCULATOR = Path(__file__).parents[1] / "examples" / "calculator.py"


def test_calculator_example_runs():
    main = runpy.run_path(str(CALCULATOR), run_name="example")["main"]
    result = main(["--demonstrations=64", "--batch_size=8", "--max_steps=2", "--held_out=8"])
    assert 0 <= result["before"] <= 1
    assert 0 <= result["after"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_calculator_is_learned(seed):
    result = runpy.run_path(str(CALCULATOR), run_name="example")["main"]([f"--seed={seed}"])
    assert result["before"] < 0.3
    assert result["after"] > 0.8


def test_the_page_about_rewards_runs(tmp_path, monkeypatch):
    import tiny
    from reward_servers import server

    from fastppo import PPOConfig, PPOTrainer

    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    trainer = PPOTrainer(PPOConfig(batch_size=3), tiny.with_value_head(model), tokenizer=tokenizer)
    scope = {"trainer": trainer, "model": model, "tokenizer": tokenizer}
    with server() as served, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"left \d of 3 responses")  # one row has no answer
        scope["url"] = served.url
        for block in blocks:
            exec(compile(block, "rewards.md", "exec"), scope)
        assert set(served.requests[0]) == {"prompts", "completions", "columns"}
    assert trainer.current_step == 8
    assert [len(texts) for texts in scope["texts"]] == [2, 2]

"""The demo: its table, and the whole of it at a small size."""

import json
from pathlib import Path

import pytest

from fastppo.demo import run
from fastppo.demo.table import side_by_side

# Large enough for a model that tells the tones apart, small enough for a test.
SIZES = run.Sizes(
    reviews=1_200, pairs=320, held_out_pairs=64, prompts=256, held_out_prompts=64, max_steps=8, batch_size=32
)
NUMBERS = {
    "reward_before",
    "reward_after",
    "reward_std_before",
    "kl",
    "seconds",
    "distinct_2_before",
    "distinct_2_after",
    "length_before",
    "length_after",
    "reward_model_accuracy",
}
FILES = {
    "held_out_after.jsonl",
    "held_out_before.jsonl",
    "language_model/model.safetensors",
    "learning_curve.png",
    "metrics.jsonl",
    "model.safetensors",
    "reward_model/model.safetensors",
    "run.json",
    "samples.jsonl",
    "tokenizer.json",
}


def row(query: str, completion: str, reward: float) -> dict[str, object]:
    return {"query": query, "completion": completion, "reward": reward}


@pytest.mark.parametrize("width", [60, 79, 120])
def test_the_table_shows_every_word_once_and_keeps_to_the_width(width: int):
    words = [f"word{i}" for i in range(40)]
    before, after = (
        [row("What is it?", " " + " ".join(words[:15]), -1.25)],
        [row("What is it?", " ".join(words[15:]), 2)],
    )
    lines = side_by_side(before, after, width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0] == "What is it?"
    assert "before (reward -1.25)" in lines[1]
    assert "after (reward +2.00)" in lines[1]
    assert sorted(" ".join(lines[2:]).split()) == sorted(words)


def test_the_table_refuses_samples_of_different_prompts():
    with pytest.raises(ValueError, match="different prompts"):
        side_by_side([row("a", "x", 0.0)], [row("b", "x", 0.0)], 79)


def test_held_out_prompts_occur_nowhere_else():
    sizes = run.Sizes(prompts=64, held_out_prompts=32)
    training, held_out = run._prompts(0, sizes, set())
    taken = set(held_out[:10])
    training, remaining = run._prompts(0, sizes, taken)
    assert len(held_out) == len(set(held_out)) == len(remaining) == 32
    assert not set(remaining) & (taken | set(training))


@pytest.mark.slow
def test_the_demo_improves_a_model_and_says_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = run.main(tmp_path, seed=1, sizes=SIZES)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {name for name in NUMBERS if isinstance(summary[name], float)} == NUMBERS
    assert set(summary["parts_seconds"]) == {"corpus", "sft", "reward_model", "ppo"}
    assert sum(summary["parts_seconds"].values()) <= summary["seconds"]
    assert not [name for name in FILES if not (tmp_path / name).is_file()]
    assert summary["reward_after"] > summary["reward_before"]
    shown = capsys.readouterr().out
    before = json.loads((tmp_path / "held_out_before.jsonl").read_text().splitlines()[0])
    assert before["query"].split()[0] in shown
    assert "learning_curve.png" in shown

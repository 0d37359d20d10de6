"""`fastppo sft` and `fastppo reward`: from a file of rows to a model in a folder that the other commands take."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastppo.cli import main
from fastppo.reward_models import ModelReward

QUIET = ["--disable_tqdm", "true", "--save_strategy", "no", "--use_cpu", "true", "--report_to", "none"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny model, texts, and pairs."""
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    texts = [{"prompt": f"w{i}", "completion": " w5 w6 w7"} for i in range(8, 20)]
    pairs = [{"prompt": f"w{i} w{j}", "chosen": " w3", "rejected": " w4"} for i in range(8, 12) for j in range(20, 24)]
    for name, rows in (("texts", texts), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sft_teaches_a_model_by_a_file(here, capsys):
    (here / "sft.yaml").write_text("learning_rate: 0.02\nper_device_train_batch_size: 4\npacking: true\n")
    arguments = ["--model_name_or_path", "base", "--dataset_name", "texts.jsonl", "--output_dir", "out", *QUIET]
    more = ["--config", "sft.yaml", "--max_steps", "25", "--eval_size", "2", "--max_seq_length", "16"]
    assert main(["sft", *arguments, *more]) == 0
    printed = capsys.readouterr().out
    assert "held out: eval_loss" in printed
    assert "fastppo generate --model_name_or_path out" in printed
    assert json.loads(Path("out/eval_results.json").read_text())["eval_loss"] < 1.5  # 3.7 by chance
    model = AutoModelForCausalLM.from_pretrained("out")
    written = model.generate(torch.tensor([[9]]), do_sample=False, max_new_tokens=4)
    assert written[0].tolist() == [9, 5, 6, 7, 2]
    assert main(["sft", *arguments]) == 2
    assert "out holds a model already (config.json); add --overwrite" in capsys.readouterr().err


def test_reward_trains_a_model_that_a_run_can_be_scored_with(here, capsys):
    arguments = ["--model_name_or_path", "base", "--dataset_name", "pairs.jsonl", "--output_dir", "rm", *QUIET]
    assert main(["reward", *arguments, "--max_steps", "20", "--learning_rate", "2e-2", "--eval_size", "4"]) == 0
    assert "eval_accuracy 1" in capsys.readouterr().out
    reward = ModelReward(AutoModelForSequenceClassification.from_pretrained("rm"), tiny.tokenizer())
    good, bad = reward(["w15 w16"] * 2, [" w3", " w4"]).tolist()
    assert good > bad


def test_a_model_of_another_kind_is_replaced_wholly(here):
    arguments = ["sft", "--model_name_or_path", "base", "--dataset_name", "texts.jsonl", "--output_dir", "out", *QUIET]
    assert main([*arguments, "--max_steps", "1", "--use_peft", "true"]) == 0
    assert main([*arguments, "--max_steps", "1", "--overwrite"]) == 0
    assert {file.name for file in Path("out").glob("*.safetensors")} == {"model.safetensors"}
    assert not Path("out", "adapter_config.json").exists()  # transformers would load the old adapter on the old base


@pytest.mark.slow
def test_both_train_adapters_on_a_quantised_base(here):
    pytest.importorskip("bitsandbytes")
    for command, data in (("sft", "texts.jsonl"), ("reward", "pairs.jsonl")):
        arguments = ["--model_name_or_path", "base", "--dataset_name", data, "--output_dir", command, *QUIET]
        assert main([command, *arguments, "--max_steps", "1", "--use_peft", "true", "--load_in_8bit", "true"]) == 0
        assert Path(command, "adapter_model.safetensors").is_file()
    assert json.loads(Path("reward/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


WRONG = {
    "no such file": (["sft", "--dataset_name", "none.jsonl"], "there is no file none.jsonl"),
    "no such model": (
        ["sft", "--model_name_or_path", "./none", "--dataset_name", "texts.jsonl"],
        "no directory ./none",
    ),
    "rows of another kind": (["reward", "--dataset_name", "texts.jsonl"], "expected texts or chats in `chosen`"),
    "pairs for sft": (["sft", "--dataset_name", "pairs.jsonl"], "expected a text in 'text'"),
    "a misspelt flag": (["sft", "--dataset_name", "texts.jsonl", "--packin", "true"], "did you mean --packing?"),
    "8 bits trained themselves": (["sft", "--dataset_name", "texts.jsonl", "--load_in_8bit", "true"], "add --use_peft"),
    "a type": (["sft", "--dataset_name", "texts.jsonl", "--dtype", "f32"], "dtype must be one of float32"),
    "held out too many": (
        ["sft", "--dataset_name", "texts.jsonl", "--eval_size", "12"],
        "eval_size must be from 0 to 11",
    ),
    "no length": (
        ["sft", "--dataset_name", "texts.jsonl", "--max_seq_length", "0"],
        "max_seq_length must be at least 1",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_nonsense_is_answered_in_words(here, capsys, arguments, message):
    model = [] if "--model_name_or_path" in arguments else ["--model_name_or_path", "base"]
    assert main([*arguments, *model, "--output_dir", "out", *QUIET]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out", "config.json").exists()

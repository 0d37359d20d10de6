"""The command line: what it writes, what it answers to nonsense, and how it ends when it is told to."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo.cli import main
from fastppo.cli.arguments import parse_dataclasses
from fastppo.cli.loading import load_reward, load_tokenizer
from fastppo.cli.train import PPOArguments, make_trainer
from fastppo.config import PPOConfig

WORDS = ["<s>", "</s>", "<pad>", *"abcdefghijklmnop"]
ROWS = [
    {"prompt": f"{a} {b}", "label": i} for i, (a, b) in enumerate(zip(WORDS[3:], WORDS[4:] + WORDS[3:4], strict=False))
]

REWARD = """
import os, signal

def share_of_a(prompts, completions, label):
    assert all(isinstance(number, int) for number in label)
    return [completion.count("a") / 6 for completion in completions]

def interrupted(where, number):
    '''Send this process a signal in the middle of its second rollout or update.'''
    import fastppo.engine.engine as engine, fastppo.trainers.ppo as ppo
    owner, name = (engine.PagedDecoder, "step") if where == "rollout" else (ppo, "optimise")
    real, calls = getattr(owner, name), []
    def wrapped(first, *args, **kwargs):
        calls.append(first)
        # Each rollout has a decoder of its own, and the first one is that of the held-out prompts.
        is_second_rollout = len(set(map(id, calls))) == 3 and calls.count(first) == 2
        if is_second_rollout if where == "rollout" else len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(first, *args, **kwargs)
    setattr(owner, name, wrapped)
    return share_of_a

if "INTERRUPT" in os.environ:
    share_of_a = interrupted(os.environ["INTERRUPT"], int(os.environ["SIGNAL"]))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model, prompts and a reward."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **ids))
    model.save_pretrained(folder / "model")
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "cli_test_reward.py").write_text(REWARD)
    (folder / "run.yaml").write_text(
        "model_name_or_path: model\ndataset_name: prompts.jsonl\nreward: cli_test_reward.py:share_of_a\n"
        "max_new_tokens: 6\nmin_new_tokens: 6\nbatch_size: 8\nlearning_rate: 1e-2\nmax_steps: 2\nppo_epochs: 2\n"
    )
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return workplace


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    """The folder of a run of two steps."""
    before = os.getcwd()
    os.chdir(workplace)
    try:
        command = ["ppo", "--config", "run.yaml", "--output_dir", "two", "--eval_size", "4", "--save_every", "1"]
        assert main(command) == 0
    finally:
        os.chdir(before)
    return workplace / "two"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_folder(finished):
    assert [row["step"] for row in metrics(finished)] == [1, 2]
    assert "ppo/mean_scores" in metrics(finished)[0]
    summary = json.loads((finished / "summary.json").read_text())
    assert {"reward_before", "reward_after", "kl", "distinct_2_before", "seconds"} <= set(summary)
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    sample = json.loads((finished / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"query", "completion", "reward", "step"}
    run = json.loads((finished / "run.json").read_text())
    assert run["arguments"]["learning_rate"] == 1e-2
    assert run["arguments"]["dataset_name"] == "prompts.jsonl"
    assert LlamaForCausalLM.from_pretrained(finished).config.vocab_size == len(WORDS)


def test_a_flag_overrides_the_file_and_a_second_run_needs_its_own_folder(here, finished, capsys):
    assert main(["ppo", "--config", "run.yaml", "--output_dir", "two", "--max_steps", "3"]) == 2
    assert "another run" in capsys.readouterr().err
    again = ["ppo", "--config", "run.yaml", "--output_dir", "three", "--max_steps", "3", "--eval_size", "4"]
    assert main([*again, "--resume_from", "two/checkpoint-000002"]) == 0
    assert [row["step"] for row in metrics(here / "three")] == [3]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, about a name that peft calls
def test_an_adapter_is_trained_and_talked_to(here, capsys):
    peft = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    assert main(["ppo", "--config", "run.yaml", "--output_dir", "adapter", "--max_steps", "1", *peft]) == 0
    config = json.loads((here / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (2, ["q_proj", "v_proj"])
    capsys.readouterr()
    talk = ["generate", "--model_name_or_path", "adapter", "--max_new_tokens", "5", "--prompt", "a b", "--n", "3"]
    assert main([*talk, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert len(first.splitlines()) == 3
    assert main([*talk, "--seed", "1"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("where", "number", "code"),
    [("rollout", signal.SIGINT, 130), ("update", signal.SIGINT, 130), ("update", signal.SIGTERM, 143)],
)
def test_an_interrupted_run_saves_the_last_finished_step(workplace, finished, where, number, code):
    # A rollout is left at once, an update is finished first.
    output, steps = f"{where}-{code}", 1 if where == "rollout" else 2
    command = [sys.executable, "-m", "fastppo", "ppo", "--config", "run.yaml", "--output_dir", output]
    command += ["--eval_size", "4", "--max_steps", "50"]
    environment = {**os.environ, "INTERRUPT": where, "SIGNAL": str(int(number))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert f"interrupted after step {steps} of 50" in done.stderr
    assert output in done.stderr
    assert "Traceback" not in done.stderr
    folder = workplace / output
    assert [row["step"] for row in metrics(folder)] == list(range(1, steps + 1))
    assert json.loads((folder / "summary.json").read_text())["steps"] == steps
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    saved = load_file(folder / "model.safetensors")
    expected = load_file(finished / f"checkpoint-00000{steps}" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


ROOT = str(Path(__file__).resolve().parents[1])

WRONG = {
    "no such command": (["pppo"], "did you mean ppo"),
    "misspelt flag": (["ppo", "--config", "run.yaml", "--learning_rat", "1"], "did you mean --learning_rate"),
    "missing flag": (["ppo", "--dataset_name", "prompts.jsonl"], "--model_name_or_path"),
    "wrong type": (["ppo", "--config", "run.yaml", "--batch_size", "many"], "'many'"),
    "wrong value": (["ppo", "--config", "run.yaml", "--kl_penalty", "k9"], "k9"),
    "left over": (["ppo", "--config", "run.yaml", "--seed", "1", "2"], "'2'"),
    "misspelt key": (["ppo", "--config", "misspelt.yaml"], "did you mean temperature"),
    "key of the wrong type": (["ppo", "--config", "wrong.yaml"], "'hot'"),
    "not YAML": (["ppo", "--config", "broken.yaml"], "broken.yaml"),
    "no file of flags": (["ppo", "--config", "absent.yaml"], "absent.yaml"),
    "no data": (["ppo", "--config", "run.yaml", "--dataset_name", "absent.jsonl"], "absent.jsonl"),
    "no column": (["ppo", "--config", "run.yaml", "--query_column", "question", "--output_dir", "x"], "question"),
    "no reward module": (["ppo", "--config", "run.yaml", "--reward", "absent_module:f"], "absent_module"),
    "no reward function": (
        ["ppo", "--config", "run.yaml", "--reward", "cli_test_reward.py:share_of_b"],
        "did you mean share_of_a",
    ),
    "no reward at all": (
        ["ppo", "--model_name_or_path", "model", "--dataset_name", "prompts.jsonl"],
        "nothing says what is good: set reward to module:function",
    ),
    "no reward adapter": (
        ["ppo", "--config", "run.yaml", "--reward_adapter", "./absent"],
        "there is no directory ./absent",
    ),
    "no reward form": (["ppo", "--config", "run.yaml", "--reward", "share_of_a"], "module:function"),
    "no room to evaluate": (["ppo", "--config", "run.yaml", "--eval_every", "2"], "eval_size"),
    "8 bits without adapter": (["ppo", "--config", "run.yaml", "--load_in_8bit"], "--use_peft"),
    "no dictionary": (["ppo", "--config", "run.yaml", "--tracker_kwargs", "5"], "JSON object"),
    "no model": (["generate", "--model_name_or_path", "./absent", "--prompt", "a"], "there is no directory ./absent"),
    "no model to train": (
        ["ppo", "--config", "run.yaml", "--model_name_or_path", "a/b/c"],
        "there is no directory a/b",
    ),
    "no such type": (["ppo", "--config", "run.yaml", "--dtype", "fp8"], "float32, bfloat16, float16, auto, fp32"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_nonsense_is_answered_in_words(here, capsys, arguments, message):
    (here / "misspelt.yaml").write_text("temprature: 1\n")
    (here / "wrong.yaml").write_text("temperature: hot\n")
    (here / "broken.yaml").write_text("a: [1,\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    with pytest.raises(Exception, match=r".+"):
        main([*arguments, "--traceback"])


@pytest.mark.parametrize(("given", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32), ("auto", None)])
def test_the_type_of_the_weights_has_short_names_too(here, given, dtype):
    options = PPOArguments("model", "prompts.jsonl", ["x"], dtype=given)
    options.check()
    trainer = make_trainer(options, PPOConfig(batch_size=8))
    assert trainer.model.pretrained_model.dtype == (dtype or torch.float32)


def test_an_empty_list_in_the_file_leaves_the_default(here):
    (here / "empty.yaml").write_text("model_name_or_path: m\ndataset_name: d\nreward: [a:b, c:d]\nstop_strings: []\n")
    (options,) = parse_dataclasses("fastppo ppo", [PPOArguments], ["--config", "empty.yaml"])
    assert (options.stop_strings, options.reward) == ([], ["a:b", "c:d"])


def test_an_adapter_whose_base_is_gone_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "./gone"}')
    with pytest.raises(ValueError, match=r"there is no directory ./gone .* the base model of the adapter in"):
        load_tokenizer(str(tmp_path))


def test_inspect_says_how_a_model_is_run(workplace, capsys):
    assert main(["inspect", "--model_name_or_path", str(workplace / "model")]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["model type"] == "llama (LlamaForCausalLM)"
    assert rows["context length"] == "32 tokens"
    assert rows["generation"].startswith("tier A")
    assert rows["training"] == "packed"
    assert rows["cache"] == "128 bytes a token"
    assert rows["decode step"] == "one call of C++ for the body"
    assert main(["inspect", "--model_name_or_path", "./absent"]) == 2
    assert "there is no directory ./absent" in capsys.readouterr().err


def test_every_field_is_a_flag_and_has_a_text(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ppo", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    names = [*PPOArguments.__dataclass_fields__, *PPOConfig.__dataclass_fields__]
    assert [name for name in names if f"--{name}" not in shown] == []
    assert "Adapt the KL coefficient" in " ".join(shown.split())


def test_the_first_screen_and_the_environment(capsys):
    assert main(["--help"]) == 0
    assert "fastppo COMMAND" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert main(["env"]) == 0
    assert f"- torch: {torch.__version__.split('+')[0]}" in capsys.readouterr().out


def test_a_fault_inside_a_reward_module_is_not_hidden(here):
    (here / "faulty_reward.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_reward("faulty_reward:f")


def test_inspect_compares_a_quantised_model_with_its_base(workplace, capsys):
    (workplace / "texts.jsonl").write_text('{"text": "a b c d"}\n{"text": "p o"}\n')
    given = ["inspect", "--model_name_or_path", str(workplace / "model"), "--texts", str(workplace / "texts.jsonl")]
    assert main([*given, "--load_in_8bit", "true"]) == 0
    shown = capsys.readouterr().out
    assert "4 tokens of 2 texts" in shown
    mean, largest = (float(word) for word in shown.split("off by ")[1].split(" at most")[0].split(" in the mean, "))
    assert 0 < mean <= largest < 0.05
    assert main(given) == 2
    assert "add load_in_8bit or _4bit" in capsys.readouterr().err
    assert main([*given, "--load_in_8bit", "true", "--text_column", "body"]) == 2
    assert "has no column 'body', only ['text']" in capsys.readouterr().err


def test_a_reward_adapter_is_a_reward_by_itself(here, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    judge = LlamaForSequenceClassification.from_pretrained("model", num_labels=1)
    get_peft_model(judge, LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)).save_pretrained("judge")
    given = ["--model_name_or_path", "model", "--dataset_name", "prompts.jsonl", "--reward_adapter", "./judge"]
    given += ["--use_peft", "true", "--max_steps", "1", "--batch_size", "8", "--mini_batch_size", "8"]
    assert main(["ppo", *given, "--max_new_tokens", "4", "--output_dir", "judged"]) == 0
    config = json.loads((here / "judged" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} >= {"q_proj", "down_proj"}
    metrics = [json.loads(line) for line in (here / "judged" / "metrics.jsonl").read_text().splitlines()]
    assert any(value for row in metrics for name, value in row.items() if "reward" in name or "score" in name)

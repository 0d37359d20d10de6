"""Rewards on the command line: servers, models and functions, their weights and policies, and secrets in URLs."""

import json
import sys

import pytest
import tiny
import torch
from reward_servers import server
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastppo.cli import main
from fastppo.cli.loading import load_reward
from fastppo.rewards import ModelReward, RewardPolicy, URLReward

SECRETS = ["hunter2hunter2", "h00k-path", "qu3ry"]
SETTINGS = ["--max_new_tokens=4", "--batch_size=4", "--max_steps=1", "--ppo_epochs=1", "--query_column=text"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with a policy, a classifier, prompts and a reward function."""
    folder = tmp_path_factory.mktemp("workplace")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=tiny.VOCABULARY, num_labels=2, pad_token_id=0, initializer_range=0.5, **sizes)
    )
    for name, model in (("model", tiny.llama()), ("classifier", classifier)):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": f"w{5 + i}"}) + "\n" for i in range(8)))
    (folder / "judge.py").write_text(
        "def words(completions):\n    return [len(text.split()) for text in completions]\n"
        "def fails(completions):\n    raise LookupError('no such film')\n"
    )
    return folder


def run(*flags):
    return main(["ppo", "--model_name_or_path", "model", "--dataset_name", "prompts.jsonl", *SETTINGS, *flags])


def test_a_server_a_model_and_a_function_with_weights(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with server(otherwise=lambda request: {"scores": [7.0] * len(request["completions"])}) as served:
        url = f"{served.url.replace('//', f'//me:{SECRETS[0]}@')}/{SECRETS[1]}?sig={SECRETS[2]}"
        flags = ["--output_dir", "run", "--reward", url, "classifier", "judge.py:words"]
        monkeypatch.setattr(sys, "argv", ["fastppo", "ppo", *flags])
        assert run(*flags, "--reward_weights", "1", "0", "0.5", "--reward_batch_size", "2") == 0
        assert [len(request["completions"]) for request in served.requests] == [2, 2]
        assert served.paths[0] == f"/{SECRETS[1]}?sig={SECRETS[2]}"
    stats = json.loads((workplace / "run" / "metrics.jsonl").read_text())
    lines = (workplace / "run" / "samples.jsonl").read_text().splitlines()
    words = [len(json.loads(line)["completion"].split()) for line in lines]
    assert stats["env/reward_mean"] == pytest.approx(7.0 + 0.5 * sum(words) / 4)
    shown = capsys.readouterr()
    written = "".join(path.read_text() for path in (workplace / "run").glob("*.json*")) + shown.out + shown.err
    assert [secret for secret in SECRETS if secret in written] == []
    assert "URLReward(http://127.0.0.1" in written


@pytest.mark.slow
def test_what_an_error_means_is_a_flag(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    failing = ["--reward", "judge.py:fails", "--overwrite", "--output_dir"]
    assert run(*failing, "zeros", "--reward_on_error", "-1.5") == 0
    assert json.loads((workplace / "zeros" / "metrics.jsonl").read_text())["env/reward_mean"] == -1.5
    with pytest.warns(UserWarning, match="0 of 4 responses"):
        assert run(*failing, "dropped", "--reward_on_error", "drop", "--max_skipped_steps", "2") == 2
    assert "2 batches in a row had too few scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "judge.py:words", "--reward_on_error", "ignore"], "on_error must be 'raise', 'drop' or a finite"),
        (["--reward", "judge.py:words", "--reward_timeout", "0"], "timeout must be greater than 0"),
        (["--reward", "judge.py:words", "--reward_min_valid", "2"], "reward_min_valid must be a share from 0 to 1"),
        (["--reward", "./absent"], "there is no directory ./absent"),
        (["--reward", "judge.py"], "reward must be module:function, file.py:function, a URL, or the directory"),
        (["--reward", "http://"], "a reward's URL must be http"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(workplace, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(workplace)
    assert run(*flags, "--output_dir", "refused") == 2
    assert message in capsys.readouterr().err


def test_names_are_loaded_as_what_they_are(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    remote = load_reward("HTTPS://me:pw@host:8000/x", RewardPolicy(on_error="drop", batch_size=3), 5.0)
    assert isinstance(remote, URLReward)
    assert (str(remote), remote.timeout) == ("URLReward(https://host:8000)", 5.0)
    assert (remote.reward_policy.on_error, remote.reward_policy.batch_size) == ("drop", 3)
    assert load_reward("http://host").reward_policy.on_error == "raise"
    assert isinstance(load_reward("classifier"), ModelReward)
    assert load_reward("judge.py:words")(["a b"]) == [2]

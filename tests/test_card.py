"""The card of a trained model: what it says, and that it goes up only with a push that was asked for."""

from pathlib import Path

import huggingface_hub
import pytest
import tiny
from huggingface_hub import ModelCard

from fastppo import PPOConfig, PPOTrainer

CONFIG = {"batch_size": 4, "mini_batch_size": 2, "learning_rate": 3e-4, "seed": 7}


def make(name_or_path=""):
    model = tiny.with_value_head(tiny.llama())
    model.pretrained_model.config._name_or_path = name_or_path
    return PPOTrainer(PPOConfig(**CONFIG), model, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("base", ["gpt2", "someone/their-model"])
def test_a_card_says_what_was_trained_and_how(tmp_path, base):
    trainer = make(base)
    trainer.create_model_card(tmp_path, "me/mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base
    assert {"fastppo", "ppo"} <= set(card.data.tags)
    assert "# me/mine" in card.text
    assert "- learning_rate: 0.0003" in card.text
    assert "- seed: 7" in card.text
    assert "vf_coef" not in card.text, "as by default"
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in card.text


def test_a_path_of_this_machine_is_not_told(tmp_path):
    trainer = make(str(tmp_path))
    trainer.create_model_card(tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "base_model" not in text


def test_a_push_takes_the_card_along(monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options["private"]))

        def upload_folder(self, repo_id, folder_path):
            files = {path.name for path in Path(folder_path).iterdir()}
            calls.append((repo_id, files, Path(folder_path, "README.md").read_text()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    make("gpt2").push_to_hub("me/mine", private=True)
    (created, (repo_id, files, card)) = calls
    assert created == ("create", "me/mine", True)
    assert repo_id == "me/mine"
    assert {"config.json", "model.safetensors", "README.md"} <= files
    assert ModelCard(card).data.base_model == "gpt2"

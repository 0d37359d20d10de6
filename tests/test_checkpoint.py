"""Checkpoints of optimisers that count in plain numbers: they go on where they were."""

import pytest
import torch
from transformers import Adafactor

from fastppo.checkpoint import load_checkpoint, save_checkpoint


class Network(torch.nn.Linear):
    """The part of a model that a checkpoint asks for."""

    is_peft_model = False
    critic = None

    def save_pretrained(self, directory):
        from safetensors.torch import save_file

        save_file(self.state_dict(), directory / "model.safetensors")


def network(make_optimizer):
    torch.manual_seed(0)
    model = Network(4, 3)
    return model, make_optimizer(model.parameters())


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 1.0 + step)).square().sum().backward()
        optimizer.step()


class Counting(torch.optim.SGD):
    """Keeps one entry of its own for each parameter."""

    kept: object = None

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["kept"] = self.kept


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: Adafactor(parameters, lr=0.1, relative_step=False, scale_parameter=False),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    ],
    ids=["Adafactor", "AdamW"],
)
def test_an_optimiser_goes_on_as_if_nothing_had_happened(tmp_path, make_optimizer):
    model, optimizer = network(make_optimizer)
    train(model, optimizer, 3)
    save_checkpoint(tmp_path / "checkpoint-000003", model, None, optimizer, {})
    train(model, optimizer, 3, start=3)
    other, resumed = network(make_optimizer)
    load_checkpoint(tmp_path / "checkpoint-000003", other, resumed, lambda state: None)
    train(other, resumed, 3, start=3)
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize("kept", [3, 0.5, None, True])
def test_plain_values_come_back_as_they_were(tmp_path, kept):
    model, optimizer = network(lambda parameters: Counting(parameters, lr=0.1))
    optimizer.kept = kept
    optimizer.step()
    save_checkpoint(tmp_path / "checkpoint-000001", model, None, optimizer, {})
    other, resumed = network(lambda parameters: Counting(parameters, lr=0.1))
    assert load_checkpoint(tmp_path / "checkpoint-000001", other, resumed, lambda state: None) == {}
    values = [entries["kept"] for entries in resumed.state.values()]
    assert values == [kept, kept]
    assert type(values[0]) is type(kept)


def test_an_optimiser_that_keeps_objects_is_refused(tmp_path):
    model, optimizer = network(lambda parameters: Counting(parameters, lr=0.1))
    optimizer.kept = {"a": 1}
    optimizer.step()
    with pytest.raises(ValueError, match=r"Counting keeps a dict under '0.kept', expected tensors and numbers"):
        save_checkpoint(tmp_path / "checkpoint-000001", model, None, optimizer, {})
    assert not (tmp_path / "checkpoint-000001").exists()

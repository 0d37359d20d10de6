"""The names that scripts import from `trl.core`, by hand-made examples of what TRL's did."""

import math
import random

import numpy as np
import pytest
import torch
from tolerances import close

import fastppo
from fastppo import core

F32, F64 = close(torch.float32, 4), close(torch.float64, 20)


def test_every_listed_name_is_there():
    assert core.__all__ == sorted(core.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(hasattr(core, name) for name in core.__all__)
    assert fastppo.LengthSampler is core.LengthSampler
    assert fastppo.set_seed is core.set_seed


def test_length_sampler_never_draws_the_maximum():
    np.random.seed(0)
    drawn = [core.LengthSampler(4, 8)() for _ in range(400)]
    assert set(drawn) == {4, 5, 6, 7}
    assert type(drawn[0]) is int
    assert min(drawn.count(length) for length in range(4, 8)) > 60  # 100 expected, a deviation is 8.7


@pytest.mark.parametrize("bounds", [(5, 5), (6, 5)])
def test_length_sampler_of_nothing_is_refused(bounds):
    with pytest.raises(ValueError, match=rf"max_value \({bounds[1]}\) must be greater than min_value \({bounds[0]}\)"):
        core.LengthSampler(*bounds)


def test_set_seed_repeats_every_generator():
    draws = []
    for seed in (5, 5, 6):
        core.set_seed(seed)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_dictionaries():
    assert core.flatten_dict({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b/c": 2, "b/d/e": 3}
    assert core.flatten_dict({"b": {"c": 2}}, sep=".") == {"b.c": 2}
    assert core.add_suffix({"a": 1, "b": 2}, "_x") == {"a_x": 1, "b_x": 2}
    averaged = core.average_torch_dicts([{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}])
    assert averaged["a"].tolist() == [2.0, 4.0]


def test_stack_dicts_flattens_and_pads():
    stacked = core.stack_dicts([{"a": torch.tensor([[1, 2], [3, 4]])}, {"a": torch.tensor([5])}])
    assert stacked["a"].tolist() == [[1, 2, 3, 4], [5, -1, -1, -1]]
    assert core.WANDB_PADDING == -1


def test_pad_to_size():
    tensor = torch.tensor([[1, 2], [3, 4]])
    assert core.pad_to_size(tensor, 4).tolist() == [[1, 2, 50256, 50256], [3, 4, 50256, 50256]]
    assert core.pad_to_size(tensor, 3, dim=0, padding=0).tolist() == [[1, 2], [3, 4], [0, 0]]
    assert core.pad_to_size(tensor, 2).equal(tensor)


def test_logprobs_and_entropy_from_logits():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]], dtype=torch.float64)) + 3
    labels = torch.tensor([[1, 2]])
    expected = torch.tensor([[math.log(0.25), math.log(0.7)]], dtype=torch.float64)
    torch.testing.assert_close(core.logprobs_from_logits(logits, labels), expected, **F64)
    torch.testing.assert_close(core.logprobs_from_logits(logits, labels, gather=False), logits - 3, **F64)
    entropy = [1.5 * math.log(2), -sum(p * math.log(p) for p in (0.1, 0.2, 0.7))]
    torch.testing.assert_close(core.entropy_from_logits(logits), torch.tensor([entropy], dtype=torch.float64), **F64)


def test_masked_statistics_are_those_of_what_is_left():
    values = torch.tensor([[1.0, 50.0, 3.0], [-7.0, 5.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    left = torch.tensor([1.0, 3.0, 5.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(core.masked_mean(values, mask), left.mean(), **F64)
    torch.testing.assert_close(core.masked_mean(values, mask, axis=1), torch.tensor([2.0, 7.0]).double(), **F64)
    torch.testing.assert_close(core.masked_var(values, mask), left.var(), **F64)
    torch.testing.assert_close(core.masked_var(values, mask, unbiased=False), left.var(unbiased=False), **F64)
    whitened = core.masked_whiten(values, mask)[mask.bool()]
    torch.testing.assert_close(whitened, (left - 4.5) / (left.var() + 1e-8).sqrt(), **F64)
    shifted = core.masked_whiten(values, mask, shift_mean=False)[mask.bool()]
    torch.testing.assert_close(shifted, whitened + 4.5, **F64)
    torch.testing.assert_close(core.whiten(left), whitened, **F64)


@pytest.mark.parametrize(("mask", "unbiased", "count"), [([0, 0], True, 0), ([1, 0], True, 1), ([0, 0], False, 0)])
def test_masked_variance_of_too_few_is_refused(mask, unbiased, count):
    with pytest.raises(ValueError, match=f"leaves {count} values, too few for a variance; enlarge the batch"):
        core.masked_var(torch.tensor([1.0, 2.0]), torch.tensor(mask), unbiased)


def test_clip_by_value():
    low, high = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 3.0])
    assert core.clip_by_value(torch.tensor([-1.0, 0.5, 9.0]), low, high).tolist() == [0.0, 0.5, 3.0]


def test_statistics_become_plain():
    stats = {"a": torch.tensor(1.5), "b": torch.tensor([[2]]), "c": np.array([3.0]), "d": torch.ones(2), "e": "x"}
    scalars = core.convert_to_scalar(stats)
    assert (scalars["a"], scalars["b"], scalars["c"], scalars["e"]) == (1.5, 2, 3.0, "x")
    assert scalars["d"] is stats["d"]
    arrays = core.stats_to_np(stats | {"f": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)})
    assert (arrays["a"], arrays["b"], arrays["c"], arrays["e"]) == (1.5, 2.0, 3.0, "x")
    assert arrays["d"].dtype == arrays["f"].dtype == np.float32
    assert arrays["f"].tolist() == [1.0, 1.0]


def test_listify_batch():
    rows = core.listify_batch(torch.arange(6).view(3, 2))
    assert [row.tolist() for row in rows] == [[[0, 1]], [[2, 3]], [[4, 5]]]


def test_respond_to_batch_samples_the_number_asked_for_and_follows_the_global_seed():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, eos_token_id=3, **sizes)).eval()
    queries = torch.randint(20, (4, 5))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(core.respond_to_batch(model, queries, txt_len=30))
    assert drawn[0].shape == (4, 30)
    assert (drawn[0] == 3).any()  # an end-of-sequence token does not end anything
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    torch.manual_seed(1)
    greedy = core.respond_to_batch(model, queries, txt_len=3, top_k=1)
    logits = model(torch.cat([queries, greedy[:, :2]], dim=1)).logits[:, 4:]
    assert greedy.equal(logits.argmax(-1))

"""8-bit layers that round each row of activations as well: what they compute, and that every phase computes it."""

import copy

import pytest
import tiny
import torch
from test_quantised import adapted
from torch import nn

from fastppo import AutoModelForCausalLMWithValueHead, Engine, PPOConfig, PPOTrainer, SamplingConfig, ops
from fastppo.cli import main
from fastppo.models.bnb_linears import Int8Linear, set_int8_meaning
from fastppo.planner import Work
from fastppo.planner.network import twin
from fastppo.trainers.rehearsal import Rehearsal


def product(x, codes, scales, **more):
    return ops.int8_linear(x, codes, scales, meaning="row_wise", **more)


def by_hand(x, codes, scales):
    """Each row in steps of a 127th of its largest number, in whole numbers; steps are fp32, which decides ties."""
    rows = []
    for row in x.float():
        step = row.abs().max() / 127
        sums = torch.round(row / step).long() @ codes.long().t()
        rows.append(sums.double() * step.double() * scales.double())
    return torch.stack(rows)


def problem(rows, inputs, outputs=23, seed=0):
    torch.manual_seed(seed)
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return torch.randn(rows, inputs), codes, torch.rand(outputs) / 127


@pytest.mark.parametrize("shape", [(1, 8), (3, 33), (17, 16), (97, 301), (2, 2050)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_are_rounded_and_sums_are_exact(shape, backend):
    x, codes, scales = problem(*shape)
    with ops.use_backend(backend):
        torch.testing.assert_close(product(x, codes, scales).double(), by_hand(x, codes, scales), rtol=1e-5, atol=1e-6)
        # In 16 bits products are those of the rounded x, and are rounded once more.
        half = x.bfloat16()
        found = product(half, codes, scales)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), by_hand(half, codes, scales), rtol=2**-8, atol=1e-6)


def test_a_row_depends_on_itself_alone():
    x, codes, scales = problem(100, 300)
    x[40] *= 1e4  # a neighbour with large numbers
    whole = product(x, codes, scales)
    for rows in (slice(0, 1), slice(3, 20), slice(40, 41), slice(50, 100)):
        assert product(x[rows], codes, scales).equal(whole[rows])


def test_zeros_and_numbers_that_are_none():
    x, codes, scales = problem(4, 24)
    x[1], x[2, 5] = 0, float("nan")
    found = product(x, codes, scales)
    assert not found[1].any()
    assert found[2].isnan().all()
    assert found[[0, 3]].isfinite().all()
    assert product(x[:0], codes, scales).shape == (0, 23)


def test_gradients_are_those_of_the_weights_without_rounding():
    x, codes, scales = problem(5, 33)
    x, bias = x.reshape(5, 1, 33).requires_grad_(), torch.randn(23, requires_grad=True)
    upstream = torch.randn(5, 1, 23)
    product(x, codes, scales, bias=bias).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ (codes * scales[:, None]))
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))


def rounding(seed=0, **settings):
    model = adapted(8, seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    set_int8_meaning(model, "row_wise")
    return model


def test_rollout_scores_and_update_compute_the_same():
    trainer = PPOTrainer(PPOConfig(batch_size=8, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-2), rounding())
    queries = tiny.queries(8)
    rollout = trainer.engine.generate(queries, SamplingConfig(max_new_tokens=20))
    assert trainer.engine.metrics()["decoder"] == "modules"  # the program knows the other meaning
    scores = trainer.engine.score(queries, list(rollout))
    gaps = (rollout.logprobs - scores.logprobs).abs()
    set_int8_meaning(trainer.model, "weight_only")
    other = (rollout.logprobs - trainer.engine.score(queries, list(rollout)).logprobs).abs()
    set_int8_meaning(trainer.model, "row_wise")
    # A number near the middle of two steps may fall to either side after sums in another order; most never do.
    assert gaps.median() < 1e-5
    assert gaps.mean() < 0.1 * other.mean()
    stats = trainer.step(queries, rollout, [float(len(set(r.tolist()))) for r in rollout])
    assert stats["ppo/policy/logprob_gap_max"] < 0.1 * other.max() + 1e-4


def test_exact_rollouts_are_the_updates_to_the_last_bit():
    model, queries = rounding(), tiny.queries(7)
    one, two = (
        Engine(model, consistency="exact", max_rows=rows).generate(queries, max_new_tokens=12) for rows in (3, 7)
    )
    assert one.tokens.equal(two.tokens)
    assert one.logprobs.equal(two.logprobs)


def test_the_meaning_is_the_models_and_goes_with_it():
    base = adapted(8).pretrained_model.get_base_model()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, int8_meaning="row_wise")
    ids = torch.randint(3, 40, (2, 9))
    rounded = model.pretrained_model(ids).logits
    assert copy.deepcopy(model).pretrained_model(ids).logits.equal(rounded)
    set_int8_meaning(model, "weight_only")
    plain = model.pretrained_model(ids).logits
    assert 0 < (plain - rounded).abs().mean() < 0.1 * plain.std()
    with pytest.raises(ValueError, match="int8_meaning must be one of weight_only, row_wise, got 'w8a8'"):
        set_int8_meaning(model, "w8a8")
    with pytest.raises(ValueError, match=r"int8_meaning='row_wise' .* the model has none; add load_in_8bit=True"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny.llama(), int8_meaning="row_wise")


def test_a_run_with_it_is_planned():
    model = rounding()
    assert sum(type(module) is Int8Linear for module in model.modules()) == 14
    config = PPOConfig(batch_size=4)
    plan = Rehearsal(twin(model, None)).plan(Work(9, 8, config))
    assert plan.peak > sum(p.nbytes for p in model.parameters())


def test_inspect_says_what_it_costs(tmp_path, capsys):
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "w3 w4 w5 w9 w12"}\n{"text": "w30 w31 w32 w8 w9 w10"}\n')
    given = ["inspect", "--model_name_or_path", str(tmp_path), "--texts", str(tmp_path / "texts.jsonl")]
    off = []
    for more in ([], ["--int8_meaning", "row_wise"]):
        assert main([*given, "--load_in_8bit", "true", *more]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  log-probs")]
        off.append(line.split()[3])
    assert off[0] != off[1]

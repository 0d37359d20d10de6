"""Linear layers on 8-bit and 4-bit weights: products, gradients, and one meaning wherever a model runs."""

import copy
import json

import bitsandbytes as bnb
import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel
from tolerances import close
from torch import nn

from fastppo import AutoModelForCausalLMWithValueHead, Engine, PPOConfig, PPOTrainer, SamplingConfig, ops
from fastppo.models.bnb_linears import Int8Linear, Linear4Bit
from fastppo.models.loading import adopt_quantised
from fastppo.ops import quantised
from fastppo.ops.matmul import row_invariant


def quantise(model, bits):
    """Replace the linear layers by bitsandbytes', as transformers does when it loads a model so."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "head" not in name:
            size, bias = (module.in_features, module.out_features), module.bias is not None
            if bits == 8:
                new = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False, threshold=6.0)
                new.weight = bnb.nn.Int8Params(module.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.LinearNF4(*size, bias=bias)
                new.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
            new.bias = module.bias
            model.set_submodule(name, new.to("cpu"))
    return model


def dense(model):
    """Return a copy with plain layers of the weights that the quantised ones stand for."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)):
            if isinstance(module, bnb.nn.Linear8bitLt):
                absmax = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
                weight = module.weight.data.double() * absmax.double()[:, None] / 127
            else:
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data, plain.bias = weight.float(), module.bias
            twin.set_submodule(name, plain)
    return twin


def codes_of(model):
    return {name: m.weight.data.clone() for name, m in model.named_modules() if isinstance(m, (Int8Linear, Linear4Bit))}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 8), (3, 2, 33), (96, 16), (97, 40), (1025, 24), (5, 0, 16)])
def test_product_and_gradients_are_those_of_the_weights(backend, dtype, shape, monkeypatch):
    monkeypatch.setitem(quantised._SCRATCH, "cpu", 1)  # the smallest parts
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (151, shape[-1]), dtype=torch.int8)
    scales, bias = torch.rand(151) / 127, torch.randn(151, requires_grad=True)
    x = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(*shape[:-1], 151).to(dtype)
    with ops.use_backend(backend):
        out = ops.int8_linear(x, codes, scales, bias)
        out.backward(upstream)
    wide, weight = x.detach().double().requires_grad_(), codes.double() * scales.double()[:, None]
    expected = nn.functional.linear(wide, weight, bias.detach().double())
    expected.backward(upstream.double())
    assert out.dtype == x.grad.dtype == dtype
    narrow = torch.float32 if dtype == torch.float64 else dtype  # the scales and the bias are fp32
    sums = close(narrow, 40)
    torch.testing.assert_close(out.double(), expected, **close(narrow, 4))
    torch.testing.assert_close(x.grad.double(), wide.grad, **close(dtype, 8))
    torch.testing.assert_close(bias.grad.double(), upstream.double().flatten(0, -2).sum(0), **sums)


def test_gradients_of_the_definition():
    codes, scales = torch.randint(-127, 128, (7, 5), dtype=torch.int8), torch.rand(7)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.int8_linear(x, codes, scales), (x,))


def test_rows_are_the_same_alone_where_they_must_be():
    codes, scales, x = torch.randint(-127, 128, (40, 300), dtype=torch.int8), torch.rand(40), torch.randn(100, 300)
    with row_invariant():
        whole = ops.int8_linear(x, codes, scales)
        for rows in (1, 8, 9, 96, 97):
            assert ops.int8_linear(x[:rows], codes, scales).equal(whole[:rows])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 4)}, r"codes are torch.int8 \(3, 5\) and x is \(2, 4\)"),
        ({"codes": torch.ones(3, 5)}, "codes are torch.float32"),
        ({"x": torch.ones(2, 5, dtype=torch.float16)}, "x is torch.float16, expected torch.bfloat16 or wider"),
        ({"scales": torch.ones(4)}, r"scales have shape \(4,\), expected \(3,\)"),
        ({"bias": torch.ones(1)}, r"bias have shape \(1,\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, message):
    given = {"x": torch.ones(2, 5), "codes": torch.ones(3, 5, dtype=torch.int8), "scales": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        ops.int8_linear(**(given | changes))


@pytest.mark.parametrize("bits", [8, 4])
def test_adopting_keeps_tensors_names_and_the_weights_meaning(bits):
    model = quantise(tiny.llama(hidden_size=64, intermediate_size=128), bits)
    names, pointers = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    twin = dense(model)
    adopt_quantised(model)
    adopt_quantised(model)  # once more changes nothing
    assert {type(m) for m in model.modules() if isinstance(m, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit))} == {
        Int8Linear if bits == 8 else Linear4Bit
    }
    assert list(model.state_dict()) == names
    assert [p.data_ptr() for p in model.parameters()] == pointers
    ids = torch.randint(3, 40, (3, 17))
    for mode in (model.train, model.eval):
        mode()
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_a_layer_that_bitsandbytes_has_decoded_with_is_put_in_order_again():
    for bits in (8, 4):
        model = quantise(tiny.llama(hidden_size=64, intermediate_size=128), bits)
        twin = dense(model)
        with torch.no_grad():
            model(torch.randint(3, 40, (1, 1)))  # moves int8's scales, and packs 4-bit codes where the CPU has AVX-512
        adopt_quantised(model)
        ids = torch.randint(3, 40, (3, 17))
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, atol=2e-5, rtol=1e-5)


def test_scales_that_change_are_seen():
    model = quantise(tiny.llama(hidden_size=64, intermediate_size=128), 8)
    adopt_quantised(model)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 64)
    before, state = layer(x), copy.deepcopy(model.state_dict())
    layer.weight.SCB.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)
    layer.weight.SCB = layer.weight.SCB / 4
    torch.testing.assert_close(layer(x), before / 2)
    model.load_state_dict(state)
    torch.testing.assert_close(layer(x), before)


def test_a_layer_that_is_not_quantised_yet_is_named():
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear8bitLt(16, 40, has_fp16_weights=False)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj is a Linear8bitLt that is not quantised yet"):
        adopt_quantised(model)


def adapted(bits, seed=0):
    base = quantise(tiny.llama(seed=seed, hidden_size=64, intermediate_size=128), bits)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=config)


@pytest.mark.parametrize("bits", [8, 4])
def test_rollout_and_update_agree_and_the_base_stays_bitwise(bits):
    trainer = PPOTrainer(
        PPOConfig(batch_size=8, mini_batch_size=4, ppo_epochs=2, learning_rate=1e-2, adap_kl_ctrl=False), adapted(bits)
    )
    before, queries = codes_of(trainer.model), tiny.queries(8)
    assert len(before) == 14
    for _ in range(3):
        rollout = trainer.engine.generate(queries, SamplingConfig(max_new_tokens=20))
        scores = trainer.engine.score(queries, list(rollout))
        torch.testing.assert_close(rollout.logprobs, scores.logprobs, atol=5e-5, rtol=0)
        stats = trainer.step(queries, rollout, [float(len(set(r.tolist()))) for r in rollout])
        assert stats["ppo/policy/logprob_gap_max"] <= 5e-5
    assert stats["objective/kl"] != 0
    for name, codes in codes_of(trainer.model).items():
        assert torch.equal(codes, before[name]), name


def test_the_log_probs_are_those_of_the_dense_twin():
    model = adapted(8)
    network = model.pretrained_model
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    queries = tiny.queries(5)
    rollout = Engine(model, seed=3).generate(queries, max_new_tokens=15)
    twin = dense(network)
    for query, response, logprobs in zip(queries, rollout, rollout.split(rollout.logprobs), strict=True):
        logits = twin(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=5e-5, rtol=0)


def test_exact_rollouts_on_int8():
    model = adapted(8)
    engine = Engine(model, consistency="exact", max_rows=3)
    queries = tiny.queries(7)
    rollout = engine.generate(queries, max_new_tokens=12)
    again = Engine(model, consistency="exact", max_rows=7).generate(queries, max_new_tokens=12)
    assert torch.equal(rollout.logprobs, again.logprobs)
    model = adapted(4).to(torch.bfloat16)
    layer = model.pretrained_model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.weight.quant_state.dtype = torch.float16
    with pytest.raises(NotImplementedError, match=r"4-bit weights of torch.float16 beside torch.bfloat16 .*q_proj"):
        Engine(model, consistency="exact").generate(queries, max_new_tokens=2)


def test_an_adapter_opens_in_plain_peft(tmp_path):
    model = adapted(8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(dense(quantise(tiny.llama(hidden_size=64, intermediate_size=128), 8)), tmp_path)
    ids = torch.randint(3, 40, (2, 9))
    torch.testing.assert_close(model.pretrained_model(ids).logits, plain(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_is_planned_before_it_starts(bits, tmp_path):
    trainer = PPOTrainer(PPOConfig(batch_size=8, mini_batch_size=4, ppo_epochs=1), adapted(bits))

    def reward(prompts, completions):
        return [float(len(completion)) for completion in completions]

    given = {"max_steps": 2, "max_new_tokens": 5, "console": False, "output_dir": str(tmp_path / "run")}
    trainer.train(tiny.queries(16), reward, **given)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    codes = sum(part.nbytes for part in codes_of(trainer.model).values())
    assert codes < summary["planned_peak_bytes"] < 40 * codes

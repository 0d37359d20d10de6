"""Weights in four bits, read in place by the C++ code of every instruction set, against bitsandbytes' own widening."""

import bitsandbytes as bnb
import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit
from sampling_oracle import ISAS, serving
from test_quantised import adapted, dense
from torch import nn

from fastppo import Engine
from fastppo.models import bnb_linears
from fastppo.models.bnb_linears import Linear4Bit
from fastppo.models.loading import adopt_quantised
from fastppo.ops import four_bits, use_backend
from fastppo.ops.matmul import row_invariant

pytestmark = pytest.mark.skipif(not ISAS, reason="fastppo was installed without its C++ extension")

FLOATS = [torch.float32, torch.bfloat16]
# Parts of blocks, of 32 weights and of tiles of outputs; blocks that run on from row to row; longer than a stretch.
SHAPES = [(1, 6), (13, 30), (24, 64), (7, 450), (12, 1026), (65, 256)]


@pytest.fixture(params=ISAS)
def isa(request):
    with serving(request.param):
        yield request.param


def make_layer(outputs, inputs, dtype=torch.float32, kind="nf4", block=64, nested=False, bias=False):
    """Return a layer that bitsandbytes has quantised, adopted."""
    torch.manual_seed(outputs)
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=bias)
    weight = torch.randn(outputs, inputs).to(dtype)
    codes, state = quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
    layer.weight = bnb.nn.Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True)
    adopt_quantised(layer)
    assert type(layer) is Linear4Bit
    return layer


def widened(layer):
    """What the codes stand for by their definition, and by bitsandbytes where that is right about it.

    On a CPU it takes the scale of another block where a block reaches into the next row.
    """
    state, nibbles = layer.weight.quant_state, layer.weight.data.flatten()
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    codes = torch.stack([nibbles >> 4, nibbles & 15], 1).flatten()[: state.shape.numel()].long()
    weight = state.code[codes] * absmax.repeat_interleave(state.blocksize)[: len(codes)]
    weight = weight.to(state.dtype).view(state.shape)
    if state.shape[1] % state.blocksize == 0:
        assert weight.equal(dequantize_4bit(layer.weight.data, state))
    return weight


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("nf4", 32), ("fp4", 128), ("nf4", 4096)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_weight_is_bitsandbytes_own_to_the_last_bit(isa, dtype, kind, block, nested, monkeypatch):
    monkeypatch.setattr(bnb_linears, "widened", lambda *given: pytest.fail("the weight was widened whole"))
    for outputs, inputs in SHAPES:
        layer = make_layer(outputs, inputs, dtype, kind, block, nested)
        rows, expected = torch.eye(inputs, dtype=dtype), widened(layer).t()
        with row_invariant():
            assert layer(rows).equal(expected), (outputs, inputs)
        for first in range(0, inputs, 5):  # by the other way to sum
            assert layer(rows[first : first + 5]).equal(expected[first : first + 5]), (outputs, inputs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_agree_with_fp64(isa, dtype):
    for outputs, inputs in SHAPES:
        layer = make_layer(outputs, inputs, dtype, nested=True, bias=True)
        nn.init.normal_(layer.bias)
        weight, bias = widened(layer).double(), layer.bias.detach().double()
        for rows in (1, 2, 3, 7, 8, 9, 33, 64, 65):
            x = torch.randn(rows, inputs).to(dtype)
            expected, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t() + bias.abs()
            error = ((layer(x).double() - expected - bias).abs() / size).max()
            assert error <= (1e-6 if dtype == torch.float32 else 2**-7), (rows, outputs, inputs)


@pytest.mark.parametrize("nested", [False, True])
def test_whole_weights_are_right_where_blocks_reach_into_the_next_row(nested):
    for kind, outputs, inputs, block in (
        ("nf4", 24, 64, 128),
        ("fp4", 24, 192, 128),
        ("nf4", 1, 2, 64),
        ("nf4", 3, 7, 64),
    ):
        layer = make_layer(outputs, inputs, torch.float32, kind, block, nested)
        assert bnb_linears.widened(layer.weight).equal(widened(layer)), (outputs, inputs)


def test_a_row_is_the_same_alone_where_it_must_be():
    for dtype in FLOATS:
        layer, x = make_layer(40, 300, dtype), torch.randn(600, 300).to(dtype)
        with row_invariant(), torch.no_grad():
            whole = layer(x)
            for rows in (1, 8, 9, 96, 513):
                assert layer(x[:rows]).equal(whole[:rows])


def test_what_the_kernel_does_not_know_is_widened_first(monkeypatch):
    monkeypatch.setattr(four_bits, "_few_rows", None)
    odd = make_layer(4, 7)
    half = make_layer(4, 8, torch.float16)  # rounded twice where x is bf16
    for layer, dtype in ((odd, torch.float32), (half, torch.bfloat16), (half, torch.float32), (half, torch.float64)):
        x = torch.randn(3, layer.in_features).to(dtype)
        torch.testing.assert_close(layer(x), x @ widened(layer).to(dtype).t())
    with use_backend("reference"):
        layer = make_layer(4, 8)
        assert layer(torch.eye(8)).equal(widened(layer).t())


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8), (0, 8), (8,), (70, 8)])
def test_shapes_and_gradients_are_a_linear_layers(shape):
    layer, x = make_layer(5, 8), torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 5)
    out = layer(x)
    out.backward(upstream)
    assert out.shape == upstream.shape
    torch.testing.assert_close(x.grad, upstream @ widened(layer))
    assert layer(x.detach()).equal(out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_model_decodes_by_its_program_and_by_the_same_weights(dtype):
    torch.manual_seed(3)
    model = adapted(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    if dtype == torch.bfloat16:
        for module in model.modules():
            if type(module) is Linear4Bit:
                bits = quantize_4bit(widened(module).bfloat16(), quant_type="nf4", compress_statistics=True)
                module.weight.data, module.weight.quant_state = bits
        for parameter in model.pretrained_model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    engine, queries = Engine(model, seed=3), tiny.queries(5)
    rollout = engine.generate(queries, max_new_tokens=15)
    assert engine.metrics()["decoder"] == "program"
    twin, errors = dense(model.pretrained_model).float(), []
    for query, response, logprobs in zip(queries, rollout, rollout.split(rollout.logprobs), strict=True):
        logits = twin(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        errors.append((logprobs - expected).abs())
    assert torch.cat(errors).mean() < (1e-5 if dtype == torch.float32 else 0.05)


def test_exact_rollouts_on_four_bits():
    model, queries = adapted(4), tiny.queries(7)
    one, two = (
        Engine(model, consistency="exact", max_rows=rows).generate(queries, max_new_tokens=12) for rows in (3, 7)
    )
    assert torch.equal(one.logprobs, two.logprobs)
    assert one.tokens.equal(two.tokens)

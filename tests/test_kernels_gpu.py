"""The Triton kernels on a GPU, on rows of the size that they are for, with the oracles that the interpreter has."""

import pytest
import torch
from kernel_oracle import OTHER_SCALING, agree, check_draws, ppo_losses, random_rows, statistics
from tolerances import close

pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16]
# A multiple of every block, and one that leaves a tail and rows that do not begin at 16 bytes.
SIZES = [128_256, 50_257]
SCALINGS = [{}, {"temperature": 0.7, "softcap": 30.0, "logit_scale": 0.5}]
# The GPU's exp is right to 2 units in the last place, where the interpreter's is to half of one.
FACTOR = 16


def rows_on_device(dtype: torch.dtype, vocabulary: int, seed: int = 1, count: int = 33) -> list[torch.Tensor]:
    return [part.to(DEVICE) for part in random_rows(dtype, count, vocabulary, seed)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_statistics_and_gradient(dtype, vocabulary, scaling):
    from fastppo.kernels.logit_gradient import logit_gradient
    from fastppo.kernels.row_statistics import row_statistics

    (logits, labels), (ref, _) = rows_on_device(dtype, vocabulary), rows_on_device(dtype, vocabulary, seed=2)
    exact = logits.double().requires_grad_()
    truths = statistics(exact, labels, scaling, ref, OTHER_SCALING)
    more = {"ref_logits": ref, "ref_shape": OTHER_SCALING, **scaling}
    found = row_statistics(logits, labels, **more)
    for name, ours, truth in zip(("logprobs", "entropy", "lse", "kl", "ref_lse"), found, truths, strict=True):
        agree(ours, truth, logits, scaling, name, FACTOR)
    g, e, d_lse, d_kl = (torch.randn(len(labels), device=DEVICE) for _ in range(4))
    (g * truths[0] + e * truths[1] + d_lse * truths[2] + d_kl * truths[3]).sum().backward()
    given = {"logprobs": found[0], "kl": found[3], "ref_logsumexp": found[4], "d_kl": d_kl, **more}
    upstream = (labels, found[2], found[1], g, e, d_lse)
    out = logit_gradient(logits, *upstream, out=torch.empty_like(logits, dtype=found[0].dtype), **given)
    agree(out, exact.grad, logits, scaling, "gradient", FACTOR)
    in_place = logit_gradient(logits, *upstream, out=logits, **given)
    assert in_place.equal(out.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_ppo_rows(dtype, vocabulary):
    from fastppo.kernels.ppo import ppo_rows

    logits, labels = rows_on_device(dtype, vocabulary)
    old = statistics(logits, labels, {})[0].float() + torch.linspace(-0.5, 0.5, len(labels), device=DEVICE)
    advantages, weights = torch.randn(2, len(labels), device=DEVICE).unbind()
    numbers = {"clip_low": 0.2, "clip_high": 0.3, "entropy_coef": 0.1, "kl_coef": 0.05}
    exact = logits.double().requires_grad_()
    logprobs, entropy, _ = statistics(exact, labels, {})
    truth = ppo_losses(logprobs, entropy, old, old - 1, advantages, weights, numbers)
    truth.sum().backward()
    given = (labels, old, advantages, weights)
    beside = torch.empty_like(logits, dtype=torch.float32)
    losses, *_ = ppo_rows(logits, *given, ref_logprobs=old - 1, out=beside, **numbers)
    agree(losses, truth, logits, {}, "losses", FACTOR)
    agree(beside, exact.grad, logits, {}, "gradient", FACTOR)


@pytest.mark.parametrize("vocabulary", [1, 7, 130, 300, 4097, 50_257])
def test_in_place_is_beside_whatever_the_order_of_threads(vocabulary):
    """Small rows leave threads idle that read what others have written, if nothing holds them."""
    from fastppo.kernels.ppo import ppo_rows

    logits, labels = rows_on_device(torch.float32, vocabulary, count=500)
    numbers = torch.randn(2, 500, device=DEVICE)
    given = (labels, None, numbers[0], numbers[1].abs())
    beside = torch.empty_like(logits)
    expected = ppo_rows(logits, *given, clip_low=0.2, clip_high=0.2, entropy_coef=0.1, out=beside)
    for _ in range(10):
        in_place = logits.clone()
        found = ppo_rows(in_place, *given, clip_low=0.2, clip_high=0.2, entropy_coef=0.1, out=in_place)
        assert in_place.equal(beside)
        assert all(ours.equal(first) for ours, first in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [512, 500])
def test_tiles(dtype, size):
    from fastppo.kernels.tile_statistics import tile_statistics

    hidden = torch.randn(300, size, device=DEVICE).to(dtype)
    weight, bias = (torch.randn(n, device=DEVICE) * 0.1 for n in ((32_001, size), (32_001,)))
    weight, bias, labels = weight.to(dtype), bias.to(dtype), torch.randint(32_001, (300,), device=DEVICE)
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    for scaling in SCALINGS:
        found = tile_statistics(hidden, weight, labels, bias=bias, **scaling)
        for ours, truth in zip(found, statistics(logits, labels, scaling), strict=True):
            # A product is the sum of `size` rounded ones.
            torch.testing.assert_close(ours.double(), truth, **close(torch.float32, 64))
        again = tile_statistics(hidden, weight, labels, bias=bias, **scaling)
        assert all(first.equal(second) for first, second in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("limits", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.7}])
def test_draws(dtype, vocabulary, limits):
    from fastppo.kernels.sampling import sample

    logits, _ = rows_on_device(dtype, vocabulary)
    rows, scaling = torch.arange(len(logits), device=DEVICE), SCALINGS[1]
    given = {"logits": logits, "seed": 2**40 + 1, "requests": rows + 2**33, "positions": 3 * rows, **scaling, **limits}
    given["forbidden_ids"], given["is_forbidden"] = logits[:2].argmax(1), rows % 2 == 0
    found = sample(**given)
    on_host = {name: part.cpu() if isinstance(part, torch.Tensor) else part for name, part in given.items()}
    check_draws(tuple(part.cpu() for part in found), on_host, scaling, limits, 1e-5, FACTOR)
    assert all(first.equal(again) for first, again in zip(found, sample(**given), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"window": 300, "softcap": 30.0}])
def test_paged_attention(dtype, more):
    from fastppo.kernels.paged_attention import paged_attention

    from fastppo.reference_attention import attend_one

    lengths = [1, 17, 256, 1000, 1999]
    tables = torch.randperm(5 * 128, device=DEVICE).int().view(5, 128)
    keys, values = (torch.randn(5 * 128, 16, 8, 128, device=DEVICE).to(dtype) for _ in range(2))
    q, positions = torch.randn(5, 32, 128, device=DEVICE).to(dtype), torch.tensor(lengths, device=DEVICE).int() - 1
    rows = torch.arange(5, device=DEVICE, dtype=torch.int32)
    given = (q, (keys, values), rows, positions, tables)
    found = paged_attention(*given, scale=0.1, **more)
    assert torch.equal(found, paged_attention(*given, scale=0.1, **more))
    for row, length in enumerate(lengths):
        at = torch.arange(length, device=DEVICE)
        k, v = (pool[tables[row, at // 16].long(), at % 16].double() for pool in (keys, values))
        truth = attend_one(q[row : row + 1].double(), k, v, scale=0.1, **more)[0]
        tolerance = 2e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found[row].double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 7, 32, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 4096), (4096, 14336), (14336, 4096), (1000, 77)])
def test_int8_linear(rows, inputs, outputs):
    from fastppo.kernels.int8_linear import int8_linear

    x = torch.randn(rows, inputs, device=DEVICE).bfloat16()
    codes = torch.randint(-127, 128, (outputs, inputs), device=DEVICE).to(torch.int8)
    scales = torch.rand(outputs, device=DEVICE) / 127
    found = int8_linear(x, codes, scales)
    truth = x.double() @ (codes.double() * scales.double()[:, None]).t()
    torch.testing.assert_close(found.double(), truth, rtol=2**-8, atol=2**-8 * float(truth.abs().mean()))
    for row in (0, rows - 1):
        assert torch.equal(found[row], int8_linear(x[row : row + 1], codes, scales)[0])

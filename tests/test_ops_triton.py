"""The head's operations on the Triton backend: in the interpreter everywhere, on CUDA where there is some."""

from pathlib import Path

import interpreter
import pytest
import torch
import triton_head

from fastppo import ops
from fastppo.ops import chunks

pytest.importorskip("triton", reason="triton has no wheel for this platform")


def test_the_head_agrees_with_autograd_in_the_interpreter():
    interpreter.run_script(triton_head.__file__)


@pytest.mark.slow
def test_the_sampler_passes_the_tests_of_the_others_in_the_interpreter():
    tests = Path(__file__).with_name("test_sampling.py")
    names = "its_number and 129 or not_finite and 300 or everything_possible or any_strides"
    # The interpreter computes with numpy, which warns of the NaN that are wanted.
    how = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", f"triton and ({names})"]
    interpreter.run_script("-m", "pytest", *how, tests)


def test_the_interpreter_is_not_asked_for_what_it_cannot_do():
    assert "needs triton >= 3.7 or numpy < 2.4" in interpreter.fault("3.6.0", "2.4.1")
    assert not interpreter.fault("3.7.0", "2.4.1")
    assert not interpreter.fault("3.6.0", "2.3.5")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_head_agrees_with_autograd_on_a_gpu(dtype):
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    triton_head.check_all("cuda", dtype, {"atol": bound, "rtol": bound})


@pytest.mark.gpu
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_bf16_on_a_gpu_is_no_worse_than_torch_and_bitwise_the_same_again(monkeypatch, is_trained, num_chunks):
    if num_chunks > 1:  # 256 rows each, which is the least
        monkeypatch.setattr(chunks, "_CHUNK_BYTES", dict.fromkeys(chunks._CHUNK_BYTES, 0))
    rows, hidden_size, vocabulary = 700, 256, 32_003
    hidden, weight, _, labels = triton_head.make_inputs("cuda", torch.bfloat16, False, rows, hidden_size, vocabulary)
    with torch.no_grad():
        weight.mul_(0.2)
    weight.requires_grad_(is_trained)
    parts = [hidden, weight] if is_trained else [hidden]
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    logprobs, entropies = triton_head.naive([*exact, None], labels, {})
    old = logprobs.detach().float() + 0.2 * torch.randn(rows, device="cuda")

    def make_loss():
        advantages = torch.linspace(-1, 1, rows, device="cuda")
        return ops.PPOLoss(old, advantages, torch.full((rows,), 1 / rows, device="cuda"), entropy_coef=0.01)

    loss = make_loss()
    ours = ops.linear_loss(hidden, weight, labels, loss)
    got = torch.autograd.grad(ours, parts)
    assert (loss.logprobs.double() - logprobs).abs().max() <= 1e-5
    truth = torch.autograd.grad(make_loss()(logprobs, entropies, torch.arange(rows, device="cuda")).sum(), exact)
    plain = [part.detach().clone().requires_grad_() for part in (hidden, weight)]
    z = torch.nn.functional.linear(*plain).float().log_softmax(-1)
    plain_stats = z.gather(1, labels[:, None])[:, 0], -(z.exp() * z).sum(-1)
    low = torch.autograd.grad(make_loss()(*plain_stats, torch.arange(rows, device="cuda")).sum(), plain)
    for our, same_dtype, fp64 in zip(got, low, truth, strict=False):
        scale = fp64.abs().max()
        assert (our - fp64).abs().max() <= 2 * (same_dtype - fp64).abs().max() + 1e-3 * scale
    again = torch.autograd.grad(ops.linear_loss(hidden, weight, labels, make_loss()), parts)
    assert all(a.equal(b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
def test_advantages_on_a_gpu_are_those_of_the_host():
    lengths = torch.randint(1, 200, (64,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rewards, values = torch.randn(2, int(offsets[-1]))
    ours = ops.gae(rewards.cuda(), values.cuda(), offsets, 1.0, 0.95)
    torch.testing.assert_close(ours.cpu(), ops.gae(rewards, values, offsets, 1.0, 0.95), atol=1e-4, rtol=1e-4)

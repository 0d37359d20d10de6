"""The head's operations on the Triton backend against autograd in fp64: on CUDA, or in the interpreter by a process.

`python triton_head.py` checks in the interpreter; tests call `check_all` with a device that they have.
"""

import os
import sys

import torch

from fastppo import ops
from fastppo.ops import chunks

ROWS, HIDDEN, VOCABULARY, CHUNK = 11, 8, 137, 4
SHAPES = [{}, {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.9}]


def make_inputs(device, dtype, has_bias, rows=ROWS, hidden=HIDDEN, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(3)
    shapes = [(rows, hidden), (vocabulary, hidden), (vocabulary,)]
    parts = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    return parts[0], parts[1], parts[2] if has_bias else None, labels


def log_p(hidden, weight, bias, temperature=1.0, softcap=None, logit_scale=1.0):
    z = (hidden @ weight.t() + (0 if bias is None else bias)) * logit_scale
    return torch.log_softmax((softcap * torch.tanh(z / softcap) if softcap else z) / temperature, -1)


def naive(parts, labels, shape):
    logp = log_p(*parts, **shape)
    return logp[range(len(labels)), labels], -(logp.exp() * logp).sum(-1)


def exact_twins(parts):
    return [None if part is None else part.detach().double().requires_grad_() for part in parts]


def compare(ours, expected, parts, twins, tolerance, what):
    """Compare a scalar with its truth, and both gradients by every part."""
    torch.testing.assert_close(ours.double(), expected, **tolerance, msg=lambda m: f"{what}: {m}")
    pairs = [(part, twin) for part, twin in zip(parts, twins, strict=True) if part is not None]
    got = torch.autograd.grad(ours, [part for part, _ in pairs])
    truth = torch.autograd.grad(expected, [twin for _, twin in pairs])
    for part, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(part.double(), exact, **tolerance, msg=lambda m: f"{what}, gradient: {m}")


def own_loss(logprobs, entropies, rows):
    return (torch.sin(logprobs) - 0.2 * entropies) * (rows + 1) / 20


def check_case(device, dtype, has_bias, shape, tolerance):
    *parts, labels = make_inputs(device, dtype, has_bias)
    twins = exact_twins(parts)
    numbers = torch.arange(ROWS, device=device)
    logprobs, entropies = naive(twins, labels, shape)
    more = {"bias": parts[2], **shape}
    ours = ops.linear_loss(*parts[:2], labels, own_loss, **more)
    compare(ours, own_loss(logprobs, entropies, numbers).sum(), parts, twins, tolerance, "own loss")
    old = logprobs.detach().float() + 0.3 * torch.linspace(-1, 1, ROWS, device=device)
    advantages = torch.linspace(1, -1, ROWS, device=device).float()
    loss = ops.PPOLoss(old, advantages, advantages.abs() + 0.1, 0.1, 0.2, 0.05, old - 1, 0.3)
    logprobs, entropies = naive(twins, labels, shape)
    ours = ops.linear_loss(*parts[:2], labels, loss, **more)
    compare(ours, loss(logprobs, entropies, numbers).sum(), parts, twins, tolerance, "PPO's loss")
    logprobs, entropies = naive(twins, labels, shape)
    got = ops.linear_logprobs(*parts[:2], labels, **more)
    mix = [(part[0] * 0.7 + part[1] * numbers).sum() for part in (got, (logprobs, entropies))]
    compare(*mix, parts, twins, tolerance, "statistics")
    ref_hidden, ref_weight, *_ = make_inputs(device, dtype, False, hidden=5)
    ref = log_p(ref_hidden.detach().double(), ref_weight.detach().double(), None)
    logp = log_p(*twins, **shape)
    expected = (logp.exp() * (logp - ref)).sum(-1)
    plain = {"bias": None, "temperature": 1.0, "softcap": None, "logit_scale": 1.0}
    kl = ops.linear_kl(tuple(parts[:2]), (ref_hidden, ref_weight), **more, ref_shape=plain)
    compare((kl * numbers).sum(), (expected * numbers).sum(), parts, twins, tolerance, "exact KL")


def check_all(device, dtype, tolerance):
    """Raise AssertionError where an operation on this device is off."""
    for has_bias in (False, True):
        for shape in SHAPES:
            check_case(device, dtype, has_bias, shape, tolerance)


def main():
    chunks._MIN_CHUNK_ROWS, chunks._ROW_MULTIPLE = 1, 1
    chunks._CHUNK_BYTES["cpu"] = 4 * VOCABULARY * CHUNK
    assert ops.chunk_rows(VOCABULARY) == CHUNK
    with ops.use_backend("triton"):
        check_all("cpu", torch.float64, {"atol": 1e-10, "rtol": 1e-10})
        check_all("cpu", torch.float32, {"atol": 1e-4, "rtol": 1e-4})
        hidden, weight, _, labels = make_inputs("cpu", torch.float64, False, rows=3, hidden=3, vocabulary=9)

        def every(hidden, weight):
            return ops.linear_logprobs(hidden, weight, labels, temperature=0.8, softcap=4.0)

        assert torch.autograd.gradcheck(every, (hidden, weight))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1: without it the kernels want CUDA")
    main()

"""The Triton kernel that writes the gradient of raw logits, in the interpreter, against autograd in fp64."""

import pytest
import torch
from interpreter import Call, interpret
from kernel_oracle import OTHER_SCALING, SCALINGS, SHAPES, agree, name_of, random_numbers, random_rows, statistics
from tolerances import close

pytest.importorskip("triton", reason="triton has no wheel for this platform")

FUNCTION = "fastppo.kernels.logit_gradient.logit_gradient"
# Which derivatives a case has besides g.
TERMS = [(), ("e",), ("d_lse",), ("e", "d_lse"), ("d_kl",), ("e", "d_lse", "d_kl")]
CASES = {
    f"{name_of(dtype, shape, scaling)}-{'+'.join(terms)}": (dtype, shape, scaling, terms)
    for dtype in (torch.float32, torch.float64)
    for i, shape in enumerate(SHAPES)
    for j, scaling in enumerate(SCALINGS)
    for terms in [TERMS[(i + j) % len(TERMS)]]
} | {f"float64-5x130-terms-{'+'.join(terms)}": (torch.float64, (5, 130), {"softcap": 9.0}, terms) for terms in TERMS}


def arguments(
    dtype: torch.dtype, shape: tuple[int, int], scaling: dict, terms: tuple[str, ...]
) -> tuple[dict, torch.Tensor]:
    """Return what the kernel is given, statistics in fp64 rounded to the dtype, and the gradient by autograd."""
    logits, labels = random_rows(dtype, *shape)
    exact, ref = logits.double().requires_grad_(), random_rows(dtype, *shape, seed=2)[0] if "d_kl" in terms else None
    found = statistics(exact, labels, scaling, ref, OTHER_SCALING)
    names = ("logprobs", "entropy", "logsumexp", "kl", "ref_logsumexp")
    given = {name: part.detach().to(dtype) for name, part in zip(names, found, strict=False)}
    upstream = {name: random_numbers(dtype, shape[0], seed) for seed, name in enumerate(("g", *terms))}
    order = {"g": 0, "e": 1, "d_lse": 2, "d_kl": 3}
    sum((upstream[name].double() * found[order[name]]).sum() for name in upstream).backward()
    more = {} if ref is None else {"ref_logits": ref, "ref_shape": OTHER_SCALING}
    return {"logits": logits, "labels": labels, **given, **upstream, **scaling, **more}, exact.grad


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    calls = {}
    for name, case in CASES.items():
        given, _ = arguments(*case)
        calls[name] = Call(FUNCTION, given | {"out": torch.full_like(given["logits"], float("nan"))})
        calls[f"{name} in place"] = Call(FUNCTION, given | {"out": "=logits"})
    return interpret(tmp_path_factory.mktemp("interpreter"), calls)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_autograd(name, interpreted):
    given, truth = arguments(*CASES[name])
    agree(interpreted[name][-1], truth, given["logits"], CASES[name][2], name)


@pytest.mark.parametrize("name", CASES)
def test_in_place_and_beside_are_the_same_bits(name, interpreted):
    assert interpreted[name][-1].equal(interpreted[f"{name} in place"][-1])


def interpret_one(folder, given: dict, **more) -> torch.Tensor:
    return interpret(folder, {"only": Call(FUNCTION, given | more)})["only"][-1]


def test_gradcheck_of_every_statistic(tmp_path):
    given = {"logits": torch.randn(2, 5, dtype=torch.float64), "labels": torch.tensor([0, 3])}
    ref = {"ref_logits": torch.randn(2, 5, dtype=torch.float64), "ref_shape": {"softcap": 3.0}}
    capped = {"shape": {"temperature": 0.8, "softcap": 2.0, "logit_scale": 1.5}}
    cases = {"plain": {"shape": {}}, "capped": capped, "ref": {"shape": {}} | ref, "capped ref": capped | ref}
    calls = {name: Call("kernel_functions.check_statistics", given | more) for name, more in cases.items()}
    assert interpret(tmp_path, calls) == dict.fromkeys(cases, (torch.tensor(True),))


def test_confident_labels_keep_their_digits(tmp_path):
    """1 - p of a label is right to its own last digits, not to those of 1; also among large logits."""
    probs = torch.tensor([0.9, 0.99, 0.999, 0.9999, 0.99999, 1e-3], dtype=torch.float64)
    logits = torch.zeros(12, 1000, dtype=torch.float64)
    logits[:, 17] = (probs.log() - torch.log((1 - probs) / 999)).repeat(2)
    logits[6:] += 500.0
    logits, labels = logits.float(), torch.full((12,), 17)
    exact = logits.double().requires_grad_()
    found = statistics(exact, labels, {})
    found[0].sum().backward()
    given = dict(zip(("logprobs", "entropy", "logsumexp"), (part.detach().float() for part in found), strict=True))
    given |= {"logits": logits, "labels": labels, "g": torch.ones(12)}
    ours = interpret_one(tmp_path, given, out="=logits").double()
    torch.testing.assert_close(ours[:, 17], exact.grad[:, 17], atol=0, rtol=2e-6)
    # The other tokens' p comes from a log-sum-exp that has the rounding of a number of that size.
    torch.testing.assert_close(ours[:6], exact.grad[:6], atol=1e-9, rtol=4e-6)
    torch.testing.assert_close(ours[6:], exact.grad[6:], atol=1e-9, rtol=1e-4)


def test_rows_that_nothing_is_asked_of_get_zeros(tmp_path):
    logits = torch.randn(7, 5000)
    logits[1] = float("nan")
    logits[2] = float("-inf")
    logits[3, :4500] = float("-inf")
    labels = torch.tensor([0, 0, 0, 7, -100, 5000, 5000])
    found = [part.float() for part in statistics(logits, labels.clamp(0, 4999), {})]
    g = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    e = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    given = {"logits": logits, "labels": labels, "logsumexp": found[2], "entropy": found[1], "g": g, "e": e}
    given["entropy"][2] = 0.0
    ours = interpret_one(tmp_path, given, out=torch.full_like(logits, 9.0))
    assert not ours[[0, 1, 2, 4]].any()
    assert ours[3, 7] == 1  # an impossible label: all of it is missing
    assert ours[3, :4500].nonzero().flatten().tolist() == [7]
    assert ours[3].isfinite().all()
    assert ours[5].isnan().all()
    exact = logits[6:].double().requires_grad_()
    statistics(exact, torch.tensor([0]), {})[1].sum().backward()
    torch.testing.assert_close(ours[6:].double(), exact.grad, **close(torch.float32, 4))


def test_an_infinite_kl_stays_in_its_row(tmp_path):
    logits, ref = torch.randn(2, 40), torch.randn(2, 40)
    ref[0, 3] = float("-inf")
    labels, g = torch.tensor([1, 2]), torch.tensor([1.0, 1.0])
    parts = ("logprobs", "entropy", "logsumexp", "kl", "ref_logsumexp")
    given = dict(zip(parts, (part.float() for part in statistics(logits, labels, {}, ref)), strict=True))
    assert given["kl"][0] == float("inf")
    given |= {"logits": logits, "labels": labels, "ref_logits": ref, "g": g, "d_kl": torch.tensor([0.0, 1.0])}
    ours = interpret_one(tmp_path, given, out="=logits")
    expected = torch.nn.functional.one_hot(labels[:1], 40) - logits[:1].softmax(1)
    torch.testing.assert_close(ours[:1], expected, **close(torch.float32, 4))
    assert ours[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_buffer_gets_the_rounded_gradient(dtype, tmp_path):
    given, truth = arguments(torch.float32, (3, 1000), {}, ("e",))
    wide = torch.zeros(3, 1003, dtype=dtype)
    call = Call(FUNCTION, given | {"out": wide}, columns={"out": 1000})
    ours = interpret(tmp_path, {"only": call})["only"][-1]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), truth, atol=1e-7, rtol=torch.finfo(dtype).eps)


def test_logit_gradient_refuses_what_it_cannot_serve():
    from fastppo.kernels.logit_gradient import logit_gradient

    logits, labels, row = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    shared = torch.zeros(2, 6)
    for given, keywords, message in [
        ((logits, labels, row, row, row), {"out": torch.zeros(2, 4)}, r"out are \(2, 4\) on cpu, expected \(2, 3\)"),
        ((logits, labels, row, row, labels), {"out": logits}, r"g are torch\.int64 \(2,\), expected floating point"),
        ((logits, labels, row, row, row, row[:1]), {"out": logits}, r"e are torch\.float32 \(1,\)"),
        ((logits, labels, row, row, row), {"out": logits, "d_kl": row}, "without ref_logits, kl or ref_logsumexp"),
        ((shared[:, :3], labels, row, row, row), {"out": shared.view(4, 3)[:2]}, "shares the logits' memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            logit_gradient(*given, **keywords)

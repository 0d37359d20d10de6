"""The Triton kernels of PPO's loss, in the interpreter: elementwise, and from logits to gradient in one launch."""

import pytest
import torch
from interpreter import Call, interpret
from kernel_oracle import agree, name_of, ppo_losses, random_numbers, random_rows, statistics
from tolerances import close

pytest.importorskip("triton", reason="triton has no wheel for this platform")

LOSS, ROWS = "fastppo.kernels.ppo.ppo_loss", "fastppo.kernels.ppo.ppo_rows"
NUMBERS = {"clip_low": 0.2, "clip_high": 0.3}
TERMS = [{}, {"kl_coef": 0.1}, {"entropy_coef": 0.05}, {"kl_coef": -0.2, "entropy_coef": 0.5}]
CASES = {
    f"{name_of(dtype, shape, scaling)}-{i}-{'old' if has_old else 'new'}": (dtype, shape, scaling, TERMS[i], has_old)
    for dtype in (torch.float32, torch.float64)
    for i, shape in enumerate([(3, 1), (5, 7), (5, 130), (3, 9001)])
    for scaling in ({}, {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5})
    for has_old in (True, False)
}


def arguments(dtype: torch.dtype, shape: tuple[int, int], scaling: dict, terms: dict, has_old: bool) -> dict:
    logits, labels = random_rows(dtype, *shape)
    logprobs = statistics(logits, labels, scaling)[0].to(dtype)
    count = shape[0]
    # Ratios of 1 within and beyond the clip on either side, advantages of either sign, a weight of 0.
    old = logprobs + torch.linspace(-0.5, 0.5, count, dtype=dtype) if has_old else None
    advantages, weights = random_numbers(dtype, count, 3), torch.linspace(0, 1, count, dtype=dtype)
    given = {"logits": logits, "labels": labels, "old_logprobs": old, "advantages": advantages, "weights": weights}
    ref = {"ref_logprobs": logprobs - random_numbers(dtype, count, 4)} if "kl_coef" in terms else {}
    return given | ref | scaling | terms | NUMBERS


def oracle(given: dict, scaling: dict) -> tuple[torch.Tensor, ...]:
    """Return losses, logprobs, entropies and the gradient of the logits."""
    exact = given["logits"].double().requires_grad_()
    logprobs, entropy, _ = statistics(exact, given["labels"], scaling)
    tensors = given["old_logprobs"], given.get("ref_logprobs"), given["advantages"], given["weights"]
    losses = ppo_losses(logprobs, entropy, *tensors, given)
    losses.sum().backward()
    return losses, logprobs, entropy, exact.grad


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    calls = {}
    for name, case in CASES.items():
        given = arguments(*case)
        calls[name] = Call(ROWS, given | {"out": torch.full_like(given["logits"], float("nan"))})
        calls[f"{name} in place"] = Call(ROWS, given | {"out": "=logits"})
        calls[f"{name} without"] = Call(ROWS, given | {"out": None})
    return interpret(tmp_path_factory.mktemp("interpreter"), calls)


@pytest.mark.parametrize("name", CASES)
def test_rows_agree_with_autograd(name, interpreted):
    given, scaling = arguments(*CASES[name]), CASES[name][2]
    quantities = ("losses", "logprobs", "entropies", "gradient")
    for quantity, ours, truth in zip(quantities, interpreted[name], oracle(given, scaling), strict=True):
        assert ours.dtype == given["logits"].dtype
        agree(ours, truth, given["logits"], scaling, f"{quantity} of {name}")


@pytest.mark.parametrize("name", CASES)
def test_where_the_gradient_goes_changes_no_bit(name, interpreted):
    for beside, in_place in zip(interpreted[name], interpreted[f"{name} in place"], strict=True):
        assert beside.equal(in_place)
    for beside, without in zip(interpreted[name], interpreted[f"{name} without"], strict=False):
        assert beside.equal(without)


def test_the_fused_rows_are_the_composition_of_the_parts(tmp_path):
    terms, scaling, calls = TERMS[3], {"temperature": 0.7, "softcap": 9.0}, {}
    for dtype in (torch.float32, torch.float64):
        given = arguments(dtype, (5, 9001), {}, terms, True) | {"out": "=logits"}
        calls[f"fused {dtype}"] = Call(ROWS, given | scaling)
        calls[f"composed {dtype}"] = Call("kernel_functions.composed_rows", given | {"shape": scaling})
    found = interpret(tmp_path, calls)
    for dtype in (torch.float32, torch.float64):
        for fused, composed in zip(found[f"fused {dtype}"], found[f"composed {dtype}"], strict=True):
            torch.testing.assert_close(fused, composed, **close(dtype, 2))


def test_a_row_does_not_depend_on_the_others(interpreted, tmp_path):
    """Computed again, alone and in another place, a row has the same bits."""
    name = "float32-3x9001-0.7-5.0-0.5-3-old"
    given = arguments(*CASES[name])
    alone = {
        key: value[1:2] if isinstance(value, torch.Tensor) else value for key, value in given.items() if key != "out"
    }
    twice = {"again": Call(ROWS, given | {"out": "=logits"}), "alone": Call(ROWS, alone | {"out": "=logits"})}
    found = interpret(tmp_path, twice)
    for first, again, single in zip(interpreted[name], found["again"], found["alone"], strict=True):
        assert first.equal(again)
        assert first[1:2].equal(single)


def test_gradcheck_of_the_losses(tmp_path):
    logits, labels = random_rows(torch.float64, 3, 5)
    old = statistics(logits, labels, {})[0] + torch.tensor([0.0, 0.6, -0.6])
    given = {"logits": logits, "labels": labels, "old": old}
    given |= {"advantages": torch.tensor([1.0, 2.0, 0.5]).double(), "weights": torch.tensor([1.0, 0.5, 2.0]).double()}
    given |= {"ref_logprobs": old - 1, "kl_coef": 0.3, "entropy_coef": 0.2, **NUMBERS}
    cases = {"plain": {}, "capped": {"temperature": 0.8, "softcap": 6.0, "logit_scale": 1.5}}
    calls = {name: Call("kernel_functions.check_losses", given | more) for name, more in cases.items()}
    assert interpret(tmp_path, calls) == dict.fromkeys(cases, (torch.tensor(True),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_tokens_at_the_edges(dtype, tmp_path):
    """Near and far from the ends of the clip, in fp32 also past its range, for advantages of either sign and of 0."""
    log_ratios, advantages = [0, 0.125, -0.125, 0.5, -0.5, 5, -50, 100, -1000], [1.0, -1.0, 0.0]
    grid = torch.cartesian_prod(torch.tensor(log_ratios, dtype=dtype), torch.tensor(advantages, dtype=dtype))
    # Multiples of 1/64, of which a difference is exact.
    old = (random_numbers(dtype, len(grid), 1) * 64).round() / 64
    tokens = {"logprobs": old + grid[:, 0], "old_logprobs": old, "ref_logprobs": old - 0.5, "advantages": grid[:, 1]}
    numbers = NUMBERS | {"kl_coef": 0.25}
    given = tokens | numbers | {"weights": torch.linspace(0.5, 2, len(grid), dtype=dtype)}
    exact = given["logprobs"].double().requires_grad_()
    truth = ppo_losses(exact, None, old, given["ref_logprobs"], given["advantages"], given["weights"], numbers)
    truth.sum().backward()
    losses, g = interpret(tmp_path, {"only": Call(LOSS, given)})["only"]
    torch.testing.assert_close(losses, truth.detach().to(dtype), **close(dtype, 2))
    torch.testing.assert_close(g, exact.grad.to(dtype), **close(dtype, 2))


def test_at_the_very_ends_of_the_clip_the_gradient_is_that_inside(tmp_path):
    """exp(log 2) and a clip at 2 are one number in both places; autograd's clamp passes the gradient there."""
    log_2 = torch.tensor([2.0]).log()
    assert log_2.exp() == 2
    given = {"logprobs": log_2.repeat(2), "old_logprobs": torch.zeros(2), "advantages": torch.tensor([1.0, -1.0])}
    call = Call(LOSS, given | {"weights": torch.ones(2), "clip_low": 0.5, "clip_high": 1.0})
    losses, g = interpret(tmp_path, {"only": call})["only"]
    assert losses.tolist() == [-2.0, 2.0]
    assert g.tolist() == [-2.0, 2.0]


def test_a_weight_of_0_silences_whatever_is_in_a_row(tmp_path):
    logits, labels = torch.randn(4, 200), torch.tensor([-100, 3, 3, 3])
    logits[1] = float("nan")
    logits[2] = float("-inf")
    nan = torch.tensor([float("nan"), 0.0, -1.0, float("-inf")])
    rows = {"logits": logits, "labels": labels, "old_logprobs": nan, "ref_logprobs": nan, "advantages": nan}
    given = rows | NUMBERS | {"weights": torch.zeros(4), "kl_coef": 0.1, "entropy_coef": 0.1, "out": "=logits"}
    losses, logprobs, _, gradient = interpret(tmp_path, {"only": Call(ROWS, given)})["only"]
    assert losses.eq(0).all()
    assert gradient.eq(0).all()
    assert logprobs[:2].isnan().all()
    assert logprobs[2] == float("-inf")
    assert logprobs[3].isfinite()


def test_ppo_refuses_what_it_cannot_serve():
    from fastppo.kernels.ppo import ppo_loss, ppo_rows

    row, logits, labels = torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for change, message in [
        ({"clip_low": -0.1}, r"clip_low is -0\.1"),
        ({"clip_high": float("nan")}, "clip_high is nan"),
        ({"kl_coef": 0.1}, r"kl_coef is 0\.1 without ref_logprobs"),
        ({"ref_logprobs": row[:1]}, r"ref_logprobs are torch\.float32 \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ppo_loss(row, row, row, row, **NUMBERS | change)
        with pytest.raises(ValueError, match=message):
            ppo_rows(logits, labels, row, row, row, out=None, **NUMBERS | change)
    with pytest.raises(ValueError, match=r"logprobs are torch\.bfloat16"):
        ppo_loss(row.bfloat16(), row, row, row, **NUMBERS)
    with pytest.raises(ValueError, match=r"out are \(2, 4\)"):
        ppo_rows(logits, labels, None, row, row, out=torch.zeros(2, 4), **NUMBERS)
    assert [part.shape for part in ppo_loss(row[:0], row[:0], row[:0], row[:0], **NUMBERS)] == [(0,)] * 2

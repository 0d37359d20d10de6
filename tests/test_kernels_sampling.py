"""The Triton kernel that draws tokens, in the interpreter, against sorted torch and Philox in plain integers."""

import math

import pytest
import torch
from interpreter import Call, interpret
from kernel_oracle import check_draws, name_of, philox, random_rows
from tolerances import close

pytest.importorskip("triton", reason="triton has no wheel for this platform")

FUNCTION = "fastppo.kernels.sampling.sample"
# V of less than a block of 128, of a few, and of more than the 4096 tokens that are read at a time.
SHAPES = [(3, 1), (5, 7), (4, 130), (1, 1000), (2, 5001)]
LIMITS = [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.5}, {"top_k": 1}, {"top_p": 1e-6}]
SCALINGS = [{}, {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.3}, {"temperature": 3.0}]
SEEDS = [0, 2**63 + 12345, -7]
CASES = {
    f"{name_of(dtype, shape, SCALINGS[i % 3])}-{limits}": (dtype, shape, SCALINGS[i % 3], limits, SEEDS[i % 3])
    for dtype in (torch.float32, torch.float64)
    for number, shape in enumerate(SHAPES)
    for i, limits in enumerate(LIMITS[number % 2 :: 2], start=number)
}


def test_the_oracle_of_philox_has_the_published_first_word():
    assert philox(0, 0, 0) == 0x6627E8D5  # Random123's known answer


def arguments(dtype: torch.dtype, shape: tuple[int, int], scaling: dict, limits: dict, seed: int) -> dict:
    logits, _ = random_rows(dtype, *shape)
    rows = torch.arange(shape[0])
    given = {"logits": logits, "seed": seed, "requests": rows + 2**33 - 1, "positions": 11 * rows, **scaling, **limits}
    if shape[1] > 1 and shape[1] != 1000:
        # The most probable token of a row, one of no row, and one past the end.
        given["forbidden_ids"] = torch.tensor([int(logits[0].argmax()), 3, shape[1] + 5])
        if shape[1] != 130:
            given["is_forbidden"] = rows % 3 != 1
    return given


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    calls = {name: Call(FUNCTION, arguments(*case)) for name, case in CASES.items()}
    return interpret(tmp_path_factory.mktemp("interpreter"), calls)


@pytest.mark.parametrize("name", CASES)
def test_draws_invert_the_cumulative_distribution(name, interpreted):
    dtype, _, scaling, limits, _ = CASES[name]
    check_draws(interpreted[name], arguments(*CASES[name]), scaling, limits, 1e-5 if dtype == torch.float32 else 1e-12)


def draw(folder, logits: torch.Tensor, **more) -> tuple[torch.Tensor, ...]:
    rows = torch.arange(len(logits))
    call = Call(FUNCTION, {"logits": logits, "seed": 5, "requests": rows, "positions": rows} | more)
    return interpret(folder, {"only": call})["only"]


@pytest.mark.slow
def test_of_equal_logits_top_k_leaves_all_and_top_p_the_first(tmp_path):
    flat, steps = torch.zeros(16, 200), torch.arange(200.0).div(50).floor().flip(0).repeat(16, 1)
    flat[:, ::2] = -0.0
    rows = torch.arange(16)
    common = {"seed": 5, "requests": rows, "positions": rows}
    calls = {
        "flat top_k": Call(FUNCTION, common | {"logits": flat, "top_k": 3}),
        "flat top_p": Call(FUNCTION, common | {"logits": flat, "top_p": 0.25}),
        "steps top_k": Call(FUNCTION, common | {"logits": steps, "top_k": 51}),
        "steps top_p": Call(FUNCTION, common | {"logits": steps, "top_p": 0.8}),
        "steps both": Call(FUNCTION, common | {"logits": steps, "top_k": 50, "top_p": 0.5}),
    }
    found = interpret(tmp_path, calls)
    weights = torch.tensor([3.0, 2.0, 1.0, 0.0]).exp()
    classes = 50 * weights
    # All of the first class, and as many of the second as it takes.
    second = math.ceil((0.8 * classes.sum() - classes[0]) / weights[1])
    for name, number, mass in [
        ("flat top_k", 200, 1.0),
        ("flat top_p", 50, 0.25),
        ("steps top_k", 100, classes[:2].sum() / classes.sum()),
        ("steps top_p", 50 + second, (classes[0] + second * weights[1]) / classes.sum()),
        ("steps both", 25, 0.5 * classes[0] / classes.sum()),
    ]:
        tokens, kept = found[name][0], found[name][3]
        assert 0.5 * number <= tokens.max() < number
        torch.testing.assert_close(kept, torch.full((16,), float(mass)), **close(torch.float32, 2))


def test_what_is_impossible_is_never_drawn(tmp_path):
    logits = torch.randn(24, 5000)
    logits[:8, 300:] = float("-inf")
    logits[8:16, :4700] = -1e4  # underflows to 0
    logits[16:, 1:4999] = float("-inf")
    tokens, logprobs, _, kept = draw(tmp_path, logits)
    assert (tokens[:8] < 300).all()
    assert (tokens[8:16] >= 4700).all()
    assert set(tokens[16:].tolist()) == {0, 4999}
    assert logprobs.isfinite().all()
    assert kept.eq(1).all()


def test_allowed_tokens_far_below_the_forbidden_are_drawn_all_the_same(tmp_path):
    # e^-1200 is 0, so the allowed tokens have no mass to be seen beside the forbidden one.
    logits = torch.full((30, 9), -3.0)
    logits[:, 0], logits[:, 5], logits[:, 7] = 1200.0, 3.0, 3.0
    given = {"forbidden_ids": torch.tensor([0]), "is_forbidden": torch.ones(30, dtype=torch.bool), "top_p": 0.9}
    tokens, logprobs, entropies, kept = draw(tmp_path, logits, **given)
    assert set(tokens.tolist()) == {5, 7}
    assert kept.eq(0).all()
    assert entropies.eq(0).all()
    assert logprobs.eq(-1197).all()


def test_rows_that_allow_nothing(tmp_path):
    logits = torch.zeros(3, 300)
    logits[0] = logits[1, 1:] = float("-inf")
    logits[2, 5] = float("nan")
    given = {"forbidden_ids": torch.tensor([0]), "is_forbidden": torch.tensor([False, True, False])}
    tokens, logprobs, _, kept = draw(tmp_path, logits, top_k=2, top_p=0.9, **given)
    assert tokens[:2].tolist() == [0, 0]
    assert kept[:2].tolist() == [0, 0]
    assert 0 <= tokens[2] < 300
    assert logprobs.isnan().all()


def test_a_draw_does_not_depend_on_the_others(interpreted, tmp_path):
    name = next(name for name in CASES if name.startswith("float32-2x5001") and "top_p" in name)
    given = arguments(*CASES[name])
    alone = {key: value[1:2] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    alone["forbidden_ids"] = given["forbidden_ids"]
    for together, single in zip(interpreted[name], draw(tmp_path, **alone), strict=True):
        assert together[1:2].equal(single)


def test_sample_refuses_what_it_cannot_serve():
    from fastppo.kernels.sampling import sample

    logits, rows = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for change, message in [
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0\.0, expected a number in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"forbidden_ids": rows, "is_forbidden": rows}, r"is_forbidden are torch\.int64"),
        ({"forbidden_ids": rows.int(), "is_forbidden": rows > 0}, r"forbidden_ids are torch\.int32"),
        ({"temperature": 0.0}, "argmax is greedy choice"),
        ({"requests": rows[:1]}, r"requests are torch\.int64 \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(**{"logits": logits, "seed": 0, "requests": rows, "positions": rows} | change)
    assert [part.shape for part in sample(logits[:0], 0, rows[:0], rows[:0])] == [(0,)] * 4

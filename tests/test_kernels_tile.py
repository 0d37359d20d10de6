"""The Triton kernel of the head's statistics by tiles, without logits in memory, in the interpreter."""

import math

import pytest
import torch
from interpreter import Call, interpret
from kernel_oracle import statistics
from tolerances import close

pytest.importorskip("triton", reason="triton has no wheel for this platform")

FUNCTION = "fastppo.kernels.tile_statistics.tile_statistics"
SCALINGS = [{}, {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.5}, {"temperature": 0.05}]
# (T, H, V): less than a tile each way, exactly one, one and a little; groups of tiles of tokens are 8.
SHAPES = {
    torch.float16: [(1, 64, 1), (5, 48, 130), (130, 64, 257)],
    torch.float32: [(3, 7, 1), (64, 32, 64), (70, 33, 1000)],
    torch.float64: [(1, 5, 7), (16, 16, 32), (150, 17, 70)],
}
CASES = {
    f"{dtype}-{shape}-{i}-{'bias' if has_bias else 'none'}".replace("torch.", ""): (dtype, shape, SCALINGS[i], has_bias)
    for dtype, shapes in SHAPES.items()
    for number, shape in enumerate(shapes)
    for i, has_bias in [(number, True), ((number + 1) % 3, False)]
}


def arguments(dtype: torch.dtype, shape: tuple[int, int, int], scaling: dict, has_bias: bool) -> dict:
    generator = torch.Generator().manual_seed(4)
    tokens, size, vocabulary = shape
    given = {"hidden": torch.randn(tokens, size, generator=generator).to(dtype)}
    given["weight"] = (3 * torch.randn(vocabulary, size, generator=generator) / size**0.5).to(dtype)
    given["labels"] = torch.randint(vocabulary, (tokens,), generator=generator)
    given["labels"][0], given["labels"][-1] = vocabulary - 1, 0
    return given | ({"bias": torch.randn(vocabulary, generator=generator).to(dtype)} if has_bias else {}) | scaling


def oracle(given: dict, scaling: dict) -> tuple[torch.Tensor, ...]:
    bias = given["bias"].double() if "bias" in given else None
    logits = torch.nn.functional.linear(given["hidden"].double(), given["weight"].double(), bias)
    return statistics(logits, given["labels"], scaling)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    calls = {}
    for name, case in CASES.items():
        given = arguments(*case)
        # Rows of the head that lie further apart than they are long.
        padded = {"weight": torch.nn.functional.pad(given["weight"], (0, 3), value=float("nan"))}
        calls[name] = Call(FUNCTION, given | padded, {"weight": case[1][1]})
    return interpret(tmp_path_factory.mktemp("interpreter"), calls)


@pytest.mark.parametrize("name", CASES)
def test_tile_statistics_agree_with_log_softmax_in_fp64(name, interpreted):
    dtype, _, scaling, _ = CASES[name]
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    # A product of H numbers is rounded H times before it is divided by the temperature.
    tolerance = close(accumulated, 4 * max(1, 0.5 / scaling.get("temperature", 1)))
    for ours, truth in zip(interpreted[name], oracle(arguments(*CASES[name]), scaling), strict=True):
        assert ours.dtype == accumulated
        torch.testing.assert_close(ours.double(), truth, **tolerance)


def test_tiles_of_nothing_and_labels_that_do_not_exist(tmp_path):
    """A bias of -inf excludes a first tile, a middle one or all; a label outside the vocabulary has no log-prob."""
    inf, log = float("inf"), math.log
    rows = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(200, 8), "labels": torch.tensor([199, 0, -1, 200])}
    bias = {name: torch.zeros(200) for name in ("first", "middle", "all")}
    bias["first"][:70], bias["middle"][60:130], bias["all"][:] = -inf, -inf, -inf
    found = interpret(tmp_path, {name: Call(FUNCTION, rows | {"bias": each}) for name, each in bias.items()})
    nan = float("nan")
    for name, logprobs, mass in [
        ("first", [-log(130), -inf, nan, nan], log(130)),
        ("middle", [-log(130), -log(130), nan, nan], log(130)),
        ("all", [-inf, -inf, nan, nan], -inf),
    ]:
        expected = torch.tensor(logprobs), torch.full((4,), max(mass, 0.0)), torch.full((4,), mass)
        for ours, truth in zip(found[name], expected, strict=True):
            torch.testing.assert_close(ours, truth, **close(torch.float32, 2), equal_nan=True)


def test_a_token_does_not_depend_on_the_others(interpreted, tmp_path):
    name = next(name for name in CASES if name.startswith("float32-(70"))
    given = arguments(*CASES[name])
    alone = given | {"hidden": given["hidden"][66:69], "labels": given["labels"][66:69]}
    found = interpret(tmp_path, {"again": Call(FUNCTION, given), "alone": Call(FUNCTION, alone)})
    for first, again, single in zip(interpreted[name], found["again"], found["alone"], strict=True):
        assert first.equal(again)
        torch.testing.assert_close(first[66:69], single, **close(torch.float32))


def test_tile_statistics_refuse_what_they_cannot_serve():
    from fastppo.kernels.tile_statistics import tile_statistics

    hidden, weight, labels = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
    for arguments, keywords, message in [
        (
            (hidden[:, :3], weight, labels),
            {},
            r"hidden is torch\.float32 \(2, 3\) on cpu and weight torch\.float32",
        ),
        ((hidden, weight.double(), labels), {}, r"weight torch\.float64"),
        ((hidden, weight.t().contiguous().t(), labels), {}, r"weight have strides \(1, 3\)"),
        ((hidden, weight, labels[:1]), {}, r"labels are torch\.int64 \(1,\)"),
        ((hidden, weight, labels), {"bias": torch.zeros(4)}, r"bias is \(4,\) on cpu, expected \(3,\)"),
        ((hidden, weight, labels), {"temperature": -1.0}, r"temperature is -1\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            tile_statistics(*arguments, **keywords)
    assert [part.shape for part in tile_statistics(hidden[:0], weight, labels[:0])] == [(0,)] * 3

"""The Triton kernel of row statistics, in the interpreter: log-prob, entropy, log-sum-exp and KL of each row."""

import math

import pytest
import torch
from interpreter import Call, interpret
from kernel_oracle import OTHER_SCALING, SCALINGS, SHAPES, agree, name_of, random_rows, statistics
from tolerances import close

pytest.importorskip("triton", reason="triton has no wheel for this platform")

FUNCTION = "fastppo.kernels.row_statistics.row_statistics"
NAMES = ("logprobs", "entropy", "logsumexp", "kl", "ref_logsumexp")
# Every other shape beside a reference of another scaling, and padded, so that a row is longer than the vocabulary.
CASES = {
    name_of(dtype, shape, scaling): (dtype, shape, scaling, (i + j) % 2 == 0)
    for dtype in (torch.float32, torch.float64)
    for i, shape in enumerate(SHAPES)
    for j, scaling in enumerate(SCALINGS)
}


def arguments(dtype: torch.dtype, shape: tuple[int, int], scaling: dict[str, float], has_ref: bool) -> dict:
    logits, labels = random_rows(dtype, *shape)
    found = {"logits": logits, "labels": labels, **scaling}
    return (
        found | {"ref_logits": random_rows(dtype, *shape, seed=2)[0], "ref_shape": OTHER_SCALING} if has_ref else found
    )


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    calls = {}
    for name, case in CASES.items():
        found, has_ref = arguments(*case), case[-1]
        if has_ref:
            found["logits"] = torch.nn.functional.pad(found["logits"], (0, 3), value=float("nan"))
        calls[name] = Call(FUNCTION, found, {"logits": case[1][1]} if has_ref else {})
    return interpret(tmp_path_factory.mktemp("interpreter"), calls)


@pytest.mark.parametrize("name", CASES)
def test_row_statistics_agree_with_log_softmax_in_fp64(name, interpreted):
    found, scaling = arguments(*CASES[name]), CASES[name][2]
    truths = statistics(found["logits"], found["labels"], scaling, found.get("ref_logits"), OTHER_SCALING)
    for quantity, ours, truth in zip(NAMES, interpreted[name], truths, strict=False):
        assert ours.dtype == found["logits"].dtype
        agree(ours, truth, found["logits"], scaling, f"{quantity} of {name}")
    assert len(interpreted[name]) == len(truths)


def test_bf16_rows_are_accumulated_in_fp32(tmp_path):
    """fp16 and bf16 logits are read as they are: the statistics are those of the rounded logits."""
    calls, truths = {}, {}
    for dtype in (torch.float16, torch.bfloat16):
        logits, labels = random_rows(dtype, 3, 1000)
        calls[str(dtype)] = Call(FUNCTION, {"logits": logits, "labels": labels})
        truths[str(dtype)] = statistics(logits, labels, {})
    for name, parts in interpret(tmp_path, calls).items():
        for ours, truth in zip(parts, truths[name], strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), truth, **close(torch.float32, 4))


def edge_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and labels: -inf tails, a leading -inf block, all -inf, huge, NaN, labels just out of range."""
    logits = torch.zeros(8, 5000)
    logits[0, 3000:] = float("-inf")
    logits[1, :4097] = float("-inf")
    logits[2] = float("-inf")
    logits[3] = 1e4
    logits[4, 17] = float("nan")
    logits[5, 0] = -1e4
    return logits, torch.tensor([0, 4999, 0, 4999, 0, 0, -1, 5000])


def test_row_statistics_of_extreme_rows(tmp_path):
    logits, labels = edge_rows()
    nan, inf, log = float("nan"), float("inf"), math.log
    expected = {
        "logprobs": [-log(3000), -log(903), -inf, -log(5000), nan, -1e4 - log(4999), nan, nan],
        "entropy": [log(3000), log(903), 0.0, log(5000), nan, log(4999), log(5000), log(5000)],
        "logsumexp": [log(3000), log(903), -inf, 1e4 + log(5000), nan, log(4999), log(5000), log(5000)],
    }
    for ours, truth in zip(interpret_one(tmp_path, logits, labels), expected.values(), strict=True):
        torch.testing.assert_close(ours, torch.tensor(truth), **close(torch.float32, 4), equal_nan=True)


def interpret_one(folder, logits, labels, **more) -> tuple[torch.Tensor, ...]:
    return interpret(folder, {"only": Call(FUNCTION, {"logits": logits, "labels": labels, **more})})["only"]


def test_kl_of_extreme_rows(tmp_path):
    """Equal rows have exactly 0; tokens of probability 0 count 0; what only the reference excludes is infinite."""
    inf = float("inf")
    logits = 4 * torch.randn(7, 5000)
    logits[2, 100:4500] = -inf
    ref = logits.clone()
    ref[1] += 1e4
    ref[3, :4000], ref[3, 4000:] = 0.0, -inf
    logits[3, 4000:] = -inf
    logits[4, :4500] = -inf
    ref[5, 0] = -inf
    logits[5, 4999] = 2000.0  # beside which token 0 has a probability of 0, but not before it is seen
    ref[6, 4999] = -inf
    logits = torch.cat([logits, torch.full((1, 5000), -inf), logits[:1]])
    ref = torch.cat([ref, ref[:1], torch.full((1, 5000), -inf)])
    kl = interpret_one(tmp_path, logits, torch.zeros(9, dtype=torch.int64), ref_logits=ref)[3]
    assert kl[[0, 2, 7]].tolist() == [0, 0, 0]
    assert kl[[6, 8]].tolist() == [inf, inf]
    # Logits near 1e4 are multiples of 2^-10: that reference is a little off, and the sum of no meaning below 1e-5.
    assert abs(kl[1]) < 1e-5
    probs = logits[3, :4000].double().softmax(0)
    expected = [
        math.log(4000) + (probs * probs.log()).sum(),
        ref[4].double().logsumexp(0) - ref[4, 4500:].double().logsumexp(0),
        -ref[5].double().log_softmax(0)[4999],
    ]
    torch.testing.assert_close(kl[3:6].double(), torch.stack(expected), **close(torch.float32, 4))


def test_row_statistics_refuse_what_they_cannot_serve():
    from fastppo.kernels.row_statistics import row_statistics

    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for positional, keywords, message in [
        ((logits[0], labels), {}, r"expected floating point \(N, V\)"),
        ((logits.long(), labels), {}, "expected floating point"),
        ((torch.zeros(3, 2).t(), labels), {}, r"use \.contiguous"),
        ((logits, labels[:1]), {}, r"labels are torch\.int64 \(1,\), expected torch\.int64 \(2,\)"),
        ((logits, labels.int()), {}, r"expected torch\.int64"),
        ((logits, torch.zeros(4, dtype=torch.int64)[::2]), {}, "must lie contiguous"),
        ((logits, labels), {"temperature": 0.0}, r"temperature is 0\.0"),
        ((logits, labels), {"softcap": -1.0}, r"softcap is -1\.0"),
        ((logits, labels), {"logit_scale": float("inf")}, "logit_scale is inf"),
        ((logits, labels), {"ref_logits": torch.zeros(2, 4)}, r"ref_logits are \(2, 4\) on cpu, expected \(2, 3\)"),
        ((logits, labels), {"ref_logits": logits, "ref_shape": {"softcap": -2.0}}, r"softcap is -2\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            row_statistics(*positional, **keywords)


def test_row_statistics_of_no_rows_are_empty():
    from fastppo.kernels.row_statistics import row_statistics

    empty = torch.zeros(0, 3, dtype=torch.float64)
    for ref_logits, number in ((None, 3), (empty, 5)):
        parts = row_statistics(empty, torch.zeros(0, dtype=torch.int64), ref_logits=ref_logits)
        assert [(part.shape, part.dtype) for part in parts] == [((0,), torch.float64)] * number

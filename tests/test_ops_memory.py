"""What the head's fast paths allocate and compute, as seen by torch's dispatcher: no [rows x vocabulary], few matmuls.

Counts, not times. The sizes are such that every tensor of interest has a size of its own.
"""

import threading
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo import ops
from fastppo.ops import chunks, logit_memory

ROWS, HIDDEN, VOCABULARY, CHUNK = 400, 8, 512, 16


class Recorder(TorchDispatchMode):
    """Keeps the entries of the largest result of any operation, and counts the multiplications of matmuls."""

    def __init__(self):
        super().__init__()
        self.largest, self.multiplications, self.own = 0, 0, patch.object(chunks, "small_linear", self.small_linear)

    def __enter__(self):
        self.own.start()
        return super().__enter__()

    def __exit__(self, *reason):
        self.own.stop()
        return super().__exit__(*reason)

    def small_linear(self, x, weight, *rest, **named):
        self.multiplications += x.shape[0] * x.shape[1] * weight.shape[0]
        return ops.small_linear(x, weight, *rest, **named)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert name not in ("bmm", "linear", "matmul", "baddbmm"), f"{name} is a matmul that is not counted"
        return result


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "_MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(chunks, "_ROW_MULTIPLE", 1)
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 4 * VOCABULARY * CHUNK)


def make_inputs(is_frozen=False, dtype=torch.float32):
    hidden = torch.randn(ROWS, HIDDEN, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype).requires_grad_(not is_frozen)
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,))


def combined(logprobs, entropies, rows):
    return logprobs - 0.1 * entropies


def test_the_recorder_sees_what_the_naive_formula_does():
    hidden, weight, labels = make_inputs()
    with Recorder() as seen:
        torch.log_softmax(torch.nn.functional.linear(hidden, weight), -1)[range(ROWS), labels].sum().backward()
    assert seen.largest == ROWS * VOCABULARY
    assert seen.multiplications == 3 * ROWS * HIDDEN * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("scaling", [{}, {"softcap": 5.0, "temperature": 0.7, "logit_scale": 0.5}], ids=["", "scaled"])
def test_linear_loss_holds_one_chunk_and_takes_two_or_three_matmuls(is_frozen, dtype, scaling):
    hidden, weight, labels = make_inputs(is_frozen, dtype)
    with Recorder() as seen:
        ops.linear_loss(hidden, weight, labels, combined, **scaling).backward()
    # The gradient of a bf16 weight lies in the fp32 logits' place, twice as many numbers of half the size.
    assert seen.largest == CHUNK * VOCABULARY * (2 if dtype == torch.bfloat16 else 1)
    assert seen.multiplications == (2 if is_frozen else 3) * ROWS * HIDDEN * VOCABULARY


def test_linear_logprobs_hold_one_chunk():
    hidden, weight, labels = make_inputs()
    with Recorder() as seen:
        logprobs, entropies, _ = ops.linear_logprobs(hidden, weight, labels)
        (logprobs - entropies).sum().backward()
    assert seen.largest == CHUNK * VOCABULARY


def test_no_gradient_costs_one_matmul_and_one_chunk():
    hidden, weight, labels = make_inputs()
    with Recorder() as seen, torch.no_grad():
        ops.linear_logprobs(hidden, weight, labels)
    assert (seen.largest, seen.multiplications) == (CHUNK * VOCABULARY, ROWS * HIDDEN * VOCABULARY)
    with Recorder() as seen, torch.no_grad():
        ops.linear_loss(hidden, weight, labels, combined)
    assert (seen.largest, seen.multiplications) == (CHUNK * VOCABULARY, ROWS * HIDDEN * VOCABULARY)
    with Recorder() as seen:
        ops.linear_kl((hidden, weight), (hidden, weight))
    assert (seen.largest, seen.multiplications) == (CHUNK * VOCABULARY, 2 * ROWS * HIDDEN * VOCABULARY)


def test_rows_do_not_depend_on_those_after_them():
    hidden, weight, labels = make_inputs()
    with torch.no_grad():
        some = ops.linear_logprobs(hidden[: 2 * CHUNK], weight, labels[: 2 * CHUNK])
        every = ops.linear_logprobs(hidden, weight, labels)
    for part, whole in zip(some, every, strict=True):
        assert part.equal(whole[: 2 * CHUNK])


def passed(weight, rows):
    """Walk through the chunks of a head; return where each one's logits lie."""
    hidden = torch.ones(rows, HIDDEN, dtype=weight.dtype)
    return [chunk.logits.data_ptr() for chunk in chunks.passes(hidden, weight, None, None)]


def test_logits_of_one_pass_lie_where_those_of_the_one_before_lay():
    weight = torch.randn(VOCABULARY, HIDDEN)
    with logit_memory.keeping_logits():
        first = passed(weight, ROWS)
        assert set(first) == set(passed(weight, ROWS - CHUNK)) == set(passed(weight + 1, CHUNK))
        assert len(set(first)) == len(logit_memory._kept.memory) == 1
        passed(weight.double(), 5)  # another dtype
        assert len(logit_memory._kept.memory) == 2
        passed(torch.randn(VOCABULARY + 1, HIDDEN), 5)
        assert len(logit_memory._kept.memory) == 3
    assert logit_memory._kept.memory is None


def test_a_pass_within_a_pass_has_logits_of_its_own():
    weight = torch.randn(VOCABULARY, HIDDEN)
    with logit_memory.keeping_logits():
        passed(weight, ROWS)
        for chunk in chunks.passes(torch.ones(ROWS, HIDDEN), weight, None, None):
            before = chunk.logits.clone()
            assert chunk.logits.data_ptr() not in passed(-weight, ROWS)
            assert torch.equal(chunk.logits, before)


def test_a_larger_pass_does_not_keep_the_smaller_ones_logits():
    weight = torch.randn(VOCABULARY, HIDDEN)
    with logit_memory.keeping_logits():
        passed(weight, 3)
        passed(weight, ROWS)
        (kept,) = logit_memory._kept.memory
        assert len(kept) == CHUNK


def test_threads_keep_nothing_of_each_other():
    is_open, may_end = threading.Event(), threading.Event()

    def use():
        with logit_memory.keeping_logits():
            is_open.set()
            may_end.wait(10)

    other = threading.Thread(target=use)
    with logit_memory.keeping_logits():  # ends while the other goes on
        other.start()
        is_open.wait(10)
        assert logit_memory._kept.memory == []
    assert logit_memory._kept.memory is None
    may_end.set()
    other.join()
    assert logit_memory._kept.memory is None

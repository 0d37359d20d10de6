"""Which backend serves an operation, and what is said when it cannot."""

from types import SimpleNamespace

import pytest
import torch

from fastppo import ops
from fastppo.ops import backends


def test_use_backend_is_undone_also_by_an_error():
    host = torch.device("cpu")
    before = ops.backend(host)
    with ops.use_backend("reference"):
        assert ops.backend(host) == "reference"
    assert ops.backend(host) == before
    with pytest.raises(ValueError, match="do not fit"), ops.use_backend("reference"):
        ops.pack([1, 2, 3], 1, 1)
    assert ops.backend(host) == before


def test_use_backend_refuses_what_cannot_be_had(monkeypatch):
    expected = r"'fast'; expected one of auto, reference, native, triton"
    with pytest.raises(ValueError, match=expected), ops.use_backend("fast"):
        pass
    monkeypatch.setattr(backends, "_native", object())
    with ops.use_backend("native"), pytest.raises(RuntimeError, match=r"host memory, got one on cuda"):
        ops.backend(torch.device("cuda"))
    monkeypatch.setattr(backends, "_native", None)
    assert ops.backend(torch.device("cpu")) == "reference"
    with pytest.raises(RuntimeError, match=r"without its C\+\+ extension"), ops.use_backend("native"):
        pass


def test_without_the_extension_the_reference_serves(monkeypatch):
    monkeypatch.setattr(backends, "_native", None)
    rewards, values = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    assert ops.gae(rewards, values, torch.tensor([0, 2]), 1.0, 1.0).tolist() == [0.5, 0.5]
    assert ops.pack([5, 3, 2, 4], 2, 2).tolist() == [0, 1, 1, 0]


def test_on_device_makes_the_device_of_a_cuda_tensor_the_current_one():
    with backends.on_device(torch.zeros(1)) as nothing:
        assert nothing is None
    there = backends.on_device(SimpleNamespace(is_cuda=True, device=torch.device("cuda:1")))
    assert isinstance(there, torch.cuda.device)
    assert there.idx == 1

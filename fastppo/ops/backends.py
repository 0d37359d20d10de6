"""The choice of a backend: native (C++) in host memory, triton on CUDA, reference (plain PyTorch) everywhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

try:
    import fastppo._native as _native
except ImportError:  # built without a compiler: everything still runs, in Python
    _native = None  # type: ignore[assignment]

BACKENDS = ("auto", "reference", "native", "triton")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_choice = "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every operation inside: auto, reference, native or triton. Raises if it cannot be had."""
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    if name == "native" and _native is None:
        raise RuntimeError("backend 'native' was asked for, but fastppo was installed without its C++ extension")
    if name == "triton" and not _HAS_TRITON:
        raise RuntimeError(
            "backend 'triton' was asked for, but the package triton is not installed: pip install triton"
        )
    previous, _choice = _choice, name
    try:
        yield
    finally:
        _choice = previous


def backend(device: torch.device) -> str:
    """Return the name of the backend that serves tensors of this device: native, triton or reference."""
    is_host, is_cuda = device.type == "cpu", device.type == "cuda"
    if _choice == "native" and not is_host:
        raise RuntimeError(f"backend 'native' serves tensors in host memory, got one on {device}")
    if _choice == "triton" and not is_cuda and not is_interpreting():
        raise RuntimeError(f"backend 'triton' serves CUDA tensors, got one on {device}; TRITON_INTERPRET=1 emulates")
    if _choice == "auto":
        if is_host:
            return "reference" if _native is None else "native"
        return "triton" if is_cuda and _HAS_TRITON else "reference"
    return _choice


def is_interpreting() -> bool:
    """Whether Triton emulates its kernels on the CPU, as its environment variable asks it to."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def native() -> Any:
    """Return the C++ extension; only to be called where `backend` said native."""
    return _native


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make a CUDA tensor's device the current one, where Triton launches; on the CPU do nothing."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()

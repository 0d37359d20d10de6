"""The choice of a backend: native (C++) in host memory, triton on CUDA, reference (plain PyTorch) everywhere."""

from __future__ import annotations

import importlib.util
import os
import sys
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
_rehearsed: tuple[str, int] | None = None  # the device that meta tensors stand for, and its bytes
# What works on numbers of the host, which a rehearsal has.
_ON_HOST = ("pack", "gae", "checksum")


def _leave_triton_unloaded() -> None:
    """Let torch, where it is built for CPUs alone, take triton for missing: it would load 70 MB that nothing can use.

    torch asks once, when transformers is imported; fastppo and the user can import triton all the same.
    """
    is_for_cpus = torch.version.cuda is None and torch.version.hip is None and not torch.xpu._is_compiled()
    if not is_for_cpus or "triton" in sys.modules:
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("torch.utils._triton").has_triton_package()
    except (ImportError, AttributeError):  # not torch's public interface
        pass
    finally:
        del sys.modules["triton"]


_leave_triton_unloaded()


class _Silent:
    """The C++ kernels for tensors without contents: they are called, and do nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_native, name) if name in _ON_HOST else lambda *arguments: None


@contextmanager
def rehearsing(kind: str, memory: int) -> Iterator[None]:
    """Let meta tensors take, inside, the way of tensors on a device of this kind, cpu or cuda, with `memory` bytes.

    Kernels do nothing, so that a pass makes all the tensors that it would make there, and computes nothing.
    """
    global _rehearsed
    previous, _rehearsed = _rehearsed, (kind, memory)
    try:
        yield
    finally:
        _rehearsed = previous


def kind_of(device: torch.device) -> str:
    """Return the type of a device; of meta, in a rehearsal, that of the device that it stands for."""
    return _rehearsed[0] if _rehearsed is not None and device.type == "meta" else device.type


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a CUDA device, or of the one that is rehearsed for."""
    if _rehearsed is not None and device.type == "meta":
        return _rehearsed[1]
    return int(torch.cuda.get_device_properties(device).total_memory)


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
    is_rehearsed = _rehearsed is not None and device.type == "meta"
    is_host, is_cuda = device.type == "cpu" or is_rehearsed, device.type == "cuda"
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
    return _native if _rehearsed is None else _Silent()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make a CUDA tensor's device the current one, where Triton launches; on the CPU do nothing."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()

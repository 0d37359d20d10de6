"""The draw of a token from each row of raw logits, on the backend that serves the tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastppo import reference_sampling
from fastppo.ops.backends import backend, native, on_device
from fastppo.ops.row_types import Scaling

# Fewer logits than this are drawn from sooner than a second thread has woken up.
_MIN_PARALLEL = 2**15


def sample_tokens(
    logits: Tensor,
    seed: int,
    requests: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbidden_ids: Tensor | None = None,
    is_forbidden: Tensor | None = None,
    greedy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (tokens (N,) int64, logprobs, entropies, kept_mass), the last three (N,) fp32, of raw logits (N, V).

    A token is a function of its row, of seed, and of its request and position, (N,) int64 each: not of the batch.
    Rows with `is_forbidden` (N,) bool, every row if None, may not draw `forbidden_ids` (E,) int64. Log-probs and
    entropies are those of all tokens at the temperature; kept_mass is the probability of those that could be drawn.
    A log-prob of NaN marks a row in which nothing can be drawn; its other results mean nothing. Raises ValueError.
    Defined by `reference_sampling.sample_tokens`.
    """
    scaling = Scaling(temperature, softcap, logit_scale)
    _check_scalars(scaling, top_k, top_p)
    _check_tensors(logits, requests, positions, forbidden_ids, is_forbidden)
    logits, requests, positions, *forbidden = _dense(logits, requests, positions, forbidden_ids, is_forbidden)
    kind = backend(logits.device)
    if kind == "native" and logits.dtype in (torch.float32, torch.bfloat16):
        limits = (top_k, top_p, greedy)
        return _sample_natively(logits, (seed, requests, positions), scaling, limits, (forbidden[0], forbidden[1]))
    more: dict[str, Any] = scaling._asdict() | {"top_k": top_k, "top_p": top_p}
    more |= {"forbidden_ids": forbidden[0], "is_forbidden": forbidden[1]}
    if kind == "triton" and not greedy:
        from fastppo.kernels.sampling import sample

        with on_device(logits):
            return sample(logits, seed, requests, positions, **more)  # type: ignore[no-any-return]
    return reference_sampling.sample_tokens(logits, seed, requests, positions, **more, greedy=greedy)


def _dense(logits: Tensor, *numbers: Tensor | None) -> Any:
    """Return all as the kernels read them: numbers side by side, rows of logits at any distance, but dense."""
    # A clone, for contiguous() leaves the strides of (N, 1).
    dense = logits if logits.stride(1) == 1 else logits.clone(memory_format=torch.contiguous_format)
    return dense, *(None if part is None else part.contiguous() for part in numbers)


def _sample_natively(
    logits: Tensor,
    numbers: tuple[int, Tensor, Tensor],
    scaling: Scaling,
    limits: tuple[int, float, bool],
    forbidden: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.empty(len(logits), dtype=torch.int64)
    logprobs, entropies, kept_mass = torch.empty(3, len(logits))
    *arguments, threads = row_arguments(logits, numbers, scaling, limits, forbidden)
    out = tuple(part.data_ptr() for part in (tokens, logprobs, entropies, kept_mass))
    native().sample_tokens(*arguments, out, threads)
    return tokens, logprobs, entropies, kept_mass


def row_arguments(
    logits: Tensor,
    numbers: tuple[int, Tensor, Tensor],
    scaling: Scaling,
    limits: tuple[int, float, bool],
    forbidden: tuple[Tensor | None, Tensor | None],
) -> tuple[Any, ...]:
    """Return how the C++ code is told of rows that are dense and have been checked, the threads last."""
    seed, requests, positions = numbers
    addresses = [0 if part is None else part.data_ptr() for part in (requests, positions, *forbidden)]
    return (
        tuple(logits.shape),
        (logits.data_ptr(), logits.stride(0), logits.dtype == torch.bfloat16),
        (scaling.logit_scale, scaling.softcap or 0.0, scaling.temperature),
        (seed & 0xFFFFFFFFFFFFFFFF, *addresses[:2]),
        limits,
        (addresses[2], 0 if forbidden[0] is None else len(forbidden[0]), addresses[3]),
        torch.get_num_threads() if logits.numel() >= _MIN_PARALLEL else 1,
    )


def _check_scalars(scaling: Scaling, top_k: int, top_p: float) -> None:
    """Raise ValueError for scalars that give no distribution to draw from."""
    checks = [
        ("temperature", scaling.temperature, scaling.temperature > 0, "a finite number above 0; greedy=True is argmax"),
        ("logit_scale", scaling.logit_scale, scaling.logit_scale > 0, "a finite number above 0"),
        ("softcap", scaling.softcap, scaling.softcap is None or scaling.softcap >= 0, "None or a finite number >= 0"),
        ("top_k", top_k, top_k >= 0, "at least 0; 0 keeps all tokens"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1; 1 keeps all tokens"),
    ]
    for name, value, is_right, expectation in checks:
        if not is_right or not math.isfinite(value or 0):
            raise ValueError(f"{name} is {value}, expected {expectation}")


def _check_tensors(
    logits: Tensor, requests: Tensor, positions: Tensor, forbidden_ids: Tensor | None, is_forbidden: Tensor | None
) -> None:
    """Raise ValueError unless the shapes, dtypes and devices belong together."""
    if logits.dim() != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, expected floating point (N, V) with V >= 1")
    rows = tuple(logits.shape[:1])
    parts = [("requests", requests, torch.int64, rows), ("positions", positions, torch.int64, rows)]
    if forbidden_ids is not None:
        parts.append(("forbidden_ids", forbidden_ids, torch.int64, (forbidden_ids.numel(),)))
    if is_forbidden is not None:
        parts.append(("is_forbidden", is_forbidden, torch.bool, rows))
    for name, part, dtype, shape in parts:
        if part.dtype != dtype or tuple(part.shape) != shape:
            raise ValueError(f"{name} is {part.dtype} {tuple(part.shape)}, expected {dtype} {shape}")
        if part.device != logits.device:
            raise ValueError(f"{name} is on {part.device}, expected {logits.device}, where the logits are: use .to()")

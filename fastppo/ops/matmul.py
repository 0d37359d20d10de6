"""A linear layer for the few rows of a decode step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastppo.ops.backends import backend, native

# As the C++ kernels number them.
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
INT8_BFLOAT16 = 3  # int8 codes for bf16 activations, not transposed
FLOAT_TYPES = (torch.float32, torch.bfloat16)
# Less arithmetic than this is done before a second thread has woken up.
MIN_PARALLEL = 2**19
_is_row_invariant = False


@contextmanager
def row_invariant() -> Iterator[None]:
    """Let every `LogitBuffer` made inside use `small_linear` where that is native: in the update as in decoding."""
    global _is_row_invariant
    previous, _is_row_invariant = _is_row_invariant, True
    try:
        yield
    finally:
        _is_row_invariant = previous


def is_row_invariant() -> bool:
    """Whether the caller is inside `row_invariant`."""
    return _is_row_invariant


@torch.no_grad()
def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return x (M, K) times the transpose of weight (N, K), plus bias (N,), as fp32 (M, N), in `out` if given.

    Sums are fp32; a bf16 weight meets x rounded to bf16. An int8 weight is codes, whose sums are multiplied by `scales`
    (N,) fp32. On the native backend a row's results depend on that row alone, to the last bit, but for int8 outside of
    `row_invariant`, where they also depend on whether there are more than 8; up to 128 rows it is faster than torch,
    beyond about as fast. Gives no gradients. Raises ValueError.
    """
    _check(x, weight, bias, out)
    _check_scales(weight, scales)
    if out is None:
        out = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
    if backend(x.device) != "native" or weight.dtype not in WEIGHT_TYPES:
        x = x.to(weight.dtype).float() if weight.dtype == torch.bfloat16 else x.float()
        torch.mm(x, weight.float().t(), out=out)
        out = out if scales is None else out.mul_(scales)
        return out if bias is None else out.add_(bias)
    return multiply(x, weight, bias, scales, out)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, out: Tensor) -> Tensor:
    """Do `small_linear` on the native backend, on what belongs together."""
    is_transposed = _is_transposed(weight)
    is_half = scales is not None and x.dtype == torch.bfloat16 and not is_transposed
    # Named here, so that what is copied lives until the call ends.
    x, (weight, bias) = _dense(x.float()), readable(weight, bias)
    scales = None if scales is None else scales.contiguous()
    native().small_matmul(
        (*x.shape, len(weight)),
        (x.data_ptr(), x.stride(0)),
        (
            weight.data_ptr(),
            weight.stride(int(is_transposed)),
            INT8_BFLOAT16 if is_half else WEIGHT_TYPES[weight.dtype],
            is_transposed,
            0 if scales is None else scales.data_ptr(),
        ),
        _bias_place(bias),
        1.0,
        False,
        (out.data_ptr(), out.stride(0)),
        _is_row_invariant,
        threads_for(x.numel() * len(weight)),
    )
    return out


def readable(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both as the C++ code can read them, copied only if need be."""
    return weight if _is_transposed(weight) else _dense(weight), None if bias is None else bias.contiguous()


def head_arguments(weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[tuple[Any, ...], int]:
    """Return how C++ is told of a `readable` head's matmul into `out` (M, N), x yet unknown, and its threads."""
    rows, inputs = len(out), weight.shape[1]
    is_transposed = _is_transposed(weight)
    place = (weight.data_ptr(), weight.stride(int(is_transposed)), WEIGHT_TYPES[weight.dtype], is_transposed, 0)
    shape = (rows, inputs, len(weight))
    described = (shape, (0, inputs), place, _bias_place(bias), (out.data_ptr(), out.stride(0)))
    return described, threads_for(rows * inputs * len(weight))


def threads_for(products: int) -> int:
    """Return how many threads so many multiplications are worth."""
    return torch.get_num_threads() if products >= MIN_PARALLEL else 1


def _bias_place(bias: Tensor | None) -> tuple[int, bool]:
    return (0, False) if bias is None else (bias.data_ptr(), bias.dtype == torch.bfloat16)


def _is_transposed(weight: Tensor) -> bool:
    return weight.stride(0) == 1 and weight.stride(1) != 1


def _dense(part: Tensor) -> Tensor:
    """Return rows at any distance, each dense."""
    # A clone, for contiguous() leaves the strides of (N, 1).
    return part if part.stride(1) == 1 else part.clone(memory_format=torch.contiguous_format)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (M, K) and (N, K)")
    for name, part in (("x", x), ("weight", weight), ("bias", bias)):
        if part is not None and not part.is_floating_point() and (name, part.dtype) != ("weight", torch.int8):
            raise ValueError(f"{name} is {part.dtype}, expected a floating dtype: use .float()")
        if part is not None and part.device != x.device:
            raise ValueError(f"{name} is on {part.device}, expected {x.device}, where x is: use .to(x.device)")
    dtypes = (torch.float32, *FLOAT_TYPES) if weight.dtype == torch.int8 else (torch.float32, weight.dtype)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in dtypes):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}, expected {weight.dtype} or torch.float32 of shape "
            f"{tuple(weight.shape[:1])}"
        )
    shape = (len(x), len(weight))
    if out is not None:
        is_fp32 = out.dtype == torch.float32 and out.device == x.device
        if tuple(out.shape) != shape or not is_fp32 or out.stride(1) != 1:
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}, expected "
                f"torch.float32 {shape} on {x.device} with dense rows: pass torch.empty({shape})"
            )


def _check_scales(weight: Tensor, scales: Tensor | None) -> None:
    if (weight.dtype == torch.int8) != (scales is not None):
        raise ValueError(f"weight is {weight.dtype} and scales are {'not ' * (scales is None)}given: int8 needs them")
    if scales is not None and (scales.dtype != torch.float32 or scales.shape != weight.shape[:1]):
        raise ValueError(
            f"scales are {scales.dtype} {tuple(scales.shape)}, expected torch.float32 {tuple(weight.shape[:1])}: one "
            "for each row of the weight"
        )

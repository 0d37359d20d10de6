"""From raw logits u to z = softcap·tanh(logit_scale·u / softcap) / temperature (no tanh without a softcap), and back.

Every kernel takes the shape as two numbers: z = outer·tanh(inner·u) with a softcap, z = outer·u without. Functions of
kernels take a row of logits as the tuple (pointer, vocabulary, inner, outer).
Source: Gemma 2 (arXiv:2408.00118) section 2 for the soft cap, Cohere's models for the scale.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def scale(u, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Return z of raw logits u."""
    if HAS_SOFTCAP:
        # tanh by exp of a negative number: no overflow, and the interpreter has no libdevice.
        decay = tl.exp(-2.0 * tl.abs(inner * u))
        capped = (1.0 - decay) / (1.0 + decay)
        u = tl.where(u < 0, -capped, capped)
    return u * outer


@triton.jit
def slope(u, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Return dz/du; by 1 - tanh² = 4 d / (1 + d)², d = exp(-2|x|), which loses no digits where tanh is near 1."""
    if HAS_SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(inner * u))
        return outer * inner * 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    else:
        return outer


@triton.jit
def load_scaled(row, columns, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """Return raw logits u of some columns and their z, -inf outside the vocabulary."""
    row_ptr, vocabulary, inner, outer = row
    inside = columns < vocabulary
    u = tl.load(row_ptr + columns, mask=inside, other=0.0).to(ACC)
    # The tail is masked after scaling, where a cap can no longer turn -inf into a finite number.
    return u, tl.where(inside, scale(u, inner, outer, HAS_SOFTCAP), float("-inf"))


def scales(temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0) -> tuple[float, float]:
    """Return (inner, outer). A softcap of None or 0 is none. Raises ValueError for numbers that give no softmax."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0 (argmax is greedy choice)")
    if softcap is not None and not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap}, expected None or a finite number of at least 0")
    if not (logit_scale > 0 and math.isfinite(logit_scale)):
        raise ValueError(f"logit_scale is {logit_scale}, expected a finite number above 0: 1.0 leaves the logits alone")
    return (logit_scale / softcap, softcap / temperature) if softcap else (0.0, logit_scale / temperature)


def accumulator(logits: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """Return the type that sums over a row are kept in, as torch and as triton call it."""
    return (torch.float64, tl.float64) if logits.dtype == torch.float64 else (torch.float32, tl.float32)


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Raise ValueError unless logits are floating point (N, V) with V >= 1, dense along the vocabulary."""
    if logits.ndim != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(f"{name} are {logits.dtype} {tuple(logits.shape)}, expected floating point (N, V) with V >= 1")
    if logits.stride(1) != 1:
        raise ValueError(f"{name} have strides {logits.stride()}, expected 1 along the vocabulary: use .contiguous()")


def check_beside(tensor: Tensor, logits: Tensor, name: str) -> None:
    """Raise ValueError unless a second (N, V) tensor matches the logits' shape and device."""
    check_logits(tensor, name)
    if tensor.shape != logits.shape or tensor.device != logits.device:
        raise ValueError(
            f"{name} are {tuple(tensor.shape)} on {tensor.device}, expected {tuple(logits.shape)} on {logits.device}"
        )


def check_rows(logits: Tensor, dtype: torch.dtype | None = None, **rows: Tensor | None) -> None:
    """Raise ValueError unless each tensor given is (N,) of `dtype` (None: floating point), beside the logits."""
    for name, tensor in rows.items():
        if tensor is None:
            continue
        is_right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not is_right or tensor.shape != logits.shape[:1]:
            expected = f"{dtype or 'floating point'} {tuple(logits.shape[:1])}"
            raise ValueError(f"{name} are {tensor.dtype} {tuple(tensor.shape)}, expected {expected}")
        if not tensor.is_contiguous() or tensor.device != logits.device:
            raise ValueError(
                f"{name} on {tensor.device} must lie contiguous beside the logits on {logits.device}: "
                "use .contiguous() and .to(logits.device)"
            )

"""Attention over packed sequences and over a paged KV cache, on the backend that serves the tensors."""

import torch

from fastppo.ops.backends import backend, native
from fastppo.reference_attention import paged_attention, paged_write, ragged_attention

__all__ = ["has_kernels", "paged_attention", "paged_write", "ragged_attention"]


def has_kernels(device: torch.device) -> bool:
    """Whether packed sequences have kernels there; the reference goes through them one by one and is slower than SDPA
    on padded ones.
    """
    return backend(device) == "native" and hasattr(native(), "ragged_attention")

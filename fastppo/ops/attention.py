"""Attention over packed sequences and over a paged KV cache, on the backend that serves the tensors."""

from fastppo.reference_attention import paged_attention, paged_write, ragged_attention

__all__ = ["paged_attention", "paged_write", "ragged_attention"]

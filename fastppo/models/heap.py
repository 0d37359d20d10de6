"""The heap of the C library while passes run on the CPU.

glibc gives memory back to the system whenever more than a bound is free at the top of its heap, and a pass frees all
that it kept: hundreds of megabytes that the next pass takes anew, page by page, each cleared by the kernel first. After
the last one nobody takes them, and glibc may never look: only freeing what lies at the top makes it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# As glibc sets them itself after one tensor of 32 MB was freed. Larger ones have pages of their own, so that
# they leave no holes.
_OWN_PAGES, _USUAL_TRIM = 32 * 2**20, 64 * 2**20
_NEVER = 2**31 - 1
_depth = 0


@lru_cache(maxsize=1)
def _glibc() -> Any:
    """Return the C library; None if it is another one, or where the user has set these bounds."""
    is_set = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    library = ctypes.CDLL(None) if os.name == "posix" else None
    return None if is_set or not hasattr(library, "malloc_trim") else library


@contextmanager
def heap_kept(device: torch.device) -> Iterator[None]:
    """Keep freed memory inside, where passes run on the CPU, and give it back after it."""
    global _depth
    glibc = _glibc() if device.type == "cpu" else None
    if glibc is None:
        yield
        return
    if not _depth:
        glibc.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
        glibc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            glibc.mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM)
            glibc.malloc_trim(0)

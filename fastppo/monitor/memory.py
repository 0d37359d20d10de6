"""The most memory that a process, or a stretch of a run, has held."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def peak_of_process() -> int | None:
    """Return the most main memory that this process has held, in bytes, or None where nobody counts it."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Growth:
    """How far the memory of a device, or of this process for the CPU, rises above what is held now."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start: int | None = torch.cuda.memory_allocated(device)
        else:
            _forget_peak()
            self._start = _status("VmRSS")

    def bytes(self) -> int | None:
        """Return the rise so far, or None where nobody counts it."""
        if self._start is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return None if peak is None else max(0, peak - self._start)


def _forget_peak() -> None:
    """Let Linux count the process's peak from here; where that is refused, what came before stays in it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status(field: str) -> int | None:
    """Return a figure of Linux's account of this process in bytes, or None where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)

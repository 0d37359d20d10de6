"""One live line while a run goes on; plain lines where nobody watches."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from fastppo.monitor.memory import peak_of_process

# Steps that the estimate of the time left looks back on.
_RECENT = 20


class Console:
    """The line of a run of `total_steps`, of which `start_step` are done. Writes to standard output."""

    def __init__(self, total_steps: int, start_step: int = 0):
        self.total_steps = total_steps
        self._is_live = sys.stdout.isatty()
        self._has_line = False
        self._times = deque([(time.monotonic(), start_step)], maxlen=_RECENT + 1)

    def show(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Show a finished step."""
        self._times.append((time.monotonic(), step))
        line = "  ".join(self._fields(step, numbers))
        if not self._is_live:
            print(line, flush=True)
            return
        # The last column stays free: writing to it makes some terminals begin a new line.
        width = max(1, shutil.get_terminal_size().columns - 1)
        print("\r" + line[:width].ljust(width), end="", flush=True)
        self._has_line = True

    def end(self) -> None:
        """Leave the live line, so that what comes next begins a line of its own."""
        if self._has_line:
            print(flush=True)
        self._has_line = False

    def _fields(self, step: int, numbers: Mapping[str, Any]) -> list[str]:
        fields = [f"step {step:{len(str(self.total_steps))}}/{self.total_steps}"]
        reward = numbers.get("env/reward_mean", numbers.get("ppo/mean_scores"))
        for name, value, form in (
            ("reward", reward, "6.3f"),
            ("KL", numbers.get("objective/kl"), "5.2f"),
            ("length", numbers.get("tokens/responses_len_mean"), "4.1f"),
        ):
            fields.append(f"{name} {_shown(value, form)}")
        speed, memory = numbers.get("tokens/per_second"), numbers.get("memory/peak_bytes", peak_of_process())
        if speed is not None:
            fields.append(f"{speed:5.0f} tok/s")
        if memory is not None:
            fields.append(f"{memory / 1e9:.1f} GB")
        fields.append(f"{_clock(self._seconds_left(step))} left")
        return fields

    def _seconds_left(self, step: int) -> float:
        (start, first), (end, _) = self._times[0], self._times[-1]
        return (end - start) / max(1, step - first) * max(0, self.total_steps - step)


def _shown(value: Any, form: str) -> str:
    return "-".rjust(int(form.split(".")[0])) if value is None else f"{value:{form}}"


def _clock(seconds: float) -> str:
    """Return a duration as people write it.

    >>> _clock(75), _clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Signals during training: the rollout stops at once, an update is finished first, a second signal always stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like an interrupt from the keyboard: what is finished is saved, then the program ends."""


class Interrupts:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, but not in the middle of an update."""

    def __init__(self) -> None:
        self._deferring, self._pending = False, None  # type: tuple[bool, type[KeyboardInterrupt] | None]

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside the block; elsewhere than in the main thread, leave them alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish before a first signal takes effect."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._pending is not None:
            pending, self._pending = self._pending, None
            raise pending

    def _receive(self, number: int, frame: FrameType | None) -> None:
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self._deferring and self._pending is None:
            self._pending = kind
            return
        raise kind

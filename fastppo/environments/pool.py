"""Tools in threads: some at a time, each with a limit of time, so that nobody waits for one that hangs."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a tool returned, as text, or what it raised: TimeoutError also if it did not return in time."""

    value: str | None
    error: BaseException | None
    seconds: float


class ToolPool:
    """Runs up to `size` tools at a time and gives each `timeout` seconds.

    A thread cannot be stopped: a tool that never returns keeps its thread until the program ends, not its place.
    """

    def __init__(self, size: int, timeout: float):
        self._size, self._timeout = size, timeout
        self._waiting: deque[tuple[int, Callable[..., Any], Mapping[str, Any], Any]] = deque()
        self._started: dict[int, float] = {}  # by ticket
        self._done: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
        self._tickets = 0

    def submit(self, tool: Callable[..., Any], query: Any) -> int:
        """Have a tool called with a text, or with arguments by name; return the ticket of its outcome."""
        self._tickets += 1
        named, given = (query, ()) if isinstance(query, Mapping) else ({}, (query,))
        self._waiting.append((self._tickets, tool, named, given))
        self._start()
        return self._tickets

    def collect(self, block: bool) -> list[tuple[int, Outcome]]:
        """Return the outcomes there are now, by ticket; wait for the first if told to, and if one can come."""
        outcomes: list[tuple[int, Outcome]] = []
        while self._started:
            patience = 0.0
            if block and not outcomes:
                patience = max(0.0, min(self._started.values()) + self._timeout - monotonic())
            try:
                ticket, outcome = self._done.get(timeout=patience) if patience else self._done.get_nowait()
            except Empty:
                outcomes += self._expired()
                self._start()
                if outcomes or not block:
                    break
                continue
            if self._started.pop(ticket, None) is not None:  # else it was given up
                outcomes.append((ticket, outcome))
                self._start()
        return outcomes

    def _expired(self) -> list[tuple[int, Outcome]]:
        late = [ticket for ticket, start in self._started.items() if monotonic() - start >= self._timeout]
        error = TimeoutError(f"no answer within {self._timeout:g} seconds")
        return [(ticket, Outcome(None, error, monotonic() - self._started.pop(ticket))) for ticket in late]

    def _start(self) -> None:
        while self._waiting and len(self._started) < self._size:
            ticket, tool, named, given = self._waiting.popleft()
            self._started[ticket] = monotonic()
            threading.Thread(target=self._run, args=(ticket, tool, named, given), daemon=True).start()

    def _run(self, ticket: int, tool: Callable[..., Any], named: Mapping[str, Any], given: Any) -> None:
        start, value, error = monotonic(), None, None
        try:
            returned = tool(*given, **named)
            if inspect.iscoroutine(returned):
                returned = asyncio.run(returned)
            value = str(returned)  # some cannot be: an integer of 5,000 digits
        except BaseException as raised:  # a tool that calls sys.exit() has failed, like any other
            error = raised
        self._done.put((ticket, Outcome(value, error, monotonic() - start)))

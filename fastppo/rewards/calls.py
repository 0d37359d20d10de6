"""Calls in threads of their own: a bounded number at a time, given up on when they take too long."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

# Three classes before Python 3.11, one since.
TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)
# An event loop that does nothing for so many seconds is held up by a coroutine that never awaits.
_STUCK = 1.0


class Call:
    """One call: waiting, under way since `started`, or over, having returned something or raised an error."""

    def __init__(self, run: Callable[[], Any], on_over: Callable[[Call], None]):
        self.run, self.on_over, self.context = run, on_over, contextvars.copy_context()
        self.started: float | None = None
        self.returned: Any = None
        self.error: BaseException | None = None


class Pool:
    """Runs calls in at most `limit` threads, not counting those whose calls were given up on.

    Python cannot end a thread. One whose call hangs is left behind, and does not keep the process from ending.
    """

    def __init__(self, limit: int):
        self._limit, self._active = limit, 0
        self._waiting: dict[Call, None] = {}  # in their order
        self._running: set[Call] = set()
        self._lock = threading.Lock()

    def submit(self, run: Callable[[], Any], on_over: Callable[[Call], None]) -> Call:
        """Queue a call; `on_over` gets it when it is over, in its own thread."""
        call = Call(run, on_over)
        with self._lock:
            self._waiting[call] = None
            self._fill()
        return call

    def give_up(self, call: Call) -> None:
        """Take a call out of the queue, or leave its thread to itself: `on_over` will not get it any more."""
        with self._lock:
            self._waiting.pop(call, None)
            if call in self._running:
                self._running.remove(call)
                self._active -= 1
                self._fill()

    def late(self, timeout: float) -> list[Call]:
        """Return the calls that have been under way for so many seconds."""
        now = time.monotonic()
        with self._lock:
            return [call for call in self._running if call.started is not None and now - call.started >= timeout]

    def seconds_left(self, timeout: float) -> float | None:
        """Return the seconds until a call can be late; None if there is none."""
        with self._lock:
            starts = [call.started for call in self._running if call.started is not None]
            if not starts and not self._waiting:
                return None
        now = time.monotonic()
        return max(0.0, min(starts, default=now) + timeout - now)

    def _fill(self) -> None:
        if self._active < self._limit and self._waiting:
            self._active += 1
            threading.Thread(target=self._work, name="fastppo reward", daemon=True).start()

    def _work(self) -> None:
        while (call := self._next()) is not None:
            try:
                call.returned = call.context.run(call.run)
            except BaseException as error:  # whoever waits for the call decides what it means
                call.error = error
            with self._lock:
                if call not in self._running:  # it was given up on, and another thread has taken this one's place
                    return
                self._running.remove(call)
            call.on_over(call)

    def _next(self) -> Call | None:
        with self._lock:
            if not self._waiting:
                self._active -= 1
                return None
            call = next(iter(self._waiting))
            del self._waiting[call]
            call.started = time.monotonic()
            self._running.add(call)
            return call


class _EventLoop:
    """The one event loop of all asynchronous rewards: their clients may live in it from step to step."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, awaitable: Awaitable[Any], timeout: float | None) -> Any:
        """Return what an awaitable gives. Raises one of `TIMEOUTS`, having cancelled it, if it takes too long."""
        loop = self._running()
        future = asyncio.run_coroutine_threadsafe(_awaited(awaitable), loop)
        try:
            return future.result(timeout)
        except BaseException as error:
            future.cancel()
            if isinstance(error, TIMEOUTS):
                self._leave_if_stuck(loop)
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="fastppo rewards' loop", daemon=True).start()
            return self._loop

    def _leave_if_stuck(self, loop: asyncio.AbstractEventLoop) -> None:
        answered = threading.Event()
        loop.call_soon_threadsafe(answered.set)
        if not answered.wait(_STUCK):
            with self._lock:
                if self._loop is loop:
                    self._loop = None  # the next coroutine gets a new one


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


_EVENT_LOOP = _EventLoop()


def finished(returned: Any, timeout: float | None) -> Any:
    """Return what a function returned, or what that gives when it is awaited, in the one event loop of all rewards."""
    return _EVENT_LOOP.run(returned, timeout) if inspect.isawaitable(returned) else returned

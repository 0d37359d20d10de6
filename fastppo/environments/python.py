"""A tool that runs Python code in a process of its own, with limits."""

from __future__ import annotations

import itertools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

_GUARD = Path(__file__).with_name("guard.py")
_GRACE = 0.7  # seconds that the guard has, beyond the code's own, to end everything and to report
_FIRST_USER = 0x60000000  # ids from here on belong to nobody; each run gets one, so that limits are its own
_RUNS = itertools.count()  # of this process


class PythonRunner:
    """Runs Python code and returns what it prints. It is NO sandbox.

    Every call is a new interpreter (standard library only) with an empty environment and a folder of its own, limited
    in time, memory of each process, processes, open files and their size. When it ends, or its time is up, everything
    that it has started is killed, daemons too. What else stands between the code and the machine depends on the
    system, and `isolation` says which it is:

    - "namespaces" (Linux, as root or where users may make namespaces): no network, no other process in sight, and of
      the file system only Python and the system's libraries, read-only, beside a small folder in memory.
    - "user" (root in a container that forbids namespaces): another user's id. The code can use the network and read
      whatever everybody may read.
    - "none": the code can do what you can do: read your files, use the network, signal your processes. A warning says
      so.

    In each case a fault of the kernel is enough to get out. Code written by a model that you train is hostile sooner or
    later: where something is at stake, run the whole program in a virtual machine, or give the environment a tool that
    sends the code to one.

    Args:
        timeout: seconds, of the clock.
        memory: bytes of address space, of each process.
        processes: at the same time, threads included.
        files: open at the same time.
        file_size: bytes that a file may have.
        disk: bytes of the folder in all; with namespaces only.
        max_output: bytes that are read; whoever prints more is ended.
        isolation: which of the above to use; by default the first that works.

    Raises RuntimeError if this system cannot run code in the way that is asked for.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        *,
        memory: int = 512 * 2**20,
        processes: int = 8,
        files: int = 64,
        file_size: int = 2**20,
        disk: int = 16 * 2**20,
        max_output: int = 10_000,
        isolation: str | None = None,
    ):
        if not timeout > 0:
            raise ValueError(f"timeout must be greater than 0 seconds, got {timeout!r}")
        self.timeout, self.max_output = timeout, max_output
        self._limits = {"memory": memory, "processes": processes, "files": files, "file_size": file_size, "disk": disk}
        kinds = ["namespaces", "user" if os.name == "posix" and os.geteuid() == 0 else "none"]
        if isolation is not None and isolation not in kinds:
            raise ValueError(f"isolation must be one of {kinds} for this user, got {isolation!r}")
        self.isolation = self._first_that_works(kinds if isolation is None else [isolation])
        if self.isolation == "none" and isolation is None:
            warnings.warn(
                "PythonRunner found nothing on this system that separates code from the user who runs it: it can read "
                "your files, use the network and signal your processes; allow user namespaces, or use a container",
                stacklevel=2,
            )

    def __call__(self, code: str) -> str:
        """
        Run Python code and return what it prints.

        Args:
            code: The code, which prints its result.

        Raises:
            TimeoutError: it took too long.
            RuntimeError: it failed, with the last line that was printed.
        """  # the form that transformers reads a JSON schema from
        output, report = self._run(code, self.isolation)
        if "error" in report:
            raise RuntimeError(f"the code was not run: {report['error']}")
        if len(output) > self.max_output:
            return output[: self.max_output].decode(errors="replace")
        text = output.decode(errors="replace")
        if report["ended"] == "timeout":
            raise TimeoutError(f"no end within {self.timeout:g} seconds")
        if report["code"]:
            lines = text.strip().splitlines() or [f"exit code {report['code']}"]
            raise RuntimeError(lines[-1])
        return text

    def _first_that_works(self, kinds: list[str]) -> str:
        reasons = []
        for kind in kinds:
            try:
                output, report = self._run("print(6 * 7)", kind)
            except OSError as error:
                output, report = b"", {"error": str(error)}
            if output == b"42\n":
                return kind
            reasons.append(f"{kind}: {report.get('error') or output.decode(errors='replace').strip() or report}")
        raise RuntimeError(
            f"PythonRunner cannot run code here ({'; '.join(reasons)}); it needs Linux or macOS, and as root a Python "
            "that every user may read, or the right to make namespaces"
        )

    def _run(self, code: str, isolation: str) -> tuple[bytes, dict[str, Any]]:
        """Run code; return what it printed, one byte more than allowed at most, and how it ended."""
        status, report_to = os.pipe()
        with tempfile.TemporaryDirectory(prefix="fastppo-python-", ignore_cleanup_errors=True) as folder:
            settings = self._settings(isolation, folder, report_to)
            guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[report_to],
                env={},
                cwd="/",
                start_new_session=True,
            )
            os.close(report_to)
            try:
                return self._attend(guard, code, status)
            finally:
                os.close(status)
                with suppress(ProcessLookupError):
                    os.killpg(guard.pid, 9)
                guard.wait()
                assert guard.stdout is not None
                guard.stdout.close()

    def _settings(self, isolation: str, folder: str, status: int) -> dict[str, Any]:
        folder, user = os.path.realpath(folder), 0
        if os.geteuid() == 0:
            user = _FIRST_USER + (os.getpid() * 4096 + next(_RUNS) % 4096) % 2**24
            os.chown(folder, user, user)
        python = {"python": os.path.realpath(sys.executable), "prefix": os.path.realpath(sys.base_prefix)}
        place = {"folder": folder, "status": status, "user": user, "isolation": isolation, "timeout": self.timeout}
        return self._limits | python | place

    def _attend(self, guard: subprocess.Popen[bytes], code: str, status: int) -> tuple[bytes, dict[str, Any]]:
        """Send the code and read output and report, until the report is there or time is up."""
        assert guard.stdin is not None
        assert guard.stdout is not None
        with suppress(BrokenPipeError):
            guard.stdin.write(code.encode(errors="replace"))
            guard.stdin.close()
        output, report, deadline = b"", b"", monotonic() + self.timeout + _GRACE
        with selectors.DefaultSelector() as events:
            events.register(guard.stdout, selectors.EVENT_READ)
            events.register(status, selectors.EVENT_READ)
            while monotonic() < deadline:
                for key, _ in events.select(deadline - monotonic()):
                    got = os.read(key.fd, 65536)
                    if not got:
                        events.unregister(key.fileobj)
                    if key.fd == status:
                        report += got
                    else:
                        output += got
                if status not in events.get_map():
                    break  # the guard has ended
                if len(output) > self.max_output and guard.stdout in events.get_map():
                    guard.terminate()  # it kills what it has started
                    events.unregister(guard.stdout)
        return output[: self.max_output + 1], json.loads(report) if report else {"error": "the guard was killed"}

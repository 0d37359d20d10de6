"""A contender of a benchmark in a process of its own, which works only when asked, over a line of JSON each way."""

import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure

ROOT = Path(__file__).resolve().parent.parent


class Side:
    """One library in its own process, which answers a line with the figures of one iteration."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        self.hello = self.read()

    def read(self) -> dict[str, Any]:
        """Return the next answer; raise with the end of the side's error output when it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self.process.wait()
        self._errors.seek(0)
        tail = "".join(self._errors.readlines()[-15:])
        raise RuntimeError(f"{self.name} ended with code {self.process.returncode}; its last words:\n{tail}")

    def iterate(self, tokens: int | None, limit: float) -> measure.Sample:
        """Run one iteration once others use less than `limit` cores; raise if it had other than `tokens` tokens."""
        load = measure.ForeignLoad([self.process.pid])
        if math.isfinite(limit):
            load.wait_for_idle(limit, patience_s=10)
        load.restart()
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.read()
        foreign = load.read() if math.isfinite(limit) else None
        if tokens is not None and answer["tokens"] != tokens:
            raise RuntimeError(f"{self.name} generated {answer['tokens']} tokens, not {tokens}: not the same work")
        return measure.Sample(answer["seconds"], answer["peak_bytes"], foreign)

    def close(self) -> None:
        """Let the process end by closing its input."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self._errors.close()

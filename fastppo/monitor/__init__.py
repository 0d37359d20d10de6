"""What people see of a run: its folder, its console line, its learning curve."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fastppo.atomic import Pathlike, append_line, write_json, write_text
from fastppo.monitor.console import Console
from fastppo.monitor.curve import draw_curve
from fastppo.monitor.provenance import commit, machine, plain, redact, redact_command, versions

_LOCK = ".lock"
_WRITTEN = re.compile(
    r"run\.json|metrics\.jsonl|samples\.jsonl|errors\.jsonl|summary\.json|learning_curve\.png|held_out_\w+\.jsonl|checkpoint-\d+|best"
)


class RunFolder:
    """The folder of one run: what it was started with, every step's numbers, samples, a summary and a picture.

    Args:
        directory: made if it is missing.
        total_steps: iterations that the run is meant to take.
        arguments: how the run was started; goes into run.json with secrets left out.
        start_step: steps already done, when a run is continued; what an older run wrote after it is cut off.
        fresh: whether this is another run than the one whose traces the folder may hold; by default at step 0.
        console: show a line for every step.
        overwrite: delete what another run left here, its checkpoints and its best model included.

    Raises ValueError if the folder holds the steps of another run, or if another process is writing to it.
    """

    def __init__(
        self,
        directory: Pathlike,
        *,
        total_steps: int,
        arguments: Mapping[str, Any],
        start_step: int = 0,
        fresh: bool | None = None,
        console: bool = True,
        overwrite: bool = False,
    ):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.directory)
        self._step = start_step
        try:
            if start_step == 0 if fresh is None else fresh:
                _make_way(self.directory, overwrite)
            for name in ("metrics.jsonl", "samples.jsonl"):
                _cut(self.directory / name, start_step)
            write_json(self.directory / "run.json", _description(arguments, total_steps, start_step))
        except BaseException:
            self.close()
            raise
        self._console = Console(total_steps, start_step) if console else None

    def step(self, stats: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Write down one finished step: its numbers (those of `stats` that are single ones), and some samples."""
        self._step += 1
        numbers = {name: value for name, value in map(_number, stats, stats.values()) if value is not ...}
        append_line(self.directory / "metrics.jsonl", _line({"step": self._step, **numbers}))
        if samples:
            lines = [_line({**_sample(sample), "step": sample.get("step", self._step)}) for sample in samples]
            append_line(self.directory / "samples.jsonl", "\n".join(lines))
        if self._console is not None:
            self._console.show(self._step, numbers)

    def problem(self, row: Mapping[str, Any], text: str) -> None:
        """Append to errors.jsonl what went wrong in the next step; of `text`, such as a traceback, without secrets."""
        append_line(self.directory / "errors.jsonl", _line({"step": self._step + 1, **row, "text": redact(text)}))

    def held_out(self, when: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write what the policy did on the held-out prompts to held_out_<when>.jsonl."""
        content = "".join(_line(_sample(row)) + "\n" for row in rows)
        write_text(self.directory / f"held_out_{when}.jsonl", content)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json and learning_curve.png, and close."""
        try:
            if self._console is not None:
                self._console.end()
            write_json(self.directory / "summary.json", plain(summary))
            rows = read_metrics(self.directory)
            if rows:
                draw_curve(rows, self.directory / "learning_curve.png")
        finally:
            self.close()

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console is not None:
            self._console.end()
        self.close()


def read_metrics(directory: Pathlike) -> list[dict[str, Any]]:
    """Return the steps of a run's metrics.jsonl, None where a number was not finite."""
    path = Path(directory) / "metrics.jsonl"
    return [row for _, row in _rows(path)] if path.exists() else []


def _lock(directory: Path) -> IO[str]:
    """Return the open lock file, which is ours until it is closed; it stays, because removing it would be a race."""
    file = open(directory / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - it is held open
    if sys.platform == "win32":
        return file
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"{directory} is being written by another run (process {owner}); wait for it, or choose another output_dir"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _make_way(directory: Path, overwrite: bool) -> None:
    """Refuse a folder with another run's work in it, or clear it; a run that did no step is no loss."""
    left = sorted(path for path in directory.iterdir() if _WRITTEN.fullmatch(path.name))
    worth = [path.name for path in left if path.name.startswith("checkpoint-")]
    if (directory / "metrics.jsonl").exists() and (directory / "metrics.jsonl").stat().st_size:
        worth.append("metrics.jsonl")
    if worth and not overwrite:
        raise ValueError(
            f"{directory} holds another run ({', '.join(worth)}); choose another output_dir, continue that run with "
            "resume_from, or delete its files with overwrite"
        )
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the whole lines of a JSON-lines file; a crash can leave half of one at its end."""
    rows = []
    # str.splitlines would also cut at U+2028 and U+0085, which samples hold as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append((line, row))
    return rows


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to and including a step."""
    if path.exists():
        kept = [line for line, row in _rows(path) if row.get("step", 0) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def _description(arguments: Mapping[str, Any], total_steps: int, start_step: int) -> dict[str, Any]:
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "start_step": start_step,
        "total_steps": total_steps,
        "command": redact_command(sys.argv),
        "arguments": plain(arguments),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def _number(name: str, value: Any) -> tuple[str, Any]:
    """Return a single number as JSON has it, None if it is not finite, and ... for anything else."""
    if not isinstance(value, Real) and getattr(value, "ndim", None) == 0:  # of numpy and torch
        value = value.item()
    if not isinstance(value, Real):
        return name, ...
    if isinstance(value, int):
        return name, int(value)
    return name, float(value) if math.isfinite(value) else None


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample as JSON has it; what it says is the data's, so nothing is left out of it."""
    return {name: _number(name, value)[1] if name == "reward" else value for name, value in sample.items()}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)

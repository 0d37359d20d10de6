"""The one way in which anything is written to disk: under a temporary name, flushed, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Pathlike = str | os.PathLike[str]


def write_bytes(path: Pathlike, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part of either."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_text(path: Pathlike, content: str) -> None:
    """Write a text file in UTF-8; see `write_bytes`."""
    write_bytes(path, content.encode())


def write_json(path: Pathlike, content: Any) -> None:
    """Write a JSON file, indented, with a closing newline; see `write_bytes`."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def append_line(path: Pathlike, line: str) -> None:
    """Append one line and flush it to disk: a crash loses this line at most."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_directory(path: Pathlike) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `path` when the block ends, and vanishes if it raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    replaced = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        _sync_tree(temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        raise
    _sync(path.parent)


@contextmanager
def atomic_files(directory: Pathlike) -> Iterator[Path]:
    """Yield an empty directory whose files replace those of `directory`, one by one, when the block ends."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory, prefix=".writing."))
    try:
        yield temporary
        _sync_tree(temporary)
        for file in sorted(temporary.rglob("*")):
            target = directory / file.relative_to(temporary)
            if file.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(file, target)
        _sync(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    """Flush a whole tree; safetensors makes files that only their owner can read, so open those up as others are."""
    for path in directory.rglob("*"):
        if path.is_file():
            os.chmod(path, 0o666 & ~_umask())
        _sync(path)
    _sync(directory)

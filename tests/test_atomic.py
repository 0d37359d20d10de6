"""The writer: old content or new, never a part of either, whatever happens in between."""

import os
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fastppo import atomic

WRITE = {
    "write_text": lambda path: atomic.write_text(path, "new"),
    "write_bytes": lambda path: atomic.write_bytes(path, b"new"),
    "write_json": lambda path: atomic.write_json(path, {"is": "new"}),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    """Return a function that sets the process's mask; it is put back afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_content_arrives_in_folders_that_did_not_exist(tmp_path):
    atomic.write_bytes(tmp_path / "a" / "b.bin", b"\x00\xff")
    atomic.write_text(str(tmp_path / "c.txt"), "Köln\n")
    atomic.write_json(tmp_path / "d.json", {"x": [1, 2.5], "y": None})
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "c.txt").read_bytes() == b"K\xc3\xb6ln\n"
    assert (tmp_path / "d.json").read_text() == '{\n  "x": [\n    1,\n    2.5\n  ],\n  "y": null\n}\n'
    assert names(tmp_path) == ["a", "c.txt", "d.json"]


@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, write, failing, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise error("no space")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(error, match="no space"):
        write(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_json_cannot_say_is_refused_before_anything_is_touched(tmp_path):
    atomic.write_json(tmp_path / "file", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "file", float("nan"))
    assert (tmp_path / "file").read_text() == "1\n"
    assert names(tmp_path) == ["file"]


def killed(code: str, folder: Path) -> None:
    """Run code that ends the process in the middle, as a kill would: nothing is cleaned up."""
    script = f"import os, sys\nfrom pathlib import Path\nfrom fastppo import atomic\nfolder = Path(sys.argv[1])\n{code}"
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    killed("os.replace = lambda *_: os._exit(9)\natomic.write_text(folder / 'file', 'new')", tmp_path)
    assert (tmp_path / "file").read_text() == "old"


def test_a_process_killed_while_filling_leaves_the_old_directory(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    killed(
        "with atomic.atomic_directory(folder / 'model') as target:\n"
        "    (target / 'weights').write_text('new')\n"
        "    os._exit(9)",
        tmp_path,
    )
    assert names(tmp_path / "model") == ["weights"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "file"
    contents = {letter * 200_000 for letter in "ab"}
    atomic.write_text(path, "a" * 200_000)
    done = threading.Event()

    def write():
        for letter in "ba" * 20:
            atomic.write_text(path, letter * 200_000)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(path.read_text() in contents)
    writer.join()
    assert seen
    assert all(seen)


def test_permissions_follow_the_mask_of_the_process(tmp_path, umask):
    for mask, file_bits, directory_bits in [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)]:
        umask(mask)
        atomic.write_text(tmp_path / "file", "x")
        with atomic.atomic_directory(tmp_path / "folder") as target:
            (target / "y").write_text("y")
        assert (tmp_path / "file").stat().st_mode & 0o777 == file_bits
        assert (tmp_path / "folder").stat().st_mode & 0o777 == directory_bits
        assert umask(mask) == mask  # and the mask itself is as it was


def test_atomic_directory_replaces_the_whole(tmp_path):
    target_path = tmp_path / "runs" / "model"
    with atomic.atomic_directory(target_path) as target:
        (target / "stale").write_text("1")
        assert not target_path.exists()
    assert names(target_path) == ["stale"]
    with atomic.atomic_directory(target_path) as target:
        assert names(target) == []
        (target / "inner").mkdir()
        (target / "inner" / "fresh").write_text("2")
        assert names(target_path) == ["stale"]
    assert names(target_path) == ["inner"]
    assert (target_path / "inner" / "fresh").read_text() == "2"
    assert names(tmp_path / "runs") == ["model"]


def fill_and_fail(writing: AbstractContextManager[Path], error: BaseException) -> None:
    with writing as target:
        (target / "weights").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt("broken")])
def test_atomic_directory_keeps_the_old_one_if_the_block_raises(tmp_path, error):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("whole")
    for path in (tmp_path / "model", tmp_path / "never"):
        with pytest.raises(type(error), match="broken"):
            fill_and_fail(atomic.atomic_directory(path), error)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


def test_atomic_directory_puts_the_old_one_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("whole")
    rename, calls = os.rename, []

    def fail_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("stale handle")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="stale handle"), atomic.atomic_directory(tmp_path / "model") as target:
        (target / "new").write_text("whole")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


def test_atomic_files_replaces_what_it_holds_and_keeps_the_rest(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "weights").write_text("old")
    with atomic.atomic_files(tmp_path) as target:
        (target / "weights").write_text("new")
        (target / "inner").mkdir()
        (target / "inner" / "config").write_text("new")
        assert (tmp_path / "weights").read_text() == "old"
    assert names(tmp_path) == ["inner", "kept", "weights"]
    assert (tmp_path / "weights").read_text() == "new"
    assert (tmp_path / "inner" / "config").read_text() == "new"


def test_atomic_files_changes_nothing_if_the_block_raises(tmp_path):
    (tmp_path / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="broken"):
        fill_and_fail(atomic.atomic_files(tmp_path), RuntimeError("broken"))
    assert names(tmp_path) == ["weights"]
    assert (tmp_path / "weights").read_text() == "old"


def test_lines_are_appended_whole(tmp_path):
    for line in ("eins", "zwei é"):
        atomic.append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "eins\nzwei é\n"

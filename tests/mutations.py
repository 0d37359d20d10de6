"""Show that the suite fails when a known bug is put into the source: `python tests/mutations.py [names]`.

Each mutation in mutation_list.py is a bug that a peer shipped, or its twin in our code. A copy of the checkout gets one
at a time; C++ is compiled again. The tests named beside it must then fail. Writes a JSON with --output.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mutation_list import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("fastppo", "kernels", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md")


def copy_checkout(folder: Path) -> None:
    """Copy what building and testing need."""
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python on the copy, which comes before anything installed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def build(folder: Path) -> None:
    """Compile the C++ extension of the copy."""
    done = run(folder, ["setup.py", "build_ext", "--inplace"])
    if done.returncode or "error:" in done.stderr:
        raise RuntimeError(f"the C++ extension does not compile:\n{done.stderr[-4000:]}")


def check_baseline(folder: Path, chosen: list[Mutation]) -> None:
    """Raise RuntimeError unless the tests pass before anything is changed: else their failing would say nothing."""
    tests = sorted({name for mutation in chosen for name in mutation.tests})
    done = run(folder, ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests])
    if done.returncode:
        raise RuntimeError(f"the tests fail without any bug put in:\n{done.stdout[-4000:]}")


def apply(folder: Path, mutation: Mutation) -> str:
    """Put the bug in and return the text that was there before."""
    path = folder / mutation.file
    before = path.read_text(encoding="utf-8")
    if before.count(mutation.old) != 1:
        raise RuntimeError(f"{mutation.name}: its text occurs {before.count(mutation.old)} times in {mutation.file}")
    path.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    return before


def fails(folder: Path, mutation: Mutation) -> bool:
    """Whether the tests named beside the bug notice it. Raises RuntimeError if they cannot even run."""
    done = run(folder, ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests])
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutation.name}: the tests do not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def check(folder: Path, mutation: Mutation) -> bool:
    """Put one bug in, see whether the suite fails, and take it out again."""
    is_native = mutation.file.startswith("csrc/")
    before = apply(folder, mutation)
    try:
        if is_native:
            build(folder)
        return fails(folder, mutation)
    finally:
        (folder / mutation.file).write_text(before, encoding="utf-8")


def main() -> int:
    """Check the mutations named, by default all; return how many the suite did not notice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="mutations to check; all of them by default")
    parser.add_argument("--output", type=Path, help="JSON file for the verdicts")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.names or m.name in options.names]
    # Those that compile come last, so that the others run on the unchanged extension.
    chosen.sort(key=lambda mutation: mutation.file.startswith("csrc/"))
    verdicts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_checkout(folder)
        check_baseline(folder, chosen)
        for mutation in chosen:
            is_noticed = check(folder, mutation)
            print(f"{'fails, as it must' if is_noticed else 'NOT NOTICED':18} {mutation.name}", flush=True)
            verdicts.append({"name": mutation.name, "of": mutation.source, "is_noticed": is_noticed})
    missed = sum(not verdict["is_noticed"] for verdict in verdicts)
    print(f"{len(verdicts) - missed} of {len(verdicts)} noticed")
    if options.output:
        options.output.write_text(json.dumps(verdicts, indent=1) + "\n", encoding="utf-8")
    return missed


if __name__ == "__main__":
    sys.exit(main())

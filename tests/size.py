"""Print the lines of every file of the package and fail above the ceilings that keep it readable."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The package was to stay below 9,000 lines. To run any model on the fastest layout that is right for it takes the rest:
# recognising a decoder by structure (980), probes and slower tiers (900), pages, turns and streams (1,500), attention
# and fused operations with their gradients (800), critics and reward adapters on one base (570), what a run takes,
# counted, made less and written out (640), and known beforehand (960), quantised layers, adapters and graphs (900),
# supervised trainers on all forms of data (1,500), encoder-decoders (900), text environments with a Python runner that
# is held back (1,500), rewards that may fail, be late, be far away or be people (1,200), memory that passes on the CPU
# keep or need not (250), and many decode steps as one C++ call (200).
CEILINGS = {"fastppo": 23_200, "csrc": 5_500, "a query to an update": 1_500}
# What a reader opens to follow a query to an update, in that order.
QUERY_TO_UPDATE = [
    "fastppo/trainers/ppo.py",
    "fastppo/types.py",
    "fastppo/engine/engine.py",
    "fastppo/ppo.py",
    "fastppo/ops/loss.py",
    "fastppo/ops/chunks.py",
    "fastppo/ops/rows.py",
    "fastppo/reference.py",
]


def count(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def groups() -> dict[str, list[Path]]:
    """Return the files that each ceiling covers."""
    return {
        "fastppo": sorted((ROOT / "fastppo").rglob("*.py")),
        "csrc": sorted([*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.hpp")]),
        "a query to an update": [ROOT / name for name in QUERY_TO_UPDATE],
    }


def main() -> int:
    """Print the table; return 1 if a ceiling is broken, else 0."""
    is_over = False
    for name, files in groups().items():
        lines = {path: count(path) for path in files}
        for path, number in lines.items():
            print(f"{number:6d}  {path.relative_to(ROOT)}")
        total, ceiling = sum(lines.values()), CEILINGS[name]
        verdict = "over the ceiling" if total > ceiling else "of"
        print(f"{total:6d}  {name} ({verdict} {ceiling})\n")
        is_over |= total > ceiling
    return int(is_over)


if __name__ == "__main__":
    sys.exit(main())

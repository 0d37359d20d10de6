"""What adapters and an 8-bit base cost in what is learned: examples/sentiment.py in each way, several seeds, no clock.

    python -m benchmarks.learning MODEL_DIR [--seeds 0 1 2] [--max_steps 40] [--adapter_rate 4e-3] [--output FILE]

Every way starts from the same weights and prompts; rewards are those of held-out prompts, before and after.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.side import ROOT

sys.path.insert(0, str(ROOT / "examples"))

WAYS: dict[str, dict[str, Any]] = {
    "full, fp32": {},
    "LoRA r8, fp32": {"lora_rank": 8},
    "LoRA r8, 8-bit base": {"lora_rank": 8, "load_in_8bit": True},
}
FULL_RATE = 5e-4


def run(way: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once; return the example's summary."""
    import sentiment

    how = WAYS[way]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given = {
            "model_name_or_path": arguments.model,
            "seed": seed,
            "learning_rate": arguments.adapter_rate if how else FULL_RATE,
            "max_steps": arguments.max_steps,
            "output_dir": str(Path(folder) / "run"),
            **how,
        }
        return sentiment.main([part for name, value in given.items() for part in (f"--{name}", str(value))])


def main(argv: list[str] | None = None) -> None:
    """Train every way with every seed, print means and deviations, and write the JSON after each run."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=40)
    # Adapters have few numbers to move and take a higher learning rate.
    parser.add_argument("--adapter_rate", type=float, default=4e-3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for way in arguments.ways:
            summary = run(way, seed, arguments)
            names = ("reward_before", "reward_after", "kl_after", "distinct_2_after")
            rows.append({"who": way, "seed": seed} | {name: summary[name] for name in names})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if arguments.output:
                command = " ".join(["python -m benchmarks.learning", "MODEL", *argv[1:]])
                measure.write_result(arguments.output, command, rows)
    for way in arguments.ways:
        after = [row["reward_after"] for row in rows if row["who"] == way]
        spread = statistics.stdev(after) if len(after) > 1 else 0.0
        print(f"{way:22} reward {statistics.mean(after):.3f}, deviation {spread:.3f}, of {len(after)} seeds")


if __name__ == "__main__":
    main()

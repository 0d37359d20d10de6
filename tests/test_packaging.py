"""What keeps the project whole: what installs, what imports what, how long things are, what must not come back."""

import ast
import graphlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import size

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("fastppo", "kernels", "benchmarks", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def test_kernels_does_not_hide_the_package_of_that_name():
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        assert ROOT not in Path(spec.origin).resolve().parents, f"`import kernels` finds ours: {spec.origin}"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_are_modules_of_the_package():
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    from fastppo.kernels import row_statistics

    assert row_statistics.__name__ == "fastppo.kernels.row_statistics"


def test_importing_the_package_loads_neither_triton_nor_transformers():
    code = "import json, sys, fastppo; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"triton", "transformers", "peft", "accelerate", "datasets", "matplotlib"}


@pytest.mark.parametrize("name", ["PPOTrainer", "AutoModelForCausalLMWithValueHead", "Engine"])
def test_a_trainer_on_a_cpu_build_of_torch_leaves_triton_unloaded_but_at_hand(name):
    code = f"import sys; from fastppo import {name}; print('triton' in sys.modules, 'transformers' in sys.modules);"
    code += "import torch, triton; print(triton.__version__, torch.version.cuda is None and torch.version.hip is None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded, version = done.stdout.splitlines()
    if version.endswith("False"):
        pytest.skip("this torch is built for GPUs, whose kernels triton compiles")
    assert loaded == "False True"


def test_public_names_are_sorted_and_exist():
    import fastppo

    assert list(fastppo.__all__) == sorted(fastppo.__all__)
    missing = [name for name in fastppo.__all__ if not hasattr(fastppo, name)]
    assert not missing, f"named in fastppo.__all__ but absent: {missing}"


# Imports point one way: a module may import from its own row and from the rows above it.
LAYERS = [
    {"types", "config", "rules", "atomic"},
    {"reference", "reference_attention", "reference_fused", "reference_sampling"},
    {"ops"},
    {"ppo", "attention", "controllers"},
    {"models"},
    {"engine"},
    {"core", "reward_models", "rewards", "checkpoint", "planner", "monitor"},
    {"environments"},
    {"trainers"},
    {"cli", "demo", "convert", "export", "__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Fast code is reached only through these.
BACKEND_USERS = {"ops", "attention", "engine"}
BACKENDS = {"_native", "kernels"}


def part_of(path: Path) -> str:
    """Return the first name below fastppo of a file's module: `engine` for fastppo/engine/cache.py."""
    return path.relative_to(ROOT / "fastppo").parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the part of fastppo that each import statement of a file names, lazy ones included, and its line."""
    package = path.relative_to(ROOT).parts[:-1]
    known = {part_of(other) for other in (ROOT / "fastppo").rglob("*.py")} | BACKENDS
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastppo":
                # `from fastppo import PPOTrainer` names no part: it goes through the root and all that it exports.
                yield parts[1] if len(parts) > 1 and parts[1] in known else "__init__", node.lineno


def edges() -> Iterator[tuple[Path, str, str, int]]:
    """Yield (file, its part, the part that it imports, line) for every import between two parts of the package."""
    for path in sorted((ROOT / "fastppo").rglob("*.py")):
        part = part_of(path)
        for target, line in imported_parts(path):
            if target != part:
                yield path, part, target, line


def test_every_part_has_a_place_in_the_order():
    parts = {part_of(path) for path in (ROOT / "fastppo").rglob("*.py")} - BACKENDS
    assert parts <= RANK.keys(), f"add to LAYERS, in the right row: {sorted(parts - RANK.keys())}"


def test_imports_point_one_way():
    wrong = []
    for path, part, target, line in edges():
        # A part without a place fails the test above, not this one.
        allowed = part in BACKEND_USERS if target in BACKENDS else RANK.get(target, 0) <= RANK.get(part, 0)
        if not allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_two_parts_import_each_other():
    graph: dict[str, set[str]] = {}
    for _, part, target, _ in edges():
        graph.setdefault(part, set()).add(target)
    # Raises CycleError, naming the parts.
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_kernels_are_leaves():
    for path in (ROOT / "kernels").glob("*.py"):
        names = re.findall(r"^\s*(?:from|import) (fastppo[\w.]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(name.startswith("fastppo.kernels") for name in names), f"{path.name} imports {names}"


def functions() -> Iterator[tuple[Path, int, str, int]]:
    """Yield (file, line, name, length) of every function outside the tests."""
    for path in SOURCES:
        if "tests" not in path.relative_to(ROOT).parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path, node.lineno, node.name, node.end_lineno - node.lineno + 1
    for path in sorted((ROOT / "csrc").glob("*.[ch]pp")):
        start = 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            # Functions begin at the margin and end with a brace alone there; namespaces end with a comment.
            if re.match(r"[A-Za-z].*\(", line) and not start:
                start = number
            if line == "}" and start:
                yield path, start, "function", number - start + 1
            if line == "}" or (line.endswith(";") and not line.startswith(" ")):
                start = 0


def test_functions_are_short():
    found = list(functions())
    too_long = [
        f"{path.relative_to(ROOT)}:{line} {name} has {length} lines"
        for path, line, name, length in found
        if length > (120 if {"kernels", "csrc"} & set(path.relative_to(ROOT).parts) else 40)
    ]
    assert not too_long, "\n".join(too_long)
    lengths = sorted(length for path, _, _, length in found if path.suffix == ".py")
    assert lengths[int(0.9 * (len(lengths) - 1))] <= 25, "the 90th percentile of function lengths is above 25 lines"


def test_files_are_short():
    files = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]
    files += sorted((ROOT / "csrc").glob("*.[ch]pp"))
    too_long = {str(path.relative_to(ROOT)): size.count(path) for path in files if size.count(path) > 300}
    assert not too_long


def test_nothing_is_named_for_a_drawer():
    drawers = {"utils", "util", "common", "misc", "helpers"}
    assert not [path for path in SOURCES if drawers & {part.removesuffix(".py") for part in path.parts[-2:]}]


# The one command that opens a pickle, because a person asks for it: torch's restricted unpickler, tensors only.
CONVERTER = ROOT / "fastppo" / "convert.py"
BANNED = {
    r"torch\.load\(": "reads pickle, which runs code: use safetensors",
    r"^\s*(import pickle|from pickle)": "pickle runs code on loading: use safetensors and JSON",
    r"except( Exception)?:\s*(pass|return None)\b": "hides a fault: catch the one error that is meant, or let it out",
    r"[ar]tol=1e\+?\d": "a tolerance above 1 passes anything",
    r"trust_remote_code\s*=\s*True": "runs a stranger's code: leave it to the user's own argument",
}


@pytest.mark.parametrize(("pattern", "reason"), BANNED.items())
def test_lessons_stay_learnt(pattern, reason):
    hits = [
        f"{path.relative_to(ROOT)}: {match.group().strip()!r}: {reason}"
        for path in SOURCES
        if path not in (Path(__file__).resolve(), CONVERTER)
        for match in re.finditer(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not hits, "\n".join(hits)


def test_triton_is_imported_in_kernels_only():
    pattern = re.compile(r"^\s*(import|from) triton\b", re.MULTILINE)
    hits = [path for path in (ROOT / "fastppo").rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert not hits

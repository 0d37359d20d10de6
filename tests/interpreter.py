"""Run functions of the Triton kernels in Triton's interpreter, many in one process of its own.

The interpreter is chosen when a kernel is decorated, hence the process: it starts with TRITON_INTERPRET=1, reads the
calls from a file and writes what they return.
"""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file


def fault(triton: str, numpy: str) -> str:
    """Return why the interpreter of this Triton cannot work with this numpy, or nothing.

    numpy 2.4 makes no scalar of an array with dimensions any more, on which the interpreter relied (triton-lang/triton
    issue 9171).
    """
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return f"the interpreter of triton {triton} fails with numpy {numpy}: it needs triton >= 3.7 or numpy < 2.4"
    return ""


def run_script(*arguments: str | Path) -> None:
    """Run Python with Triton interpreting, and assert that it succeeds; skip the test where the interpreter cannot."""
    reason = fault(importlib.metadata.version("triton"), importlib.metadata.version("numpy"))
    if reason:
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@dataclass(frozen=True)
class Call:
    """One call of `module.function`: tensors and plain values by name.

    An argument "=name" is the tensor of that name itself, so that a kernel can work in place. `columns` cuts a tensor
    of (N, V + padding) down to V columns in the other process, which leaves it with longer strides than its rows.
    """

    function: str
    arguments: dict[str, Any]
    columns: dict[str, int] = field(default_factory=dict)


def interpret(folder: Path, calls: dict[str, Call]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return what each call returns, one tensor or several, and after it what its argument `out` holds."""
    tensors, spec = {}, {}
    for case, call in calls.items():
        plain = {}
        for name, value in call.arguments.items():
            if isinstance(value, torch.Tensor):
                # A copy, because the file format takes no tensors that share memory and a call may write into its own.
                tensors[f"{case}/{name}"] = value.clone(memory_format=torch.contiguous_format)
            else:
                plain[name] = value
        spec[case] = {"function": call.function, "plain": plain, "columns": call.columns}
    save_file(tensors, folder / "inputs.safetensors")
    (folder / "calls.json").write_text(json.dumps(spec))
    run_script(__file__, folder)
    flat = load_file(folder / "results.safetensors")
    counts = json.loads((folder / "counts.json").read_text())
    return {case: tuple(flat[f"{case}/{i}"] for i in range(count)) for case, count in counts.items()}


def run(case: str, spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Make one call and return its results."""
    module, _, function = spec["function"].rpartition(".")
    arguments = {name.removeprefix(f"{case}/"): t for name, t in tensors.items() if name.startswith(f"{case}/")}
    arguments |= {name: arguments[name][:, :width] for name, width in spec["columns"].items()}
    for name, value in spec["plain"].items():
        arguments[name] = arguments[value[1:]] if isinstance(value, str) and value[:1] == "=" else value
    result = getattr(importlib.import_module(module), function)(**arguments)
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    out = arguments.get("out")
    return results if out is None else [*results, out]


def main(folder: Path) -> None:
    """Make the calls that lie in a folder and write the results beside them."""
    tensors, results, counts = load_file(folder / "inputs.safetensors"), {}, {}
    for case, spec in json.loads((folder / "calls.json").read_text()).items():
        parts = run(case, spec, tensors)
        counts[case] = len(parts)
        results |= {f"{case}/{i}": part.clone(memory_format=torch.contiguous_format) for i, part in enumerate(parts)}
    save_file(results, folder / "results.safetensors")
    (folder / "counts.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What the compiler makes of every Triton kernel, without a GPU: registers, shared memory, spills, instructions.

`python -m benchmarks.kernel_report` compiles each variant ahead of time for three generations of GPUs and writes
benchmarks/results/kernel_report.json. The disassembler is the one that triton ships.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure import versions
from fastppo.kernels import (
    int8_linear,
    logit_gradient,
    paged_attention,
    ppo,
    row_statistics,
    row_threshold,
    sampling,
    tile_statistics,
)

RESULT = Path(__file__).parent / "results" / "kernel_report.json"
# Ampere (A100), Hopper (H100, H200), Blackwell (B200), and the shared memory in bytes that a program may have there.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
INSTRUCTIONS = {
    "tensor_core": r"(HGMMA|HMMA|UTC\w*MMA|DMMA)",
    "load_128": r"LDG\.E\.(?:\w+\.)*128",
    "async_load_128": r"LDGSTS\.E\.(?:\w+\.)*128",
    "store_128": r"STG\.E\.(?:\w+\.)*128",
    "local_load": r"LDL",
    "local_store": r"STL",
}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its pointers (by name, "*" for the rest) and its compile-time constants."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    def type_of(self, argument: str) -> str:
        """Return the type of an argument in the form of a signature."""
        if argument in self.constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return "*" + self.pointers.get(argument, self.pointers["*"])
        annotated = next(param.annotation_type for param in self.kernel.params if param.name == argument)
        return annotated or ("i64" if "stride" in argument else "i32")


def _row_constants(**flags: Any) -> dict[str, Any]:
    return {"HAS_SOFTCAP": False, "ACC": tl.float32, "BLOCK": row_statistics.MAX_BLOCK} | flags


def _statistics(name: str, logits: str, **flags: Any) -> Variant:
    without_ref = {"HAS_REF": False, "REF_SOFTCAP": False}
    absent = {} if flags.get("HAS_REF") else dict.fromkeys(("ref_ptr", "kl_ptr", "ref_logsumexp_ptr"))
    rows = "fp64" if logits == "fp64" else "fp32"
    pointers = {"logits_ptr": logits, "ref_ptr": logits, "labels_ptr": "i64", "*": rows}
    kernel, constants = row_statistics._row_statistics_kernel, _row_constants(**without_ref | absent | flags)
    return Variant(name, kernel, pointers, constants, row_statistics.LAUNCH)


def _gradient(name: str, logits: str, out: str, **flags: Any) -> Variant:
    names = {"HAS_LOGPROB": "logprobs_ptr", "HAS_E": "e_ptr", "HAS_LSE": "d_lse_ptr", "HAS_KL": "d_kl_ptr"}
    constants = _row_constants(**dict.fromkeys(names, False) | {"REF_SOFTCAP": False} | flags)
    absent = {argument: None for flag, argument in names.items() if not constants[flag]}
    if not constants["HAS_KL"]:
        absent |= dict.fromkeys(("ref_ptr", "kl_ptr", "ref_logsumexp_ptr"))
    pointers = {"logits_ptr": logits, "ref_ptr": logits, "out_ptr": out, "labels_ptr": "i64", "*": "fp32"}
    return Variant(name, logit_gradient._logit_gradient_kernel, pointers, constants | absent, row_statistics.LAUNCH)


def _ppo_rows(name: str, logits: str, out: str, **flags: Any) -> Variant:
    constants = _row_constants(**{"HAS_OLD": True, "HAS_REF": False, "HAS_E": False, "HAS_OUT": True} | flags)
    absent = {} if constants["HAS_REF"] else {"ref_ptr": None}
    pointers = {"logits_ptr": logits, "out_ptr": out, "labels_ptr": "i64", "*": "fp32"}
    return Variant(name, ppo._ppo_rows_kernel, pointers, constants | absent, row_statistics.LAUNCH)


def _tile(name: str, dtype: str, size: int, **flags: Any) -> Variant:
    blocks, launch = tile_statistics.TILES[size]
    constants = (
        {"HAS_SOFTCAP": False, "HAS_BIAS": False, "IS_EVEN": True, "ACC": tl.float32, "GROUP": 8} | blocks | flags
    )
    absent = {} if constants["HAS_BIAS"] else {"bias_ptr": None}
    pointers = {"labels_ptr": "i64", "*": "fp32"} | dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), dtype)
    return Variant(name, tile_statistics._tile_statistics_kernel, pointers, constants | absent, launch)


def _sample(name: str, logits: str, **flags: Any) -> Variant:
    limits = dict.fromkeys(("HAS_TOP_K", "HAS_TOP_P", "HAS_FORBIDDEN", "HAS_FLAGS"), False)
    sizes = {"HAS_SOFTCAP": False, "ACC": tl.float32, "TILE": sampling.MAX_TILE, "WIDTH": sampling.WIDTH}
    sizes |= {"CAPACITY": row_threshold.MAX_CAPACITY}
    absent = {} if flags.get("HAS_FORBIDDEN") else dict.fromkeys(("forbidden_ptr", "is_forbidden_ptr"))
    integers = dict.fromkeys(("requests_ptr", "positions_ptr", "forbidden_ptr", "tokens_ptr"), "i64")
    pointers = integers | {"logits_ptr": logits, "is_forbidden_ptr": "i1", "gathered_ptr": "i32", "*": "fp32"}
    return Variant(name, sampling._sample_kernel, pointers, limits | sizes | absent | flags, row_statistics.LAUNCH)


def _paged(name: str, dtype: str, size: int, group: int, **flags: Any) -> Variant:
    kernel, absent = paged_attention._split_kernel, {} if flags.get("HAS_SLOPES") else {"slopes_ptr": None}
    sizes = {"KV_HEADS": 8, "GROUP": group, "HEAD": size, "VALUE": size, "BLOCK_G": 16, "BLOCK_D": size}
    tiles = {"TILE": paged_attention.TILE[2 if dtype == "bf16" else 4], "BLOCK_E": size, "PAGE": 16, "SPLIT": 256}
    constants = {"HAS_SOFTCAP": False, "HAS_SLOPES": False, "ACC": tl.float32} | sizes | tiles | absent | flags
    pointers = {"*": "fp32"} | dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr"), dtype)
    pointers |= dict.fromkeys(("sequences_ptr", "positions_ptr", "tables_ptr"), "i32")
    return Variant(name, kernel, pointers, constants, paged_attention.LAUNCH)


def _paged_variants() -> Iterator[Variant]:
    yield _paged("paged_attention bf16", "bf16", 128, 4)
    yield _paged("paged_attention fp32 all", "fp32", 128, 4, HAS_SOFTCAP=True, HAS_SLOPES=True)
    merge = {"HAS_SINKS": True, "ACC": tl.float32, "HEADS": 32, "VALUE": 128, "BLOCK_E": 128, "SPLIT": 256}
    pointers, launch = {"positions_ptr": "i32", "out_ptr": "bf16", "*": "fp32"}, tile_statistics.MERGE_LAUNCH
    yield Variant("paged_attention merge", paged_attention._merge_kernel, pointers, merge, launch)


def _int8_variants() -> Iterator[Variant]:
    blocks = {"BLOCK_N": int8_linear.BLOCK_N, "BLOCK_K": int8_linear.BLOCK_K}
    pointers = {"codes_ptr": "i8", "x_ptr": "bf16", "*": "fp32"}
    for rows, is_whole in ((16, False), (64, True)):
        flags = {"ACC": tl.float32, "IS_WHOLE": is_whole, "BLOCK_M": rows}
        name = f"int8_linear bf16 {rows} rows" + " in parts" * (not is_whole)
        outputs = {"out_ptr": "bf16"} if is_whole else {}
        yield Variant(name, int8_linear._part_kernel, pointers | outputs, flags | blocks, int8_linear.LAUNCH)
    pointers, launch = {"out_ptr": "bf16", "*": "fp32"}, tile_statistics.MERGE_LAUNCH
    yield Variant("int8_linear sum", int8_linear._sum_kernel, pointers, {"ACC": tl.float32, "WIDTH": 1024}, launch)


def _row_variants() -> Iterator[Variant]:
    everything = {"HAS_SOFTCAP": True, "HAS_E": True}
    yield _statistics("row_statistics bf16", "bf16")
    yield _statistics("row_statistics fp32 softcap", "fp32", HAS_SOFTCAP=True)
    yield _statistics("row_statistics fp32 softcap ref", "fp32", HAS_SOFTCAP=True, HAS_REF=True, REF_SOFTCAP=True)
    yield _statistics("row_statistics fp64 softcap", "fp64", HAS_SOFTCAP=True, ACC=tl.float64)
    yield _gradient("logit_gradient bf16 in place", "bf16", "bf16")
    more = {"HAS_LOGPROB": True, "HAS_LSE": True, "HAS_KL": True, "REF_SOFTCAP": True}
    yield _gradient("logit_gradient fp32 to bf16 all", "fp32", "bf16", **everything, **more)
    yield _ppo_rows("ppo_rows fp32 to bf16", "fp32", "bf16")
    yield _ppo_rows("ppo_rows bf16 in place all", "bf16", "bf16", **everything, HAS_REF=True)


def variants() -> Iterator[Variant]:
    """List what is compiled: each kernel as the default path launches it, and at its most demanding."""
    yield from _row_variants()
    yield from _int8_variants()
    flags = {"HAS_OLD": True, "HAS_REF": True, "BLOCK": ppo.BLOCK}
    yield Variant("ppo_loss fp32", ppo._ppo_loss_kernel, {"*": "fp32"}, flags, row_statistics.LAUNCH)
    yield _tile("tile_statistics bf16", "bf16", 2)
    yield _tile("tile_statistics bf16 all", "bf16", 2, HAS_SOFTCAP=True, HAS_BIAS=True, IS_EVEN=False)
    yield _tile("tile_statistics fp32 all", "fp32", 4, HAS_SOFTCAP=True, HAS_BIAS=True, IS_EVEN=False)
    merge = {"ACC": tl.float32, "BLOCK": tile_statistics.MERGE_BLOCK}
    pointers, launch = {"labels_ptr": "i64", "*": "fp32"}, tile_statistics.MERGE_LAUNCH
    yield Variant("tile_statistics merge", tile_statistics._merge_kernel, pointers, merge, launch)
    yield from _paged_variants()
    yield _sample("sample fp32", "fp32")
    limits = dict.fromkeys(("HAS_TOP_K", "HAS_TOP_P", "HAS_FORBIDDEN", "HAS_FLAGS"), True)
    yield _sample("sample fp32 top-k", "fp32", HAS_TOP_K=True)
    yield _sample("sample bf16 top-p", "bf16", HAS_TOP_P=True)
    yield _sample("sample bf16 all", "bf16", HAS_SOFTCAP=True, **limits)


def build(variant: Variant, capability: int) -> tuple[bytes, int]:
    """Compile a variant for a CUDA capability; return its binary and the shared memory in bytes that it asks for."""
    signature = {name: variant.type_of(name) for name in variant.kernel.arg_names}
    # Without the alignment that pointers from an allocator have, loads would not be vectorised as they are in use.
    aligned = [i for i, kind in enumerate(signature.values()) if kind[0] in "*i"]
    source = ASTSource(
        variant.kernel,
        signature,
        {(variant.kernel.arg_names.index(name),): value for name, value in variant.constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    return compiled.asm["cubin"], compiled.metadata.shared


def disassembler() -> Path:
    """Return the path of cuobjdump in the installed triton. Raises FileNotFoundError where it ships none."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise FileNotFoundError(f"triton {triton.__version__} ships no {tool.name}: install its build for Linux")
    return tool


def _ask(option: str, path: Path) -> str:
    return subprocess.run([disassembler(), option, path], capture_output=True, text=True, check=True).stdout


def inspect(binary: bytes) -> dict[str, int]:
    """Return registers, stack and local bytes of a compiled kernel, and how often each kind of instruction occurs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage, code = _ask("-res-usage", path), _ask("-sass", path)
    found = {name.lower(): int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # An instruction's line: its address in a comment, perhaps a predicate, the operation.
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    for name, pattern in INSTRUCTIONS.items():
        found[name] = sum(bool(re.match(pattern, operation)) for operation in operations)
    return found | {"instructions": len(operations)}


@functools.cache
def figures(name: str, capability: int) -> dict[str, int]:
    """Return the figures of a variant, built at most once in a process."""
    variant = next(each for each in variants() if each.name == name)
    binary, shared = build(variant, capability)
    return {"shared": shared} | inspect(binary)


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="where to write the report (%(default)s)")
    path = parser.parse_args().output
    os.environ.pop("TRITON_INTERPRET", None)
    rows = []
    for variant in variants():
        for capability in SHARED_LIMIT:
            rows.append({"kernel": variant.name, "capability": capability} | figures(variant.name, capability))
            print(rows[-1])
    document = {"versions": versions(), "command": "python -m benchmarks.kernel_report", "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

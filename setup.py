"""Build and describe the package; tool settings live in pyproject.toml."""

import os
import platform
import sys
from glob import glob
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent

INSTALL_REQUIRES = [
    "torch>=2.10",
    "triton>=3.6; sys_platform == 'linux'",
    "transformers>=5,<6",
    "peft>=0.17",
    "accelerate>=1.1",
    "bitsandbytes>=0.46",
    "datasets>=3",
    "safetensors>=0.4",
    "numpy>=1.26",
    "pyyaml>=6",
    "matplotlib>=3.8",
    "rich>=13",
]

EXAMPLES = ["vaderSentiment>=3.3"]

EXTRAS_REQUIRE = {
    "examples": EXAMPLES,
    "flash": ["flash-attn>=2.7"],
    "tensorboard": ["tensorboard>=2.16"],
    "wandb": ["wandb>=0.18"],
    "trackio": ["trackio>=0.2"],
    # ruff and mypy are exact because a newer release of either finds new faults in old code.
    "dev": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff==0.17.6",
        "mypy==2.4.1",
        "types-PyYAML",
        "tensorboard>=2.16",
        *EXAMPLES,
    ],
}


# Files that are compiled for more than the baseline; csrc/cpu.cpp chooses among them at run time.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_avx512bf16": [*AVX512, "-mavx512bf16"]}
HAS_ISA_FLAGS = os.name != "nt" and platform.machine().lower() in ("x86_64", "amd64")
# On Linux OpenMP is the libgomp that torch has loaded: the name is the same, so the loader takes no second one.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


class BuildNative(build_ext):
    """Compile each file with the flags of its instruction set."""

    def build_extension(self, ext: Any) -> None:
        """Build one extension; setuptools has no flags per file, only per extension."""
        compile_file = self.compiler._compile

        def compile_for_isa(obj: str, src: str, suffix: str, cc_args: Any, extra: Any, pp_opts: Any) -> None:
            compile_file(obj, src, suffix, cc_args, [*extra, *ISA_FLAGS.get(Path(src).stem, [])], pp_opts)

        if HAS_ISA_FLAGS:
            self.compiler._compile = compile_for_isa
        super().build_extension(ext)


def native_extension() -> Pybind11Extension:
    """Describe fastppo._native, which may fail to build: everything has a plain PyTorch twin."""
    sources = [path for path in sorted(glob("csrc/*.cpp")) if HAS_ISA_FLAGS or Path(path).stem not in ISA_FLAGS]
    # Contraction to fused multiply-adds is written out where it is meant, so that builds agree with each other.
    flags = ["/O2"] if os.name == "nt" else ["-O3", "-ffp-contract=off", *OPENMP]
    return Pybind11Extension(
        "fastppo._native",
        sources,
        depends=sorted(glob("csrc/*.hpp")),
        define_macros=[("FASTPPO_X86", "1")] if HAS_ISA_FLAGS else [],
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=OPENMP,
        optional=True,
    )


def long_description() -> str:
    """Return the README, or nothing where it is absent (a partial checkout still installs)."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="fastppo",
    version="0.1.0",
    description="PPO for transformer language models on one machine, behind the API that TRL users know.",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    # fastppo.kernels is named explicitly: find_packages() leaves fastppo/kernels/__init__.py out of the sdist because
    # the mapping wins, and a wheel built from such an sdist has lost every kernel. kernels/ itself has no __init__.py,
    # so that it never hides the PyPI package of that name from a program started in the root of a checkout.
    packages=[*find_packages(include=["fastppo*"], exclude=["fastppo.kernels"]), "fastppo.kernels"],
    package_dir={"fastppo.kernels": "kernels"},
    package_data={"fastppo": ["py.typed", "*.pyi"]},
    ext_modules=[native_extension()],
    cmdclass={"build_ext": BuildNative},
    entry_points={"console_scripts": ["fastppo = fastppo.cli:main"]},
    zip_safe=False,
)

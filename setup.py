"""Build and describe the package; tool settings live in pyproject.toml."""

import os
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
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
        "ruff==0.17.6",
        "mypy==2.4.1",
        "types-PyYAML",
        "tensorboard>=2.16",
        *EXAMPLES,
    ],
}


def native_extension() -> Pybind11Extension:
    """Describe fastppo._native, which may fail to build: everything has a plain PyTorch twin."""
    return Pybind11Extension(
        "fastppo._native",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.hpp")),
        cxx_std=17,
        extra_compile_args=["/O2"] if os.name == "nt" else ["-O3"],
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
    entry_points={"console_scripts": ["fastppo = fastppo.cli:main"]},
    zip_safe=False,
)

"""Triton kernels. In a checkout the modules lie in kernels/ at its root; a wheel has them here, without this file."""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))

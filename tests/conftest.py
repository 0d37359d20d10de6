"""What every test gets: quiet threads, fixed seeds, no network, and the way to data that lies beside the project."""

import os

# Before torch is imported, which reads them once. Tiny tensors are slower on more threads, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_path() -> Callable[[str], Path]:
    """Find data that lies beside the project: `shared_path("golden/x.json")` is its path, or skips the test."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("FASTPPO_SHARED") or ROOT.parent / "shared")
        path = folder / name
        if not path.exists():
            pytest.skip(f"{name} is not in {folder}: set FASTPPO_SHARED to the folder that holds it")
        return path

    return find

"""Import TRL's old checkpoints: pickled weights become safetensors in this package's layout.

This is the only file that opens a pickle, and only because a person asked for it by running `fastppo convert`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastppo.atomic import Pathlike, atomic_directory, write_json

_WEIGHTS = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"
_ADAPTER = "adapter_model.bin"
_HEAD_PREFIX = "v_head."
# What is taken over as it is; code, optimisers and other pickles are left behind.
_COPIED = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")


def convert(source: Pathlike, destination: Pathlike) -> Path:
    """Write a checkpoint with pickled weights or value head (TRL 0.4 to 0.11) anew, without a pickle.

    Args:
        source: directory or hub name of a full model or of an adapter.
        destination: directory to make; it appears whole or not at all.

    Raises ValueError if there is no pickle to import, if one holds anything but tensors, or if the destination exists.
    """
    destination = Path(destination)
    if destination.exists():
        raise ValueError(f"{destination} exists already; choose another destination, or remove it")
    folder = _folder(os.fspath(source))
    is_adapter = (folder / "adapter_config.json").is_file()
    pickles = [name for name in (_WEIGHTS, _INDEX, _ADAPTER) if (folder / name).is_file()]
    if not pickles:
        raise ValueError(
            f"{source} holds neither {_WEIGHTS} nor {_ADAPTER}: there is no pickle to import; load it as it is"
        )
    print(
        f"warning: {', '.join(pickles)} of {source} is a pickle, a format that can carry code. It is opened with "
        "torch's restricted reader, which takes tensors only, because you asked for it; do so for sources you trust.",
        file=sys.stderr,
    )
    with atomic_directory(destination) as target:
        if is_adapter:
            _convert_adapter(folder, target)
        else:
            _convert_model(folder, target)
        _copy_rest(folder, target)
    return destination


def _folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.startswith((".", "/")):
        raise ValueError(f"{source} is not a directory; pass a checkpoint's directory or its name on the hub")
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in _COPIED] + ["pytorch_model*.bin", "adapter_model.*"]
    return Path(snapshot_download(source, allow_patterns=patterns))


def _convert_adapter(folder: Path, target: Path) -> None:
    if (folder / _ADAPTER).is_file():
        _save(_read(folder / _ADAPTER), target / "adapter_model.safetensors")
    elif (folder / "adapter_model.safetensors").is_file():
        shutil.copyfile(folder / "adapter_model.safetensors", target / "adapter_model.safetensors")
    else:
        raise ValueError(f"{folder} has an adapter_config.json, but neither {_ADAPTER} nor adapter_model.safetensors")
    if not (folder / _WEIGHTS).is_file():
        return
    head = _read(folder / _WEIGHTS)
    others = [name for name in head if not name.startswith(_HEAD_PREFIX)]
    if others or not head:
        raise ValueError(
            f"{folder / _WEIGHTS}: expected the value head alone ({_HEAD_PREFIX}*) beside an adapter, got {others[:3]} "
            f"({len(others)} such tensors); remove adapter_config.json to import it as a full model"
        )
    _save(head, target / "value_head.safetensors")


def _convert_model(folder: Path, target: Path) -> None:
    """Convert weights in one file, or shard by shard, so that one shard is in memory at a time."""
    if not (folder / _INDEX).is_file():
        _save(_read(folder / _WEIGHTS), target / "model.safetensors")
        return
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for shard in sorted(set(index["weight_map"].values())):
        # A name from the file may not lead out of the folder.
        tensors = _read(folder / Path(shard).name)
        renamed = Path(shard).name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        _save(tensors, target / renamed)
        names |= dict.fromkeys(tensors, renamed)
    write_json(target / "model.safetensors.index.json", {"metadata": index.get("metadata", {}), "weight_map": names})


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote; refuse everything that is not a dictionary of them."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not in torch's zip format (torch 1.6 and later); it is not opened")
    try:
        # The one place that reads a pickle: weights_only admits tensors and containers, and calls nothing else.
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is refused: it is damaged, or holds more than tensors ({reason})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is refused: expected a dictionary of tensors, got {type(content).__name__}")
    wrong = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(
            f"{path} is refused: {wrong[0]!r} is no tensor; expected the weights of a model and nothing else"
        )
    return content


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors, each with storage of its own, the value head in fp32 as it is always kept."""
    kept = {
        name: tensor.detach().to(torch.float32 if name.startswith(_HEAD_PREFIX) else tensor.dtype).contiguous().clone()
        for name, tensor in tensors.items()
    }
    save_file(kept, path, metadata={"format": "pt"})


def _copy_rest(folder: Path, target: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name != _INDEX and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)

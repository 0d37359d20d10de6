"""What a checkpoint holds, and how it is written and read: safetensors and JSON, never a pickle.

checkpoint-000010/
  model.safetensors, config.json, ...   the model, or adapter_model.safetensors and value_head.safetensors
  fastppo_critic/                       the critic's adapter or network, if it has one of its own
  optimizer.safetensors                 the optimiser's tensors, `<parameter number>.<name>`
  random.safetensors                    the states of torch's and numpy's global generators
  state.json                            everything else: counters, controller, running moments, schedule, cursor,
                                        what the optimiser counts in plain numbers
  manifest.json                         sha256 and size of every other file
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastppo.atomic import Pathlike, atomic_directory, write_json
from fastppo.models.critic import CRITIC, critic_kind

_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-\d+")
_HIDDEN = "__bnb_optimizer_quant_state__"


def save_checkpoint(directory: Pathlike, model: Any, tokenizer: Any, optimizer: Any, state: dict[str, Any]) -> Path:
    """Write a checkpoint; the directory appears whole or not at all. `state` must be JSON.

    Raises ValueError if the optimiser keeps something that is neither a tensor nor a plain value.
    """
    with atomic_directory(directory) as target:
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        tensors, numbers, groups = _optimizer_state(optimizer)
        save_file(tensors, target / "optimizer.safetensors")
        save_file(_random_tensors(), target / "random.safetensors")
        everything = {**state, "optimizer_groups": groups, "optimizer_numbers": numbers, "random": _random_numbers()}
        (target / "state.json").write_text(json.dumps(everything, indent=2), encoding="utf-8")
        files = [file for file in sorted(target.rglob("*")) if file.is_file()]
        write_json(target / _MANIFEST, {_name_of(file, target): _digest(file) for file in files})
    return Path(directory)


def load_checkpoint(
    directory: Pathlike, model: Any, optimizer: Any, check: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Load model, optimiser and random generators in place; return the rest of the state.

    `check` sees the state before anything is changed, and raises if it does not fit.
    Raises ValueError for a directory that is no checkpoint, is damaged, or belongs to another model.
    """
    directory = Path(directory)
    verify(directory)
    state: dict[str, Any] = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    check(state)
    _load_model(directory, model)
    kept = {**load_file(directory / "optimizer.safetensors"), **state.pop("optimizer_numbers", {})}
    _load_optimizer(optimizer, kept, state.pop("optimizer_groups"))
    _restore_random(load_file(directory / "random.safetensors"), state.pop("random"))
    return state


def latest_checkpoint(directory: Pathlike) -> Path:
    """Return the newest undamaged checkpoint under a run's directory; ValueError if there is none."""
    found = [path for path in Path(directory).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            verify(path)
        except ValueError:
            continue
        return path
    raise ValueError(f"{directory} holds no whole checkpoint (looked at {len(found)}); start the run anew")


def verify(directory: Pathlike) -> None:
    """Raise ValueError unless every file is there with the size and checksum that were written."""
    directory = Path(directory)
    if not (directory / _MANIFEST).is_file():
        raise ValueError(f"{directory} is no checkpoint: it has no {_MANIFEST}; pass a checkpoint-<step> directory")
    manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    for name, expected in manifest.items():
        file = directory / name
        if not file.is_file() or _digest(file) != expected:
            raise ValueError(f"{file} is missing or damaged; resume from an older checkpoint")


def _name_of(file: Path, directory: Path) -> str:
    return file.relative_to(directory).as_posix()


def _digest(file: Path) -> dict[str, Any]:
    checksum = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            checksum.update(block)
    return {"sha256": checksum.hexdigest(), "bytes": file.stat().st_size}


def _load_model(directory: Path, model: Any) -> None:
    """Copy the saved weights into the model's own tensors."""
    saved, critic = _tensors(directory), _tensors(directory / CRITIC)
    kind = critic_kind(model)
    if bool(critic) != (kind != "head"):
        found = f"has a critic in {CRITIC}/" if critic else f"has no critic in {CRITIC}/"
        raise ValueError(f"{directory} {found}, and the model is one with critic={kind!r}; use the same settings")
    unknown = _load_adapter(model, saved) if model.is_peft_model else _load_weights(model, saved)
    if kind == "adapter":
        unknown += _set_adapter(model, critic, CRITIC)
    elif kind == "full":
        unknown += _load_weights(model.critic, critic)
    if unknown:
        raise ValueError(f"{directory} belongs to another model: it holds {unknown[:3]} ({len(unknown)} such tensors)")


def _tensors(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of the model whose files are in a directory."""
    saved: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in ("optimizer.safetensors", "random.safetensors"):
            saved |= load_file(file)
    return saved


def _load_weights(model: Any, saved: dict[str, Tensor]) -> list[str]:
    """Load a full model; return the names that it does not have, in which case nothing was loaded."""
    own = dict(model.state_dict())
    unknown = sorted(name for name in saved if name not in own or own[name].shape != saved[name].shape)
    if not unknown:
        with torch.no_grad():
            for name, tensor in saved.items():
                own[name].copy_(tensor)
    return unknown


def _load_adapter(model: Any, saved: dict[str, Tensor]) -> list[str]:
    """Load an adapter and the value head; return the names that the model does not have."""
    head = {name.removeprefix("v_head."): saved.pop(name) for name in list(saved) if name.startswith("v_head.")}
    model.v_head.load_state_dict(head)
    return _set_adapter(model, saved, next(iter(model.pretrained_model.active_adapters)))


def _set_adapter(model: Any, saved: dict[str, Tensor], name: str) -> list[str]:
    from peft import set_peft_model_state_dict

    return list(set_peft_model_state_dict(model.pretrained_model, saved, adapter_name=name).unexpected_keys)


def _optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Return the tensors and the plain values that an optimiser keeps for its parameters, and its groups."""
    state = optimizer.state_dict()
    for entries in state["state"].values():  # bitsandbytes puts its tensors where FSDP does not see them
        entries.update(entries.pop(_HIDDEN, {}))
    kept = {f"{number}.{name}": value for number, entries in state["state"].items() for name, value in entries.items()}
    tensors = _apart({key: value.detach().cpu() for key, value in kept.items() if isinstance(value, Tensor)})
    numbers = {key: value for key, value in kept.items() if key not in tensors}
    for key, value in numbers.items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise ValueError(
                f"{type(optimizer).__name__} keeps a {type(value).__name__} under {key!r}, expected tensors and numbers"
                "; train with an optimiser that does, such as AdamW, or without checkpoints"
            )
    return tensors, numbers, state["param_groups"]


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a place of its own for each, as safetensors wants it: 8-bit moments share code books."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensors[key] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return tensors


def _load_optimizer(optimizer: Any, kept: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in groups] != expected:
        raise ValueError(f"the checkpoint's optimiser trains other parameters than this one ({expected} of them)")
    state: dict[int, dict[str, Any]] = {}
    for key, value in kept.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _page(optimizer: Any) -> None:
    """Put loaded moments into the pages of a paged optimiser of bitsandbytes, which would leave them on the GPU."""
    for parameter, entries in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = entries[name]
            entries[name] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
            entries[name].copy_(loaded)


def _random_tensors() -> dict[str, Tensor]:
    state: Any = np.random.get_state()
    keys = state[1]
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _random_numbers() -> dict[str, Any]:
    state: Any = np.random.get_state()
    name, _, position, has_gauss, gauss = state
    return {"python": random.getstate(), "numpy": [name, position, has_gauss, gauss]}


def _restore_random(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    version, keys, gauss = numbers["python"]
    random.setstate((version, tuple(keys), gauss))
    name, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])

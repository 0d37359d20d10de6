"""What the command line loads by name: tokenizers, and rewards from the user's own code."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastppo.cli.arguments import nearest
from fastppo.rewards.policy import RewardPolicy


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model; an adapter without one has that of its base model.

    Raises ValueError for a name that can only be a directory and is none.
    """
    from transformers import AutoTokenizer

    check_directory(name, "check model_name_or_path")
    adapter = Path(name, "adapter_config.json")
    if adapter.is_file() and not Path(name, "tokenizer_config.json").is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        check_directory(base, f"it is the base model of the adapter in {name}")
        name = base
    return AutoTokenizer.from_pretrained(name)


def check_directory(name: str, remedy: str) -> None:
    """Raise ValueError, with the remedy, for a name that can only be a directory and is none."""
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    if is_path and not Path(name).is_dir():
        raise ValueError(f"there is no directory {name} (in {Path.cwd()}); {remedy}")


def is_url(name: str) -> bool:
    """Whether a reward's name is that of a server."""
    return name.lower().startswith(("http://", "https://"))


def load_reward(name: str, policy: RewardPolicy | None = None, timeout: float | None = None) -> Callable[..., Any]:
    """Return the reward of a name on the command line.

    A URL is a server's, asked under the policy, with `timeout` seconds for a request. `module:function` or
    `file.py:function` are imported; modules are also looked for in the current directory. Anything else is a
    text-classification model. Raises ValueError for a name that is none of these.
    """
    if is_url(name):
        return _server(name, policy or RewardPolicy(), timeout)
    place, _, attribute = name.rpartition(":")
    if not place and not attribute.endswith(".py"):
        return _classifier(attribute)
    if not place or not attribute:
        raise ValueError(
            f"reward must be module:function, file.py:function, a URL, or the directory or hub name of a model; got "
            f"{name!r}"
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    reward = getattr(module, attribute, None)
    if not callable(reward):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place} has no function {attribute!r}{nearest(attribute, known)}; define it there")
    return reward  # type: ignore[no-any-return]


def _server(url: str, policy: RewardPolicy, timeout: float | None) -> Callable[..., Any]:
    from fastppo.rewards.url import URLReward

    given = {"timeout": timeout, "batch_size": policy.batch_size}
    chosen: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return URLReward(url, on_error=policy.on_error, **chosen)


def _classifier(name: str) -> Callable[..., Any]:
    from transformers import AutoModelForSequenceClassification

    from fastppo.reward_models import ModelReward

    check_directory(name, "check reward")
    try:
        return ModelReward(AutoModelForSequenceClassification.from_pretrained(name))
    except OSError as error:
        raise ValueError(
            f"reward {name!r} is no model that can be loaded ({str(error).splitlines()[0]}); it must be "
            "module:function, file.py:function, a URL, or the directory or hub name of a text-classification model"
        ) from error


def _load_module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the reward's own import failed
        raise ValueError(f"there is no module {name!r} in {here} or among the installed ones; check reward") from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {path} (in {Path.cwd()}); check reward")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Registered first, as the import statement does it: dataclasses look their module up.
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    specification.loader.exec_module(module)
    return module

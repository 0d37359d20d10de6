"""Where a run comes from: versions, machine, arguments, with secrets left out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("fastppo", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "triton", "numpy")
REDACTED = "[redacted]"
# `max_new_tokens` and `tokenizer` are no secrets, nor are `pad_token` and its kin.
_SECRET_NAME = re.compile(
    r"(?i)(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(token(?!s|iz)|key|secret|passw|credential|authorization)"
)
_VALUE = re.compile(r"([^&=]+)=[^&]{12,}")  # of a URL's query: signatures and codes go by any name
_SECRETS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (
        re.compile(r"(?i)\b(authorization\s*[:=]\s*|bearer\s+|basic\s+)(bearer\s+|basic\s+)?[\w.~+/=-]{8,}"),
        r"\1" + REDACTED,
    ),
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{REDACTED}@"),
    (re.compile(r"(://[^\s?#]*\?)([^\s#'\"]+)"), lambda url: url[1] + _VALUE.sub(rf"\1={REDACTED}", url[2])),
    (re.compile(r"\b(hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}"), REDACTED),
    (re.compile(r"(?<![\w])(local-)?[0-9a-fA-F]{40}(?![\w])"), REDACTED),
    (re.compile(r"(?i)\b([\w-]*(?:token(?!s|iz)|key|secret|passw|credential)[\w-]*)=([^\s&,;]+)"), rf"\1={REDACTED}"),
]


def plain(value: Any, name: str = "") -> Any:
    """Return a value as JSON has it: no secrets, None for numbers that are not finite, text for other objects.

    A secret is text that looks like one (hub and API keys, passwords in URLs), and any text under a name like
    `hub_token` or `api_key`.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, name) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, name)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of numpy and torch
        return plain(value.item(), name)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    text = str(value)
    return REDACTED if text and _SECRET_NAME.search(name) else redact(text)


def redact(text: str) -> str:
    """Return a text without what looks like a secret in it.

    >>> redact("https://me:pw@host/x?api_key=123")
    'https://[redacted]@host/x?api_key=[redacted]'
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redact_command(arguments: Sequence[str]) -> list[str]:
    """Return a command line without secrets: neither what looks like one, nor what follows a flag named like one.

    Of a reward's URL only the host stays: a webhook's path is its password.
    """
    shown, is_secret, flag = [], False, ""
    for argument in arguments:
        is_flag = argument.startswith("-")
        flag = argument.partition("=")[0] if is_flag else flag
        plain_one = redact(argument)
        if flag == "--reward":
            plain_one = re.sub(r"(https?://[^/\s]+/)\S+", rf"\1{REDACTED}", plain_one)
        shown.append(REDACTED if is_secret and not is_flag else plain_one)
        is_secret = is_flag and "=" not in argument and bool(_SECRET_NAME.search(argument))
    return shown


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "fastppo" not in found:  # run from a checkout that was never installed
        found["fastppo"] = sys.modules["fastppo"].__version__
    return found


def machine() -> dict[str, Any]:
    """Return what the machine is: system, processor, cores that this process may use, memory, GPUs."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
    }


def commit() -> str | None:
    """Return the commit of the current directory's repository, with a + if files in it were changed; else None."""
    try:
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        head: str = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changes)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def native_backend() -> str:
    """Return whether the compiled part is there, in words."""
    return "built" if importlib.util.find_spec("fastppo._native") is not None else "not built, slower"

"""Flags: they are the fields of dataclasses, and the keys of a YAML file; the command line overrides the file."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class UsageError(ValueError):
    """A command line that cannot be meant."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is most like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse all the arguments; raise UsageError, naming the nearest flag, for those that the parser does not know."""

    def error(message: str) -> NoReturn:
        raise UsageError(f"{message}; see {parser.prog} --help")

    parser.allow_abbrev = False
    parser.error = error  # type: ignore[method-assign]
    known = [option for action in parser._actions for option in action.option_strings]
    # Before parsing: a misspelt required flag would otherwise be reported as a missing one.
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag[2:3].isalpha() and flag.startswith("--") and flag not in known:
            raise UsageError(f"unknown flag {flag}{nearest(flag, known)}; see {parser.prog} --help")
    namespace, rest = parser.parse_known_args(list(arguments))
    if rest:
        raise UsageError(f"cannot place {' '.join(rest)!r}; see {parser.prog} --help")
    return namespace


def parse_dataclasses(program: str, kinds: Sequence[type], arguments: Sequence[str]) -> list[Any]:
    """Return one instance of each dataclass, from flags and from the YAML file that --config names.

    Raises UsageError for unknown flags or keys and for values of the wrong type.
    """
    from transformers import HfArgumentParser

    usage = f"{program} [--config FILE] --flag VALUE ..."
    parser = HfArgumentParser(kinds, prog=program, usage=usage, allow_abbrev=False)
    _describe(parser, kinds)
    flags = {option for action in parser._actions for option in action.option_strings}
    given = vars(parse(parser, [*_from_file(arguments, flags), *arguments]))
    return [kind(**{field.name: given[field.name] for field in dataclasses.fields(kind)}) for kind in kinds]


def _describe(parser: Any, kinds: Sequence[type]) -> None:
    """Give each flag the text under its field as help, and those of dictionaries a JSON reader."""
    texts = {name: text for kind in kinds for name, text in _field_texts(kind).items()}
    for action in parser._actions:
        if action.dest in texts and action.help is None:
            # argparse takes % for its own placeholders.
            action.help = texts[action.dest].replace("%", "%%")
        if isinstance(action.default, dict):
            action.type, action.metavar = _json_object, "JSON"


def _field_texts(kind: type) -> dict[str, str]:
    """Return the string below each field of a dataclass, which only its source has."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {field.name: " " for field in dataclasses.fields(kind)}  # argparse shows a default only beside a text
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[ast.unparse(field.target)] = str(below.value.value)
    return texts


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"name": "value"}}, got {text!r}')
    return value


def _from_file(arguments: Sequence[str], flags: set[str]) -> list[str]:
    """Return the contents of the --config file as flags, to stand before the others."""
    scanner = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scanner.add_argument("--config", nargs="?")
    path = scanner.parse_known_args(list(arguments))[0].config
    if path is None:
        return []
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} must hold keys and values (flag: value), got {type(content).__name__}")
    tokens = []
    for key, value in content.items():
        if f"--{key}" not in flags:
            raise UsageError(f"{path} has the unknown key {key}{nearest(str(key), [flag[2:] for flag in flags])}")
        tokens += _as_flag(str(key), value)
    return tokens


def _as_flag(key: str, value: Any) -> list[str]:
    if value is None or value == []:  # the default stands
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}"]

"""The `fastppo` command: its subcommands, and what its exit codes mean.

0 done; 1 training broke down, or a plan does not fit; 2 something given cannot work; 130 interrupted; 143 told to end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fastppo.cli.arguments import UsageError, nearest, parse

_USAGE = """usage: fastppo COMMAND [--flag VALUE ...] [--traceback]

  sft        teach a language model by texts, prompts with completions, or chats
  reward     train a reward model from pairs of a better and a worse text
  ppo        improve a language model with a reward
  generate   talk to a model
  inspect    show how a model will be run, and why
  export     write a trained model as plain weights
  plan       say what a run will take of memory, and what would fit
  demo       make a small model from nothing and improve it, without a download
  convert    import a TRL checkpoint whose value head is a pickle
  env        versions and machine, for a bug report

fastppo COMMAND --help lists a command's flags; --traceback shows where an error came from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default this program's; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    wants_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0 if arguments else 2
    try:
        return _run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except FloatingPointError as error:
        if wants_traceback:
            raise
        return _fail(str(error), 1)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if wants_traceback:
            raise
        return _fail(str(error), 2)


def _run(command: str, arguments: list[str]) -> int:
    if command == "--version":
        from fastppo import __version__

        print(f"fastppo {__version__}")
        return 0
    if command not in _COMMANDS:
        raise UsageError(
            f"there is no command {command!r}{nearest(command, _COMMANDS)}; they are {', '.join(_COMMANDS)}"
        )
    return _COMMANDS[command](arguments)


def _fail(message: str, code: int) -> int:
    from fastppo.monitor.provenance import redact

    print(f"fastppo: {redact(message)}", file=sys.stderr)  # it may quote an exception of a reward, and that a URL
    return code


def _ppo(arguments: list[str]) -> int:
    from fastppo.cli.train import ppo

    return ppo(arguments)


def _sft(arguments: list[str]) -> int:
    from fastppo.cli.supervised import sft

    return sft(arguments)


def _reward(arguments: list[str]) -> int:
    from fastppo.cli.supervised import reward

    return reward(arguments)


def _generate(arguments: list[str]) -> int:
    from fastppo.cli.generate import generate

    return generate(arguments)


def _inspect(arguments: list[str]) -> int:
    from fastppo.cli.inspect import inspect

    return inspect(arguments)


def _export(arguments: list[str]) -> int:
    from fastppo.cli.export import export

    return export(arguments)


def _plan(arguments: list[str]) -> int:
    from fastppo.cli.plan import plan

    return plan(arguments)


def _demo(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("fastppo demo", description="Make a small model from nothing and improve it.")
    parser.add_argument("--output_dir", default="runs/demo", help="folder for everything that the demo makes")
    parser.add_argument("--seed", type=int, default=0)
    given = parse(parser, arguments)
    from fastppo.demo.run import main as run_demo

    run_demo(given.output_dir, given.seed)
    return 0


def _convert(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastppo convert", description="Import a TRL checkpoint with a pickled value head."
    )
    parser.add_argument("source", help="directory, or name on the Hugging Face hub")
    parser.add_argument("destination", help="directory to make")
    given = parse(parser, arguments)
    from fastppo.convert import convert

    print(f"wrote {convert(given.source, given.destination)}")
    return 0


def _env(arguments: list[str]) -> int:
    parse(argparse.ArgumentParser("fastppo env", description="Print versions and machine for a bug report."), arguments)
    from fastppo.monitor.provenance import machine, native_backend, versions

    for name, value in {**versions(), "native backend": native_backend(), **machine()}.items():
        print(f"- {name}: {value}")
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "sft": _sft,
    "reward": _reward,
    "ppo": _ppo,
    "generate": _generate,
    "inspect": _inspect,
    "export": _export,
    "plan": _plan,
    "demo": _demo,
    "convert": _convert,
    "env": _env,
}

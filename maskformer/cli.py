"""The ``maskformer`` command: one word for each thing to do, each the same main as the script of ``tools/``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import maskformer


class Command(NamedTuple):
    """A word after ``maskformer``.

    Attributes:
        module: whose ``main(argv)`` does it; imported only when it is asked for, so that help is instant.
        arguments: put before the user's.
        help: one line.
    """

    module: str
    arguments: tuple[str, ...]
    help: str


COMMANDS = {
    "train": Command("maskformer.engine.main", (), "train a model as a config file says, and evaluate it"),
    "eval": Command("maskformer.engine.main", ("--eval-only",), "evaluate weights on the test sets of a config file"),
    "analyze": Command("maskformer.analyze", (), "tell parameters, multiply-adds, speed and memory of a model"),
    "convert": Command(
        "maskformer.convert", (), "convert weights: published names, Hugging Face, a model file of ours"
    ),
    "score": Command("maskformer.score", (), "score prediction files, without a model"),
    "demo": Command("maskformer.demo", (), "segment images and save them as coloured overlays"),
}


def usage() -> str:
    """What ``maskformer --help`` prints."""
    lines = ["usage: maskformer <command> [arguments]", "", "commands:"]
    lines += [f"  {name:<8} {command.help}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "maskformer <command> --help   tells the arguments of a command",
        "maskformer --version          tells the version",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``maskformer <command> …``.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: that of the command, or 2 for a command that does not exist.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())  # noqa: T201
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"maskformer {maskformer.__version__}")  # noqa: T201
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(COMMANDS)}"
        print(f"error: maskformer has no command {name!r}; {remedy}", file=sys.stderr)  # noqa: T201
        return 2
    command = COMMANDS[name]
    sys.argv[0] = f"maskformer {name}"  # what the command's own help and errors call it
    result: int = import_module(command.module).main([*command.arguments, *rest])
    return result


if __name__ == "__main__":
    sys.exit(main())

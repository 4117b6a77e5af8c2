"""What the scripts in ``datasets/`` have in common: arguments, messages, exit codes."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskformer.data.dataset import datasets_root
from maskformer.data.preparation.runner import default_workers
from maskformer.errors import UserError

INTERRUPTED, TERMINATED = 130, 143

Prepare = Callable[[argparse.Namespace], None]


def build_parser(description: str, splits: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments that every preparation takes.

    Args:
        description: what is made from what.
        splits: of the data set.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="What an earlier run has finished is checked and kept, so an interrupted run goes on where it was.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, help="folder of all data sets (default: $DETECTRON2_DATASETS, else ./datasets)"
    )
    parser.add_argument("--splits", nargs="+", choices=splits, default=list(splits), help="parts to do (default: all)")
    parser.add_argument("--workers", type=_positive, default=default_workers(), help="processes (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="make also what is there already")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: give 1 or more")
    return number


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, with which job schedulers and service managers end a process: it ends like one that Ctrl-C stops."""


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Lets SIGTERM end the block by an exception, so that worker processes are ended too."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set what a signal does
        yield
        return

    def stop(*_: Any) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _speaking() -> Iterator[None]:
    """What is logged goes to standard output, as it is."""
    logger = logging.getLogger("maskformer")
    handler, level = logging.StreamHandler(sys.stdout), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def plain_command(
    description: str, splits: Sequence[str], prepare: Callable[..., None], argv: Sequence[str] | None = None
) -> int:
    """The command of a preparation that takes the common arguments alone.

    Args:
        description: as of `build_parser`.
        splits: as of `build_parser`.
        prepare: called with root and splits, ``workers`` and ``overwrite``.
        argv: as of `run_command`.

    Returns:
        Exit code, as `run_command`.
    """

    def work(arguments: argparse.Namespace) -> None:
        prepare(arguments.root, arguments.splits, workers=arguments.workers, overwrite=arguments.overwrite)

    return run_command(build_parser(description, splits), work, argv)


def run_command(parser: argparse.ArgumentParser, prepare: Prepare, argv: Sequence[str] | None = None) -> int:
    """Runs a preparation.

    Args:
        parser: of `build_parser`, perhaps with more arguments.
        prepare: takes the arguments; ``root`` is a folder.
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 2 if something is missing or damaged, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = parser.parse_args(argv)
    arguments.root = (arguments.root or datasets_root()).expanduser()
    try:
        with _speaking(), _ending_in_order():
            prepare(arguments)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, _TerminatedError)
        by = "SIGTERM" if terminated else "Ctrl-C"
        print(f"stopped by {by}; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return TERMINATED if terminated else INTERRUPTED
    return 0

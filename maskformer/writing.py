"""Writing files that never exist half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from maskformer.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only when it is complete and on disk.

    Yields:
        A binary file under a temporary name in the same folder; renamed when the block ends without an exception,
        removed otherwise.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, (ConnectionError, TimeoutError)):
            raise  # the reading side of a download, which has a remedy of its own
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): free space or choose another"
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file that never exists half-written.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    with atomic_write(path) as file:
        file.write(text.encode())


def check_writable(path: Path) -> None:
    """Finds out, before long work, whether its result can be written; nothing is made.

    Raises:
        UserError: the path is a folder, or neither its folder nor one that would be made for it can be written.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file in it")
        place = path.parent
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):  # permission bits do not tell of read-only file systems
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another") from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure; Windows has no such call and does not need it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

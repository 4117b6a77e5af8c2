"""Paths that files of others name: they stay in the folder that the user named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskformer.errors import UserError


def inside(folder: Path, name: Any, source: str | Path) -> Path:
    """A file in a folder or in one below it.

    Args:
        folder: that the user named.
        name: relative path, as `source` has it.
        source: file that has it, named in errors.

    Raises:
        UserError: if the path is absolute or goes up.
        TypeError: if the name is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"a file_name is {name!r:.80}")
    path = Path(name)
    if path.anchor or ".." in path.parts or not path.name:
        raise UserError(
            f"{source} has the file_name {name!a:.200}, which leaves the folder {str(folder)!r}: "
            "write paths below that folder, without '..'"
        )
    return folder / path

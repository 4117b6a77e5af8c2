"""Data sets by name: `get_dataset` and `get_metadata`. Nothing touches the disk before records are read.

Names: the built-in ones (`dataset_names`), and ``folder:<path>:<split>`` for any folder with a ``dataset.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable

from maskformer.data.dataset import Dataset, Metadata, nearest
from maskformer.data.datasets import (
    ade20k,
    ade20k_full,
    camvid,
    cityscapes,
    coco,
    coco_stuff,
    folder,
    mapillary,
    shapes,
)
from maskformer.errors import UserError

__all__ = ["Dataset", "Metadata", "dataset_names", "get_dataset", "get_metadata", "register_dataset"]

_FAMILIES = (ade20k, ade20k_full, camvid, cityscapes, coco, coco_stuff, mapillary, shapes)
_BUILDERS: dict[str, Callable[[str], Dataset]] = {name: family.build for family in _FAMILIES for name in family.NAMES}


def register_dataset(name: str, build: Callable[[str], Dataset]) -> None:
    """Adds a data set.

    Args:
        name: not used before.
        build: name → data set; must not touch the disk (records are listed when they are first read).

    Raises:
        ValueError: if the name is taken.
    """
    if name in _BUILDERS or name.startswith(folder.PREFIX):
        raise ValueError(f"the data set name {name!r} is taken")
    _BUILDERS[name] = build


def dataset_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_BUILDERS)


def get_dataset(name: str) -> Dataset:
    """The data set of this name; its records are listed when they are first read.

    Raises:
        UserError: if there is no such name, or a folder's ``dataset.yaml`` is missing or wrong.
    """
    if name.startswith(folder.PREFIX):
        return folder.build(name)
    if name not in _BUILDERS:
        raise UserError(
            f"data set {name!r} is not known: {nearest(name, _BUILDERS)} (your own data: 'folder:<path>:<split>')"
        )
    return _BUILDERS[name](name)


def get_metadata(name: str) -> Metadata:
    """Classes, things, colours and ignore label of a data set; only ``folder:`` names read a file (dataset.yaml).

    Raises:
        UserError: as `get_dataset`.
    """
    return get_dataset(name).metadata

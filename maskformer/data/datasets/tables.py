"""Class tables that ship with the package, as JSON files in `maskformer/data/metadata`.

Each row has ``label`` and ``name``, and as far as its source states them ``color`` and whether it is a countable object
(``isthing``, or ``instances`` where each object is labelled on its own). Other columns are ids of the data set's own
files, such as ``coco_id``, or ``id`` of Cityscapes.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, NamedTuple

from maskformer.data.dataset import Color, distinct_colors


class ClassTable(NamedTuple):
    """K classes, in the order of their contiguous labels."""

    classes: list[str]
    things: list[bool]
    colors: list[Color]
    dataset_ids: list[int]


def read_rows(file_name: str) -> list[dict[str, Any]]:
    """The rows of one table, in the order of their contiguous labels."""
    text = resources.files("maskformer.data").joinpath("metadata").joinpath(file_name).read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["classes"]
    return rows


def read_table(file_name: str) -> ClassTable:
    """Reads one table.

    A class without a colour gets one that no other has; one of which nothing says that it is a thing is none. Without
    a ``coco_id`` the data set's ids, which prediction files are written with, are the contiguous labels.
    """
    rows = read_rows(file_name)
    given: list[Color | None] = [_color(row.get("color")) for row in rows]
    taken = [color for color in given if color is not None]
    made = iter(distinct_colors(len(rows) - len(taken), taken))
    return ClassTable(
        classes=[row["name"] for row in rows],
        things=[bool(row.get("isthing", row.get("instances", False))) for row in rows],
        colors=[next(made) if color is None else color for color in given],
        dataset_ids=[int(row.get("coco_id", row["label"])) for row in rows],
    )


def _color(channels: list[int] | None) -> Color | None:
    return None if channels is None else (channels[0], channels[1], channels[2])

"""Class tables that ship with the package, as JSON files in `maskformer/data/metadata`."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, NamedTuple

from maskformer.data.dataset import Color


class ClassTable(NamedTuple):
    """K classes, in the order of their contiguous labels."""

    classes: list[str]
    things: list[bool]
    colors: list[Color]
    dataset_ids: list[int]


def read_table(file_name: str) -> ClassTable:
    """Reads one table; without a ``coco_id`` the data set's ids are the contiguous labels."""
    text = resources.files("maskformer.data").joinpath("metadata").joinpath(file_name).read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["classes"]
    return ClassTable(
        classes=[row["name"] for row in rows],
        things=[bool(row["isthing"]) for row in rows],
        colors=[(row["color"][0], row["color"][1], row["color"][2]) for row in rows],
        dataset_ids=[int(row.get("coco_id", row["label"])) for row in rows],
    )

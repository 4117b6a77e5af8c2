"""The class tables that ship with the package, pinned: a changed name, order or colour changes what a model means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import maskformer.data
from maskformer.data.datasets.tables import read_rows, read_table

COLUMNS = ("label", "name", "id", "coco_id", "ade_index", "isthing", "instances", "color")
# File name → sha256 of its rows, and of the table that is made of them.
DIGESTS: dict[str, tuple[str, str]] = {
    "ade20k_150.json": (
        "720fd6d1d36d83d1ed831b1eb06e91aa70757a9dbc5eb465857c621ca8393c07",
        "e7a71cd6d993a97c81290d732678cce54dcd6cc82aecd7a22a0ddebf626113a3",
    ),
    "ade20k_full_847.json": (
        "c01708ea73304b8d48493e283376debd169ec73b3d34a909574b307ea497f73e",
        "36ff490d8a5aeef0e049ea73ff698b12e75462c3c7c7c23d1c280018bda23ca2",
    ),
    "cityscapes_19.json": (
        "835bd3143b30a1e7600917ea85591254cc0ed4620539860efd89dd4cedbac1fa",
        "1d6c389d4b5f54acaee8676d8cb10add7f4daef714d618e9e8166c4595173a31",
    ),
    "coco_panoptic_133.json": (
        "58d9f6d60f051a85f587f32516912854106ec2296025caca998e73c7c763abe2",
        "6c015f5c2c08657c27c4b4b166c195b56113e98b4880464a67606c02ed744612",
    ),
    "coco_stuff_171.json": (
        "3deeb87a088bf52464054d035a0e9b233a505c343c0614248a029a9df46eed8a",
        "f45a13fbccee96948a6bf83bc74b8545c3bf4089cf4e838c6eeae2f0d3b40a74",
    ),
    "mapillary_vistas_65.json": (
        "65a7abbd8d7dc07fa0ff955ad25442844add2be7a1f29e29f3315047ecddb2d6",
        "bcf1581f2da614c6bee157a1b5230a9b242df3f8ed31fd485a7df4335a2678ac",
    ),
}


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def rows_digest(rows: list[dict[str, Any]]) -> str:
    return digest([[row.get(column) for column in COLUMNS] for row in rows])


def test_every_table_is_pinned() -> None:
    folder = Path(maskformer.data.__file__).parent / "metadata"
    tables = {path.name for path in folder.glob("*.json") if "classes" in json.loads(path.read_text("utf-8"))}
    assert tables == DIGESTS.keys()


@pytest.mark.parametrize("name", DIGESTS)
def test_rows(name: str) -> None:
    rows = read_rows(name)
    assert {key for row in rows for key in row} <= set(COLUMNS)
    assert [row["label"] for row in rows] == list(range(len(rows)))
    assert rows_digest(rows) == DIGESTS[name][0]


@pytest.mark.parametrize("name", DIGESTS)
def test_what_is_made_of_the_rows(name: str) -> None:
    table = read_table(name)
    assert len(set(table.classes)) == len(set(table.dataset_ids)) == len(table.classes)
    assert digest(table) == DIGESTS[name][1]


def rename(rows: list[dict[str, Any]]) -> None:
    rows[3]["name"] += " "


def exchange(rows: list[dict[str, Any]]) -> None:
    rows[0]["name"], rows[1]["name"] = rows[1]["name"], rows[0]["name"]


def recolour(rows: list[dict[str, Any]]) -> None:
    rows[0]["color"][2] += 1


@pytest.mark.parametrize("change", [rename, exchange, recolour, list.pop])
def test_digests_see_every_change(change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = read_rows("cityscapes_19.json")
    before = rows_digest(rows)
    change(rows)
    assert rows_digest(rows) != before

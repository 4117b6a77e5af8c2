"""``datasets/README.md`` names every data set and every script, in three lines each, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from maskformer.data import dataset_names

ROOT = Path(__file__).parents[4]
TEXT = (ROOT / "datasets" / "README.md").read_text()


def expanded(name: str) -> list[str]:
    """Every name that ``a_{b,c}_d`` stands for."""
    match = re.search(r"\{(.*?)\}", name)
    if match is None:
        return [name]
    return [whole for part in match[1].split(",") for whole in expanded(name.replace(match[0], part, 1))]


def test_every_data_set_is_named() -> None:
    headings = re.findall(r"^\*\*.*\*\*.*: `(.*)`$", TEXT, re.MULTILINE)
    named = [name for heading in headings for name in expanded(heading)]
    assert sorted(named) == [name for name in dataset_names() if not name.startswith("shapes")]


def test_every_script_is_named() -> None:
    commands = set(re.findall(r"python (datasets/\S+?\.py)`", TEXT))
    assert commands == {f"datasets/{path.name}" for path in (ROOT / "datasets").glob("prepare_*.py")}


def test_three_lines_each() -> None:
    sections = re.split(r"^\*\*", TEXT, flags=re.MULTILINE)[1:]
    assert [len(re.findall(r"^\* ", section, re.MULTILINE)) for section in sections] == [3] * 8

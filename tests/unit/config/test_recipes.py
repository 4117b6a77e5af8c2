"""The shipped recipes say what was published, key by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskformer.config import find_config, get_cfg, shipped_configs
from maskformer.config.tree import flatten

PUBLISHED = json.loads((Path(__file__).parents[2] / "data" / "config" / "recipes.json").read_text())
# Every published recipe, shipped or not: the most frequent values, and what is different in each.
ALL = json.loads((Path(__file__).parents[2] / "data" / "config" / "all_recipes.json").read_text())
SHIPPED = sorted(
    f"configs/{path.relative_to(shipped_configs()).as_posix()}" for path in shipped_configs().rglob("*.yaml")
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    values = dict(flatten(get_cfg(name)))
    resolved = {key: list(values[key]) if isinstance(values[key], tuple) else values[key] for key in PUBLISHED[name]}
    assert resolved == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_beyond_the_published_values(name: str) -> None:
    values, defaults = dict(flatten(get_cfg(name))), dict(flatten(get_cfg()))
    changed = {key for key in values if values[key] != defaults[key]}
    assert changed <= set(PUBLISHED[name])


@pytest.mark.parametrize("name", ALL["recipes"])
def test_every_published_recipe_is_accepted(name: str) -> None:
    published = ALL["common"] | ALL["recipes"][name]
    values = dict(flatten(get_cfg(None, [word for setting in published.items() for word in setting])))
    resolved = {key: list(values[key]) if isinstance(values[key], tuple) else values[key] for key in published}
    assert resolved == published


def test_there_are_thirty_published_recipes() -> None:
    assert len(ALL["recipes"]) == 30
    assert set(PUBLISHED) <= set(ALL["recipes"])


@pytest.mark.parametrize("name", [name for name in SHIPPED if "/Base-" not in name])
def test_every_shipped_recipe_loads(name: str) -> None:
    get_cfg(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_tags_in_our_own_files(name: str) -> None:
    assert "!!" not in find_config(name).read_text()

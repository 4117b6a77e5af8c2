"""The shipped recipes say what was published, key by key; the ablations change what they name and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskformer.config import find_config, get_cfg, shipped_configs
from maskformer.config.tree import flatten

# The most frequent values of the published recipes, and what is different in each.
_TABLE = json.loads((Path(__file__).parents[2] / "data" / "config" / "all_recipes.json").read_text())
PUBLISHED = {name: _TABLE["common"] | own for name, own in _TABLE["recipes"].items()}
SHIPPED = sorted(
    f"configs/{path.relative_to(shipped_configs()).as_posix()}" for path in shipped_configs().rglob("*.yaml")
)
OUR_OWN = ("configs/quickstart/", "configs/camvid/", "configs/ablations/")
QUERIES = {"ade20k-150": "bs16_160k", "coco-stuff-10k-171": "bs32_60k", "ade20k-full-847": "bs16_200k"}


def values_of(name: str) -> dict[str, Any]:
    """Flat config, tuples as lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(get_cfg(name))}


def difference(name: str, other: str) -> dict[str, Any]:
    """What is set in the first recipe and not in the second."""
    values, base = values_of(name), values_of(other)
    return {key: value for key, value in values.items() if value != base[key]}


def test_there_are_thirty_published_recipes_at_their_paths() -> None:
    assert len(PUBLISHED) == 30
    assert set(PUBLISHED) == {name for name in SHIPPED if "/Base-" not in name and not name.startswith(OUR_OWN)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    values = values_of(name)
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_beyond_the_published_values(name: str) -> None:
    values, defaults = dict(flatten(get_cfg(name))), dict(flatten(get_cfg()))
    changed = {key for key in values if values[key] != defaults[key]}
    assert changed <= set(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_are_accepted_as_overrides(name: str) -> None:
    words = [word for setting in PUBLISHED[name].items() for word in setting]
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(get_cfg(None, words))}
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def in_published_style(values: dict[str, Any]) -> str:
    """YAML as the original project wrote it: tuples in Python's notation, training sizes as an expression."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[last] = str(tuple(value)) if isinstance(value, list) and isinstance(value[0], str) else value
    text = yaml.safe_dump(tree, default_flow_style=None, width=10000)
    for scale in (512, 640, 1024, 2048):
        for end in (16, 21):
            expression = f"[int(x * 0.1 * {scale}) for x in range(5, {end})]"
            listed = f"[{', '.join(str(int(x * 0.1 * scale)) for x in range(5, end))}]"
            text = text.replace(
                f"MIN_SIZE_TRAIN: {listed}", f'MIN_SIZE_TRAIN: !!python/object/apply:eval ["{expression}"]'
            )
    return text


@pytest.mark.parametrize("name", PUBLISHED)
def test_yaml_of_the_original_project_loads_unchanged(name: str, tmp_path: Path) -> None:
    text = in_published_style(PUBLISHED[name])
    assert ("apply:eval" in text) is ("coco-panoptic" not in name)
    own = tmp_path / "recipe.yaml"
    own.write_text(text)
    assert values_of(str(own)) == values_of(name)


@pytest.mark.parametrize("name", [name for name in SHIPPED if "/Base-" not in name])
def test_every_shipped_recipe_loads(name: str) -> None:
    get_cfg(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_sizes_are_listed_and_no_tags_used_in_our_own_files(name: str) -> None:
    assert "!!" not in find_config(name).read_text()


# ------------------------------------------------------------------ ablations
@pytest.mark.parametrize("count", [20, 50, 150, 300, 1000])
@pytest.mark.parametrize("folder", QUERIES)
def test_number_of_queries(folder: str, count: int) -> None:
    schedule = QUERIES[folder]
    name = f"configs/ablations/{folder}/maskformer_R50_{count}_queries_{schedule}.yaml"
    changed = difference(name, f"configs/{folder}/maskformer_R50_{schedule}.yaml")
    assert changed == {"MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": count}


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        (
            "ade20k-150/maskformer_R50_fixed_matching_bs16_160k",
            "ade20k-150/maskformer_R50_bs16_160k",
            {"MODEL.MASK_FORMER.MATCHER": "fixed", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 150},
        ),
        (
            "ade20k-150/maskformer_R50_no_deep_supervision_bs16_160k",
            "ade20k-150/maskformer_R50_bs16_160k",
            {"MODEL.MASK_FORMER.DEEP_SUPERVISION": False},
        ),
        (
            "coco-panoptic/maskformer_panoptic_detr_R50_bs64_554k",
            "coco-panoptic/maskformer_panoptic_R50_bs64_554k",
            {
                "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
                "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
                "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5",
                "MODEL.MASK_FORMER.ENC_LAYERS": 6,
            },
        ),
        (
            "cityscapes-19/per_pixel_baseline_R101_bs16_90k",
            "cityscapes-19/maskformer_R101_bs16_90k",
            {"MODEL.META_ARCHITECTURE": "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME": "PerPixelBaselineHead"},
        ),
        (
            "cityscapes-19/per_pixel_baseline_plus_R101_bs16_90k",
            "cityscapes-19/maskformer_R101_bs16_90k",
            {
                "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
                "MODEL.SEM_SEG_HEAD.NAME": "PerPixelBaselinePlusHead",
                "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 19,
            },
        ),
        (
            "mapillary-vistas-65/per_pixel_baseline_R50_bs16_300k",
            "mapillary-vistas-65/maskformer_R50_bs16_300k",
            {"MODEL.META_ARCHITECTURE": "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME": "PerPixelBaselineHead"},
        ),
        (
            "mapillary-vistas-65/per_pixel_baseline_plus_R50_bs16_300k",
            "mapillary-vistas-65/maskformer_R50_bs16_300k",
            {
                "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
                "MODEL.SEM_SEG_HEAD.NAME": "PerPixelBaselinePlusHead",
                "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 65,
            },
        ),
    ],
)
def test_an_ablation_changes_what_it_names(name: str, base: str, expected: dict[str, Any]) -> None:
    assert difference(f"configs/ablations/{name}.yaml", f"configs/{base}.yaml") == expected


def test_every_ablation_is_compared_with_its_recipe() -> None:
    assert sum(name.startswith("configs/ablations/") for name in SHIPPED) == 3 * 5 + 7

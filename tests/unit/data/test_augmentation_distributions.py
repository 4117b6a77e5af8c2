"""Distributions of sizes, crops and mirrors over 2,000 samples of the published recipes.

Each check turns draws into p-values of the published rule, and is proved by rules that are deliberately wrong: the
package's own draws must not be unlikely, those of the wrong rule must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from maskformer import get_cfg
from maskformer.data.catalog import get_metadata
from maskformer.data.recipes import MirrorCropResize, ResizeCropMirror, TrainingRecipe, build_recipe
from maskformer.data.transforms import Crop, CropRule, Geometry, Mirror, Resize, ResizeRule, Size
from tests.unit.data.draws import a_half, generators, independent, one_of, rejected, whole_numbers

SEMANTIC = (
    "configs/ade20k-150/maskformer_R50_bs16_160k.yaml",
    "configs/ade20k-full-847/maskformer_R50_bs16_200k.yaml",
    "configs/coco-stuff-10k-171/maskformer_R50_bs32_60k.yaml",
    "configs/cityscapes-19/maskformer_R101_bs16_90k.yaml",
    "configs/mapillary-vistas-65/maskformer_R50_bs16_300k.yaml",
)
PANOPTIC = "configs/ade20k-150-panoptic/maskformer_panoptic_R50_bs16_720k.yaml"
DETR = "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"
Plan = Callable[[np.random.Generator, Size, Any], Geometry]


def recipe(config: str) -> TrainingRecipe:
    cfg = get_cfg(config)
    made = build_recipe(cfg, get_metadata(cfg.DATASETS.TRAIN[0]), training=True)
    assert isinstance(made, TrainingRecipe)
    return made


def geometries(plan: Plan, size: Size) -> list[Geometry]:
    def classes(_: Geometry) -> np.ndarray:
        raise AssertionError("every published recipe takes any crop")

    return [plan(rng, size, classes) for rng in generators()]


# ------------------------------------------------------------------ geometry
def published_size(height: int, width: int, shorter: int, longest: int) -> Size:
    """Shorter side `shorter`, both rescaled if the longer exceeds `longest`, each ⌊x + ½⌋."""
    scale = shorter / min(height, width)
    if max(height, width) * scale > longest:
        scale = longest / max(height, width)
    return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)


def mirrored(geometry: Geometry) -> bool:
    """Whether the columns of the result run from right to left, whatever its steps say."""
    columns = geometry.source_indices()[1]
    return bool(columns[0] > columns[-1])


def check_resizes(steps: Sequence[Resize], sources: Sequence[Size], sizes: Sequence[int], longest: int) -> float:
    """p that each resize is one of the `sizes`, all of them equally often."""
    drawn = []
    for step, source in zip(steps, sources, strict=True):
        possible = {published_size(*source, size, longest): size for size in sizes}
        if tuple(step) not in possible:
            return 0.0
        drawn.append(possible[tuple(step)])
    # Sizes that the limit on the longer side makes equal cannot be told apart: such a source is not for this check.
    return one_of(drawn, sizes)


def check_mask_former(drawn: Sequence[Geometry], sizes: Sequence[int], longest: int, crop: Size) -> dict[str, float]:
    """p-values of the geometry of ``mask_former_semantic`` and ``mask_former_panoptic``."""
    resizes, crops = [g.steps[0] for g in drawn], [g.steps[1] for g in drawn]
    assert all(isinstance(step, Resize) for step in resizes)
    assert all(isinstance(step, Crop) for step in crops)
    flips = [mirrored(g) for g in drawn]
    pairs: list[Any] = list(zip(resizes, crops, strict=True))
    fits = all(c[2:] == (min(crop[0], r.height), min(crop[1], r.width)) for r, c in pairs)
    zeros = [0] * len(drawn)
    return {
        "size": check_resizes(resizes, [g.source for g in drawn], sizes, longest),
        "crop size": float(fits),
        "top": whole_numbers([c.top for c in crops], zeros, [r.height - c.height for r, c in pairs]),
        "left": whole_numbers([c.left for c in crops], zeros, [r.width - c.width for r, c in pairs]),
        "mirror": a_half(flips),
        "mirror and size": independent(flips, [r.height for r in resizes]),
    }


def check_offsets(rule: CropRule) -> dict[str, float]:
    """p that all places of a crop are equally likely, where there are only 5 × 7."""
    size = int(rule.size[0]), int(rule.size[1])
    crops = [rule.draw(rng, (size[0] + 4, size[1] + 6), lambda _: np.ones(1)) for rng in generators()]
    return {"place": one_of([(c.top, c.left) for c in crops], [(top, left) for top in range(5) for left in range(7)])}


@pytest.mark.parametrize("config", [*SEMANTIC, PANOPTIC])
def test_geometry_of_mask_former_recipes(config: str) -> None:
    settings, plan = get_cfg(config).INPUT, recipe(config).plan
    assert isinstance(plan, ResizeCropMirror)
    # As square as it needs to be for the limit on the longer side to do nothing.
    p = check_mask_former(
        geometries(plan, (900, 1000)), settings.MIN_SIZE_TRAIN, settings.MAX_SIZE_TRAIN, tuple(settings.CROP.SIZE)
    )
    assert rejected(p) == set()
    assert plan.crop is not None
    assert rejected(check_offsets(plan.crop)) == set()
    assert settings.SIZE_DIVISIBILITY in (-1, max(settings.CROP.SIZE))  # crops of Cityscapes are no squares
    assert recipe(config).canvas == settings.SIZE_DIVISIBILITY
    assert recipe(config).colors


def test_the_longer_side_is_limited() -> None:
    plan = recipe(SEMANTIC[0]).plan
    assert {max(g.steps[0][:2]) for g in geometries(plan, (100, 1000))} == {2048}  # 256 would already be 2560


class UniformSize(ResizeRule):
    """Wrong: any size between the smallest and the largest."""

    def draw(self, rng: np.random.Generator, size: Size) -> Resize:
        return Resize(*published_size(*size, round(rng.uniform(min(self.sizes), max(self.sizes))), self.longest))


class FirstSizesMoreOften(ResizeRule):
    """Wrong: the smaller half of the sizes in 3 of 5 samples."""

    def draw(self, rng: np.random.Generator, size: Size) -> Resize:
        half = len(self.sizes) // 2
        some = self.sizes[:half] if rng.random() < 0.6 else self.sizes[half:]
        return Resize(*published_size(*size, some[rng.integers(len(some))], self.longest))


class NeverLast(CropRule):
    """Wrong: the last place is left out (an exclusive bound)."""

    def draw(self, rng: np.random.Generator, size: Size, count_classes: Any) -> Crop:
        crop = super().draw(rng, size, count_classes)
        top = rng.integers(max(1, size[0] - crop.height))
        return crop._replace(top=int(top))


class Centred(CropRule):
    """Wrong: places around the middle."""

    def draw(self, rng: np.random.Generator, size: Size, count_classes: Any) -> Crop:
        crop = super().draw(rng, size, count_classes)
        return crop._replace(left=(size[1] - crop.width) // 2)


@dataclass(frozen=True)
class RareMirror(ResizeCropMirror):
    """Wrong: mirrors 4 of 10."""

    def __call__(self, rng: np.random.Generator, size: Size, count_classes: Any) -> Geometry:
        geometry = Geometry(size).then(self.resize.draw(rng, size))
        assert self.crop is not None
        geometry = geometry.then(self.crop.draw(rng, geometry.size, count_classes))
        return geometry.then(Mirror()) if rng.random() < 0.4 else geometry


@dataclass(frozen=True)
class MirrorOfSize(ResizeCropMirror):
    """Wrong: half of the samples are mirrored, but it is the larger half."""

    def __call__(self, rng: np.random.Generator, size: Size, count_classes: Any) -> Geometry:
        geometry = super().__call__(rng, size, count_classes)
        plain = Geometry(size, geometry.steps[:2])
        resize = plain.steps[0]
        assert isinstance(resize, Resize)
        return plain.then(Mirror()) if resize.height >= 665 else plain


def test_wrong_geometries_are_rejected() -> None:
    right = recipe(SEMANTIC[0]).plan
    assert isinstance(right, ResizeCropMirror)
    assert right.crop is not None
    resize = right.resize
    half = CropRule("absolute", (right.crop.size[0] // 2, right.crop.size[1]))
    wrong: dict[str, tuple[Plan, set[str]]] = {
        "uniform": (replace(right, resize=UniformSize(resize.sizes, resize.longest)), {"size"}),
        "uneven": (replace(right, resize=FirstSizesMoreOften(resize.sizes, resize.longest)), {"size"}),
        "one size less": (replace(right, resize=replace(resize, sizes=resize.sizes[:-1])), {"size"}),
        "smaller limit": (replace(right, resize=replace(resize, longest=1100)), {"size"}),
        "other crop": (replace(right, crop=half), {"crop size", "top"}),
        "centred": (replace(right, crop=Centred("absolute", right.crop.size)), {"left"}),
        "rare mirror": (RareMirror(resize, right.crop), {"mirror"}),
        "mirror of size": (MirrorOfSize(resize, right.crop), {"mirror and size"}),
    }
    for name, (plan, expected) in wrong.items():
        p = check_mask_former(geometries(plan, (900, 1000)), resize.sizes, resize.longest, (512, 512))
        assert rejected(p) & expected, (name, p)
    assert rejected(check_offsets(NeverLast("absolute", right.crop.size))) == {"place"}
    assert rejected(check_offsets(Centred("absolute", right.crop.size))) == {"place"}


# ------------------------------------------------------------------ detr_panoptic
def check_detr(drawn: Sequence[Geometry], sizes: Sequence[int], longest: int, crop: Size) -> dict[str, float]:
    """p-values of the geometry of ``detr_panoptic``."""
    flips = [mirrored(g) for g in drawn]
    plain = [[step for step in g.steps if not isinstance(step, Mirror)] for g in drawn]
    long = [steps for steps in plain if len(steps) == 3]
    assert all(len(steps) in (1, 3) for steps in plain)
    small: list[Any] = [steps[0] for steps in long]
    crops: list[Any] = [steps[1] for steps in long]
    last: list[Any] = [steps[-1] for steps in plain]
    before = [Geometry(g.source, tuple(steps[:-1])).size for g, steps in zip(drawn, plain, strict=True)]
    sides = [[(s.height, c.height, c.top), (s.width, c.width, c.left)] for s, c in zip(small, crops, strict=True)]
    names = {"height": 0, "width": 1}
    p = {
        "mirror": a_half(flips),
        "cropped": a_half([len(steps) == 3 for steps in plain]),
        "mirror and crop": independent(flips, [len(steps) for steps in plain]),
        "small size": check_resizes(small, [drawn[0].source] * len(small), (400, 500, 600), 10**9),
        "size": check_resizes(last, before, sizes, longest),
        "sizes": independent([s.height for s in small], [min(steps[2]) for steps in long]),
    }
    for name, axis in names.items():
        whole, part, offset = zip(*(side[axis] for side in sides), strict=True)
        p[f"crop {name}"] = whole_numbers(part, [min(w, crop[0]) for w in whole], [min(w, crop[1]) for w in whole])
        free = [w - s for w, s in zip(whole, part, strict=True)]
        p[f"offset of {name}"] = whole_numbers(offset, [0] * len(offset), free)
    return p


def check_crop_range(rule: CropRule) -> dict[str, float]:
    """p that all sizes of a crop are equally likely, where there are only 5 × 7."""
    low = int(rule.size[0])
    crops = [rule.draw(rng, (low + 4, low + 6), lambda _: np.ones(1)) for rng in generators()]
    every = [(low + h, low + w) for h in range(5) for w in range(7)]
    return {"crop size": one_of([(c.height, c.width) for c in crops], every)}


def test_geometry_of_detr_panoptic() -> None:
    settings, made = get_cfg(DETR).INPUT, recipe(DETR)
    plan = made.plan
    assert isinstance(plan, MirrorCropResize)
    # Crops of a square photograph are at most 600 by 384: the limit of 1333 touches none of the sizes.
    p = check_detr(
        geometries(plan, (700, 700)), settings.MIN_SIZE_TRAIN, settings.MAX_SIZE_TRAIN, tuple(settings.CROP.SIZE)
    )
    assert rejected(p) == set()
    assert plan.crop is not None
    assert rejected(check_crop_range(plan.crop)) == set()
    assert not made.colors
    assert made.canvas == -1


class ExclusiveRange(CropRule):
    """Wrong: the largest size is left out."""

    def draw(self, rng: np.random.Generator, size: Size, count_classes: Any) -> Crop:
        return super().draw(rng, (size[0] - 1, size[1] - 1), count_classes)


class SquareCrop(CropRule):
    """Wrong: both sides from one draw."""

    def draw(self, rng: np.random.Generator, size: Size, count_classes: Any) -> Crop:
        side = int(rng.integers(min(*size, self.size[0]), min(*size, self.size[1]) + 1))
        return Crop(0, int(rng.integers(size[1] - side + 1)), side, side)


@dataclass(frozen=True)
class CropsThreeOfFive(MirrorCropResize):
    """Wrong: crops 3 of 5."""

    def __call__(self, rng: np.random.Generator, size: Size, count_classes: Any) -> Geometry:
        crop = self.crop if rng.random() < 0.6 else None
        geometry = Geometry(size).then(Mirror()) if rng.random() < 0.5 else Geometry(size)
        if crop is not None:
            geometry = geometry.then(self.SMALL.draw(rng, size))
            geometry = geometry.then(crop.draw(rng, geometry.size, count_classes))
        return geometry.then(self.resize.draw(rng, geometry.size))


class OtherSmallSizes(MirrorCropResize):
    """Wrong: the first of the small sizes is another one."""

    SMALL = ResizeRule((384, 500, 600), longest=2**31)


def test_wrong_geometries_of_detr_are_rejected() -> None:
    right = recipe(DETR).plan
    assert isinstance(right, MirrorCropResize)
    assert right.crop is not None
    resize, crop = right.resize, right.crop
    wrong: dict[str, tuple[Plan, set[str]]] = {
        "crops 3 of 5": (CropsThreeOfFive(resize, crop), {"cropped"}),
        "small sizes": (OtherSmallSizes(resize, crop), {"small size"}),
        "no limit": (replace(right, resize=replace(resize, longest=700)), {"size"}),
        "another range": (replace(right, crop=replace(crop, size=(384, 500))), {"crop height", "crop width"}),
        "square": (replace(right, crop=SquareCrop(crop.kind, crop.size)), {"offset of height"}),
        "never crops": (replace(right, crop=None), {"cropped"}),
    }
    for name, (plan, expected) in wrong.items():
        p = check_detr_or_never(geometries(plan, (700, 700)), resize, (384, 600))
        assert rejected(p) & expected, (name, p)
    assert rejected(check_crop_range(ExclusiveRange(crop.kind, crop.size))) == {"crop size"}
    assert rejected(check_crop_range(SquareCrop(crop.kind, crop.size))) == {"crop size"}


def check_detr_or_never(drawn: Sequence[Geometry], resize: ResizeRule, crop: Size) -> dict[str, float]:
    """As `check_detr`, also where there is no crop to look at."""
    if all(len(g.steps) < 3 for g in drawn):
        return {"cropped": a_half([False] * len(drawn))}
    return check_detr(drawn, resize.sizes, resize.longest, crop)

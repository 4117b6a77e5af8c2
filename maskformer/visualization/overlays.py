"""Results drawn over their image: semantic, panoptic, instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from maskformer.visualization.canvas import (
    Color,
    LegendEntry,
    add_legend,
    check_picture,
    read_array,
)
from maskformer.visualization.painting import NOTHING, Region, edges_of, paint, percent, shade

OPACITY = 0.55
UNLABELLED = LegendEntry("unlabelled", ((85, 85, 85), (125, 125, 125)) * 2)


class ClassTable(Protocol):
    """What drawing needs to know of a data set; its metadata fits."""

    @property
    def classes(self) -> Sequence[str]:
        """K names."""

    @property
    def things(self) -> Sequence[bool]:
        """K flags, true for countable classes."""

    @property
    def colors(self) -> Sequence[Color]:
        """K colours."""

    @property
    def ignore_label(self) -> int:
        """Value of unlabelled pixels."""


class Overlay(NamedTuple):
    """A drawn picture and what its colours mean.

    Attributes:
        picture: (H', W', 3) uint8 RGB; small images are enlarged.
        legend: for `add_legend`.
    """

    picture: np.ndarray
    legend: list[LegendEntry]


# ------------------------------------------------------------------ what a caller draws
def draw_semantic(image: Any, label_map: Any, metadata: ClassTable, *, opacity: float = OPACITY) -> np.ndarray:
    """Classes over their image, with names, contours and a legend of each class's share of the picture.

    Args:
        image: (H, W, 3) uint8 RGB.
        label_map: (H, W) integers, a class or the ignore label.
        metadata: names and colours.
        opacity: of the colours, in [0, 1].

    Returns:
        (H', W', 3) uint8 RGB, larger than the image if that is small.
    """
    return add_legend(*semantic_overlay(image, label_map, metadata, opacity=opacity))


def draw_panoptic(
    image: Any, ids: Any, segments: Sequence[Mapping[str, Any]], metadata: ClassTable, *, opacity: float = OPACITY
) -> np.ndarray:
    """Segments over their image: every object in a shade of its class's colour, with name and score; a legend.

    Args:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) integers; 0 and ids that are not listed are unlabelled.
        segments: dicts with ``id``, ``category_id`` and optionally ``score``.
        metadata: names, things and colours.
        opacity: of the colours, in [0, 1].

    Returns:
        (H', W', 3) uint8 RGB, larger than the image if that is small.
    """
    return add_legend(*panoptic_overlay(image, ids, segments, metadata, opacity=opacity))


def draw_instances(
    image: Any,
    instances: Mapping[str, Any],
    metadata: ClassTable,
    *,
    min_score: float = 0.5,
    opacity: float = OPACITY,
) -> np.ndarray:
    """Objects over their image, the surest on top, with name and score; a legend.

    Args:
        image: (H, W, 3) uint8 RGB.
        instances: ``masks`` (N, H, W) bool, ``labels`` (N,), ``scores`` (N,) in [0, 1].
        metadata: names, things and colours.
        min_score: objects below it are left out.
        opacity: of the colours, in [0, 1].

    Returns:
        (H', W', 3) uint8 RGB, larger than the image if that is small.
    """
    return add_legend(*instance_overlay(image, instances, metadata, min_score=min_score, opacity=opacity))


# ------------------------------------------------------------------ overlays without legend
def semantic_overlay(image: Any, label_map: Any, metadata: ClassTable, *, opacity: float = OPACITY) -> Overlay:
    """As `draw_semantic`, with the legend apart."""
    labels = read_array(label_map).astype(np.int64)
    present = [int(label) for label in np.unique(labels) if 0 <= label < len(metadata.classes)]
    index = np.full(labels.shape, NOTHING, dtype=np.int32)
    regions = []
    for position, label in enumerate(present):
        index[labels == label] = position
        regions.append(Region(metadata.classes[label], _color(metadata, label)))
    picture = paint(check_picture(image), index, regions, opacity, marked_nothing=True)
    legend = []
    for position in np.argsort(-np.bincount(index[index >= 0], minlength=len(regions)), kind="stable"):
        region, share = regions[position], float((index == position).mean())
        legend.append(LegendEntry(region.name, (region.color,), percent(share)))
    return Overlay(picture, legend + ([UNLABELLED] if (index == NOTHING).any() else []))


def panoptic_overlay(
    image: Any, ids: Any, segments: Sequence[Mapping[str, Any]], metadata: ClassTable, *, opacity: float = OPACITY
) -> Overlay:
    """As `draw_panoptic`, with the legend apart."""
    array = read_array(ids).astype(np.int64)
    regions = _object_regions(segments, metadata)
    values, inverse = np.unique(array, return_inverse=True)
    position = {int(segment["id"]): i for i, segment in enumerate(segments) if int(segment["id"]) != 0}
    index = np.array([position.get(int(value), NOTHING) for value in values], dtype=np.int32)[
        inverse.reshape(array.shape)
    ]
    picture = paint(check_picture(image), index, regions, opacity, marked_nothing=True)
    return Overlay(picture, _grouped_legend(regions) + ([UNLABELLED] if (index == NOTHING).any() else []))


def instance_overlay(
    image: Any,
    instances: Mapping[str, Any],
    metadata: ClassTable,
    *,
    min_score: float = 0.5,
    opacity: float = OPACITY,
) -> Overlay:
    """As `draw_instances`, with the legend apart."""
    picture = check_picture(image)
    scores = read_array(instances["scores"]).astype(np.float64)
    order = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] >= min_score]
    masks, labels = read_array(instances["masks"]), read_array(instances["labels"])
    regions = _object_regions([{"category_id": int(labels[i]), "score": float(scores[i])} for i in order], metadata)
    index = np.full(picture.shape[:2], NOTHING, dtype=np.int32)
    contours = np.zeros(picture.shape[:2], dtype=bool)
    for position in reversed(range(len(order))):
        mask = masks[order[position]].astype(bool)
        index[mask] = position
        contours |= edges_of(mask.astype(np.int32))
    return Overlay(paint(picture, index, regions, opacity, hidden_contours=contours), _grouped_legend(regions))


# ------------------------------------------------------------------ regions and colours
def _object_regions(segments: Sequence[Mapping[str, Any]], metadata: ClassTable) -> list[Region]:
    """Regions of segments; the objects of a class get different shades."""
    regions: list[Region] = []
    seen: dict[int, int] = {}
    for segment in segments:
        label = int(segment["category_id"])
        isthing = bool(metadata.things[label])
        number = seen.get(label, 0)
        seen[label] = number + 1
        color = shade(_color(metadata, label), number if isthing else 0)
        score = float(segment["score"]) if isthing and segment.get("score") is not None else None
        note = " (crowd)" if segment.get("iscrowd") else ""
        regions.append(Region(metadata.classes[label], color, isthing, score, note))
    return regions


def _color(metadata: ClassTable, label: int) -> Color:
    red, green, blue = metadata.colors[label]
    return int(red), int(green), int(blue)


def _grouped_legend(regions: Sequence[Region]) -> list[LegendEntry]:
    """One entry per class, things first: how many objects, and their scores."""
    groups: dict[str, list[Region]] = {}
    for region in sorted(regions, key=lambda region: not region.isthing):
        groups.setdefault(region.name, []).append(region)
    entries = []
    for name, members in groups.items():
        notes = [f"x{len(members)}"] if members[0].isthing and len(members) > 1 else []
        scores = sorted(member.score for member in members if member.score is not None)
        if scores:
            low, high = percent(scores[0]), percent(scores[-1])
            notes.append(high if low == high else f"{low} to {high}")
        colors = tuple(dict.fromkeys(member.color for member in members))
        entries.append(LegendEntry(name, colors, "  ".join(notes)))
    return entries

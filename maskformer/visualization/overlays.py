"""Results drawn over their image: semantic, panoptic, instances."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from maskformer.visualization.canvas import (
    Color,
    Label,
    LegendEntry,
    add_legend,
    check_picture,
    enlarge,
    enlargement,
    read_array,
    text_height,
    text_width,
    write_labels,
)

OPACITY = 0.55
NOTHING = -1
UNLABELLED = LegendEntry("unlabelled", ((85, 85, 85), (125, 125, 125)) * 2)
PLACING_SIDE = 512
"""Where a name fits is searched for on a map of at most this size."""


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


class _Region(NamedTuple):
    """One coloured region: name of its class, colour, whether it is an object, and what to add to the name."""

    name: str
    color: Color
    isthing: bool = False
    score: float | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """What is written on it."""
        score = "" if self.score is None else f" {_percent(self.score)}"
        return self.name + score + self.note


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
        regions.append(_Region(metadata.classes[label], _color(metadata, label)))
    picture = _paint(check_picture(image), index, regions, opacity, marked_nothing=True)
    legend = []
    for position in np.argsort(-np.bincount(index[index >= 0], minlength=len(regions)), kind="stable"):
        region, share = regions[position], float((index == position).mean())
        legend.append(LegendEntry(region.name, (region.color,), _percent(share)))
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
    picture = _paint(check_picture(image), index, regions, opacity, marked_nothing=True)
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
        contours |= _edges(mask.astype(np.int32))
    return Overlay(_paint(picture, index, regions, opacity, hidden_contours=contours), _grouped_legend(regions))


# ------------------------------------------------------------------ regions and colours
def _object_regions(segments: Sequence[Mapping[str, Any]], metadata: ClassTable) -> list[_Region]:
    """Regions of segments; the objects of a class get different shades."""
    regions: list[_Region] = []
    seen: dict[int, int] = {}
    for segment in segments:
        label = int(segment["category_id"])
        isthing = bool(metadata.things[label])
        number = seen.get(label, 0)
        seen[label] = number + 1
        color = shade(_color(metadata, label), number if isthing else 0)
        score = float(segment["score"]) if isthing and segment.get("score") is not None else None
        note = " (crowd)" if segment.get("iscrowd") else ""
        regions.append(_Region(metadata.classes[label], color, isthing, score, note))
    return regions


def _color(metadata: ClassTable, label: int) -> Color:
    red, green, blue = metadata.colors[label]
    return int(red), int(green), int(blue)


def shade(color: Color, number: int) -> Color:
    """The `number`-th variation of a colour: hue and brightness moved, so that neighbours of one class differ."""
    if number == 0:
        return color
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    hue = (hue + (0.055, -0.055, 0.1, -0.1, 0.028, -0.028)[(number - 1) % 6]) % 1.0
    lightness = min(0.8, max(0.25, lightness + (0.16, -0.14, 0.05, 0.22)[(number - 1) % 4]))
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, max(0.35, saturation))
    return round(255 * red), round(255 * green), round(255 * blue)


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"


def _grouped_legend(regions: Sequence[_Region]) -> list[LegendEntry]:
    """One entry per class, things first: how many objects, and their scores."""
    groups: dict[str, list[_Region]] = {}
    for region in sorted(regions, key=lambda region: not region.isthing):
        groups.setdefault(region.name, []).append(region)
    entries = []
    for name, members in groups.items():
        notes = [f"x{len(members)}"] if members[0].isthing and len(members) > 1 else []
        scores = sorted(member.score for member in members if member.score is not None)
        if scores:
            low, high = _percent(scores[0]), _percent(scores[-1])
            notes.append(high if low == high else f"{low} to {high}")
        colors = tuple(dict.fromkeys(member.color for member in members))
        entries.append(LegendEntry(name, colors, "  ".join(notes)))
    return entries


# ------------------------------------------------------------------ painting
def _paint(
    image: np.ndarray,
    index: np.ndarray,
    regions: Sequence[_Region],
    opacity: float,
    *,
    marked_nothing: bool = False,
    hidden_contours: np.ndarray | None = None,
) -> np.ndarray:
    """Colours, contours and names over an image that is enlarged if it is small.

    Args:
        image: (H, W, 3) uint8.
        index: (H, W) int32 positions in `regions`, `NOTHING` elsewhere.
        regions: what is drawn.
        opacity: of the colours.
        marked_nothing: grey out pixels without region.
        hidden_contours: (H, W) bool, further contours.
    """
    if index.shape != image.shape[:2]:
        raise ValueError(f"the image is {image.shape[:2]} but what is drawn on it {index.shape} (height, width)")
    factor = enlargement(*image.shape[:2])
    picture, large = enlarge(image, factor), enlarge(index, factor)
    height, width = large.shape
    table = np.array([region.color for region in regions] or [(0, 0, 0)], dtype=np.uint8)
    colors = table[np.maximum(large, 0)]
    # Half grey, so that colours show what they mean and not what the image is painted with.
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    base = cv2.addWeighted(picture, 0.5, cv2.merge([gray, gray, gray]), 0.5, 0)
    blended = cv2.addWeighted(base, 1 - opacity, colors, opacity, 0)
    outside = large == NOTHING
    if marked_nothing:
        blended[outside] = _striped(gray, text_height(height, width))[outside][:, None]
    else:
        blended[outside] = picture[outside]
    edges = _edges(large)
    if hidden_contours is not None:
        edges |= _edges(enlarge(hidden_contours.astype(np.int32), factor))
    _draw_contours(blended, edges, text_height(height, width))
    return write_labels(blended, _labels(large, regions), text_height(height, width))


def _striped(gray: np.ndarray, period: int) -> np.ndarray:
    """(H, W) uint8 grey image, darkened, with faint diagonal stripes: a grey that no class has."""
    rows, columns = np.ogrid[: gray.shape[0], : gray.shape[1]]
    return gray // 2 + np.where((rows + columns) // period % 2 == 0, 24, 40).astype(np.uint8)


def _edges(index: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose right or lower neighbour is of another region."""
    edges = np.zeros(index.shape, dtype=bool)
    edges[:, :-1] |= index[:, :-1] != index[:, 1:]
    edges[:-1] |= index[:-1] != index[1:]
    return edges


def _draw_contours(picture: np.ndarray, edges: np.ndarray, size: int) -> None:
    """Light lines, their width following the font size, smoothed against steps; in place."""
    width = max(1, size // 9)
    lines = cv2.dilate(edges.astype(np.uint8) * 255, np.ones((width, width), np.uint8))
    strength = cv2.GaussianBlur(lines, (3, 3), 0)
    touched = strength > 0
    alpha = strength[touched].astype(np.float32)[:, None] / 255 * 0.8
    picture[touched] = (picture[touched] * (1 - alpha) + 255 * alpha).astype(np.uint8)


def _labels(index: np.ndarray, regions: Sequence[_Region]) -> list[Label]:
    """Names at the point of each region farthest from its border: objects first, then large regions, no tiny ones."""
    height, width = index.shape
    step = max(1, -(-max(height, width) // PLACING_SIDE))
    small = np.ascontiguousarray(index[::step, ::step])
    size = text_height(height, width)
    found: list[tuple[bool, float, Label]] = []
    for position, region in enumerate(regions):
        mask = np.pad((small == position).astype(np.uint8), 1)
        if not mask.any():
            continue
        distance = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
        _, radius, _, (x, y) = cv2.minMaxLoc(distance)
        radius *= step
        # An object may be named beyond its border; the name of stuff must lie on it.
        enough = 0.7 * size if region.isthing else max(1.2 * size, 0.3 * text_width(region.text, size))
        if radius >= enough:
            center = ((x - 0.5) * step, (y - 0.5) * step)
            found.append((region.isthing, radius, Label(region.text, center, region.color)))
    found.sort(key=lambda item: (not item[0], -item[1]))
    return [label for _, _, label in found]

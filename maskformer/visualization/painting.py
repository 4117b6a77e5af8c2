"""Regions in colour over an image: shades, contours, names."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from maskformer.visualization.canvas import (
    Color,
    Label,
    enlarge,
    enlargement,
    text_height,
    text_width,
    write_labels,
)

NOTHING = -1
"""Index of pixels that belong to no region."""

PLACING_SIDE = 512
"""Where a name fits is searched for on a map of at most this size."""


class Region(NamedTuple):
    """One coloured region: name of its class, colour, whether it is an object, and what to add to the name."""

    name: str
    color: Color
    isthing: bool = False
    score: float | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """What is written on it."""
        score = "" if self.score is None else f" {percent(self.score)}"
        return self.name + score + self.note


def percent(share: float) -> str:
    """A share in [0, 1] in words."""
    return "<1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"


def shade(color: Color, number: int) -> Color:
    """The `number`-th variation of a colour: hue and brightness moved, so that neighbours of one class differ."""
    if number == 0:
        return color
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    hue = (hue + (0.055, -0.055, 0.1, -0.1, 0.028, -0.028)[(number - 1) % 6]) % 1.0
    lightness = min(0.8, max(0.25, lightness + (0.16, -0.14, 0.05, 0.22)[(number - 1) % 4]))
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, max(0.35, saturation))
    return round(255 * red), round(255 * green), round(255 * blue)


def paint(
    image: np.ndarray,
    index: np.ndarray,
    regions: Sequence[Region],
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
    edges = edges_of(large)
    if hidden_contours is not None:
        edges |= edges_of(enlarge(hidden_contours.astype(np.int32), factor))
    _draw_contours(blended, edges, text_height(height, width))
    return write_labels(blended, _labels(large, regions), text_height(height, width))


def _striped(gray: np.ndarray, period: int) -> np.ndarray:
    """(H, W) uint8 grey image, darkened, with faint diagonal stripes: a grey that no class has."""
    rows, columns = np.ogrid[: gray.shape[0], : gray.shape[1]]
    return gray // 2 + np.where((rows + columns) // period % 2 == 0, 24, 40).astype(np.uint8)


def edges_of(index: np.ndarray) -> np.ndarray:
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


def _labels(index: np.ndarray, regions: Sequence[Region]) -> list[Label]:
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

"""Paper and pen: sizes, text, legends, and pictures beside one another. All pictures are (H, W, 3) uint8 RGB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

SMALLEST_SIDE = 640
"""Pictures whose longer side is shorter are enlarged by a whole number, so that text can be read."""

PAPER: Color = (255, 255, 255)
INK: Color = (30, 30, 30)
MAX_SWATCHES = 6


class LegendEntry(NamedTuple):
    """One line of a legend.

    Attributes:
        name: what the colours mean.
        colors: one or more, shown as stripes of one swatch.
        note: written after the name, such as a share or a score.
    """

    name: str
    colors: tuple[Color, ...]
    note: str = ""

    @property
    def text(self) -> str:
        """The whole line."""
        return f"{self.name}  {self.note}" if self.note else self.name


def read_array(value: Any) -> np.ndarray:
    """An array, whether it came as one or as a tensor on any device."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def check_picture(image: Any) -> np.ndarray:
    """The picture as an array.

    Raises:
        ValueError: if it is not (H, W, 3) uint8.
    """
    array = read_array(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise ValueError(f"a picture must be (H, W, 3) uint8 RGB, not {array.shape} {array.dtype}")
    return array


def enlargement(height: int, width: int) -> int:
    """By which whole number a picture of this size is enlarged before anything is drawn on it."""
    return max(1, math.ceil(SMALLEST_SIDE / max(height, width)))


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """A picture (H, W, 3) smoothly, or a map (H, W) by repetition, `factor` times as large."""
    if factor == 1:
        return picture.copy()
    if picture.ndim == 2:
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    return cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)


def text_height(height: int, width: int) -> int:
    """Font size in pixels that suits a picture of this size."""
    return max(13, round(math.sqrt(height * width) / 52))


@lru_cache(maxsize=16)
def font(size: int) -> Any:
    """Pillow's own font, which is the same on every machine."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Width in pixels of a line."""
    return math.ceil(font(size).getlength(text))


def readable_on(color: Color) -> Color:
    """Black or white, whichever stands out more from `color`."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


class Label(NamedTuple):
    """A word on a picture.

    Attributes:
        text: one line.
        center: (x, y) in pixels.
        color: of the box behind it.
    """

    text: str
    center: tuple[float, float]
    color: Color


def write_labels(picture: np.ndarray, labels: Sequence[Label], size: int) -> np.ndarray:
    """Labels in rounded boxes, moved inside the picture; one that would cover an earlier one is left out.

    Args:
        picture: (H, W, 3) uint8.
        labels: the most important first.
        size: font size in pixels.
    """
    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    margin = max(2, size // 4)
    taken: list[tuple[float, float, float, float]] = []
    for label in labels:
        box_width, box_height = text_width(label.text, size) + 2 * margin, size + margin
        left = min(max(0.0, label.center[0] - box_width / 2), max(0, width - box_width))
        top = min(max(0.0, label.center[1] - box_height / 2), max(0, height - box_height))
        box = (left, top, left + box_width, top + box_height)
        if any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            continue
        taken.append(box)
        draw.rounded_rectangle(box, radius=margin, fill=label.color)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, label.text, font=font(size), fill=readable_on(label.color), anchor="mm")
    return np.array(image)


def add_legend(picture: np.ndarray, entries: Sequence[LegendEntry]) -> np.ndarray:
    """The picture with a legend beneath, in as many columns as fit.

    Args:
        picture: (H, W, 3) uint8.
        entries: none leaves the picture as it is.

    Returns:
        (H + legend, W, 3) uint8.
    """
    if not entries:
        return picture
    width = picture.shape[1]
    size = text_height(*_panel_size(picture))
    swatch, gap = round(1.5 * size), size // 2
    cell = max(text_width(entry.text, size) for entry in entries) + swatch + 3 * gap
    columns = max(1, min(len(entries), (width - gap) // cell))
    rows = math.ceil(len(entries) / columns)
    row_height = round(1.6 * size)
    image = Image.new("RGB", (width, rows * row_height + 2 * gap), PAPER)
    draw = ImageDraw.Draw(image)
    cell = (width - gap) // columns
    for i, entry in enumerate(entries):
        left, top = gap + (i // rows) * cell, gap + (i % rows) * row_height
        _draw_swatch(draw, (left, top + (row_height - size) // 2, swatch, size), entry.colors[:MAX_SWATCHES])
        text = shortened(entry.text, cell - swatch - 2 * gap, size)
        draw.text((left + swatch + gap, top + row_height / 2), text, font=font(size), fill=INK, anchor="lm")
    return np.concatenate([picture, np.array(image)], axis=0)


def _panel_size(picture: np.ndarray) -> tuple[int, int]:
    """Size that text follows: of a row of pictures that of one of them."""
    height, width = picture.shape[:2]
    return height, min(width, 4 * height // 3)


def _draw_swatch(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colors: Sequence[Color]) -> None:
    left, top, width, height = box
    for i, color in enumerate(colors):
        start, end = left + width * i // len(colors), left + width * (i + 1) // len(colors)
        draw.rectangle((start, top, end - 1, top + height - 1), fill=color)
    draw.rectangle((left, top, left + width - 1, top + height - 1), outline=INK)


def shortened(text: str, width: int, size: int) -> str:
    """The text, its end replaced by an ellipsis if it is wider than `width` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "...", size) > width:
        text = text[:-1]
    return text + "..."


def add_title(picture: np.ndarray, title: str, size: int | None = None) -> np.ndarray:
    """The picture (H, W, 3) with a line of text above it, font size `size` or one that suits it."""
    height, width = picture.shape[:2]
    size = size or text_height(height, width)
    bar = Image.new("RGB", (width, round(1.8 * size)), PAPER)
    text = shortened(title, width - size, size)
    ImageDraw.Draw(bar).text((width / 2, 0.9 * size), text, font=font(size), fill=INK, anchor="mm")
    return np.concatenate([np.array(bar), picture], axis=0)


def side_by_side(images: Sequence[np.ndarray], titles: Sequence[str] | None = None) -> np.ndarray:
    """Pictures in a row, each with its title above.

    Args:
        images: (H, W, 3) uint8 each, of any sizes; small ones are enlarged by a whole number, lower ones filled up
            with white.
        titles: one per image; None for none.

    Returns:
        (H', W', 3) uint8.
    """
    if not images:
        raise ValueError("there must be at least one picture")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"{len(images)} pictures need as many titles, not {len(titles)}")
    pictures = [check_picture(image) for image in images]
    tallest = max(picture.shape[0] * enlargement(*picture.shape[:2]) for picture in pictures)
    pictures = [enlarge(picture, max(1, tallest // picture.shape[0])) for picture in pictures]
    size = max(text_height(*picture.shape[:2]) for picture in pictures)
    if titles is not None:
        pictures = [add_title(picture, title, size) for picture, title in zip(pictures, titles, strict=True)]
    height = max(picture.shape[0] for picture in pictures)
    gap = np.full((height, max(4, size // 2), 3), PAPER, dtype=np.uint8)
    parts: list[np.ndarray] = []
    for picture in pictures:
        filling = np.full((height - picture.shape[0], picture.shape[1], 3), PAPER, dtype=np.uint8)
        parts += [np.concatenate([picture, filling], axis=0), gap]
    return np.concatenate(parts[:-1], axis=1)

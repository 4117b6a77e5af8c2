"""Augmentation in two halves: where pixels come from (`Geometry`), and what colour they have (`distort_colors`).

A geometry is planned first, as a list of steps on sizes alone, and then applied to image and segments alike.
Every random choice comes from the `numpy.random.Generator` that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from maskformer.errors import UserError

Size = tuple[int, int]
"""Height, width."""


# ------------------------------------------------------------------ geometry
class Resize(NamedTuple):
    """To `height` × `width`."""

    height: int
    width: int


class Crop(NamedTuple):
    """The box whose upper left corner is (top, left)."""

    top: int
    left: int
    height: int
    width: int


class Mirror(NamedTuple):
    """Left and right swapped."""


Step = Resize | Crop | Mirror


@dataclass(frozen=True)
class Geometry:
    """Where each pixel of the result comes from: steps applied to an image of size `source`.

    Attributes:
        source: (H, W) the steps start from.
        steps: applied in order.
    """

    source: Size
    steps: tuple[Step, ...] = ()

    @property
    def size(self) -> Size:
        """(H, W) of the result."""
        for step in reversed(self.steps):
            if not isinstance(step, Mirror):
                return step.height, step.width
        return self.source

    def then(self, *steps: Step) -> Geometry:
        """This geometry followed by more steps."""
        return Geometry(self.source, (*self.steps, *steps))

    def apply_to_image(self, image: np.ndarray) -> np.ndarray:
        """Resizes by PIL's bilinear filter on 8 bits (antialiased when shrinking, rounded after each axis).

        Args:
            image: (H, W, 3) uint8 of size `source`.

        Returns:
            (H', W', 3) uint8 of size `size`.
        """
        for step in self.steps:
            if isinstance(step, Resize):
                if image.shape[:2] != (step.height, step.width):
                    resized = Image.fromarray(image).resize((step.width, step.height), Image.Resampling.BILINEAR)
                    image = np.asarray(resized)
            elif isinstance(step, Crop):
                image = image[step.top : step.top + step.height, step.left : step.left + step.width]
            else:
                image = image[:, ::-1]
        return np.ascontiguousarray(image)

    def source_indices(self) -> tuple[np.ndarray, np.ndarray]:
        """For each row (H',) and column (W',) of the result the int64 source row and column, by nearest.

        Resizing takes source index ⌊(i + ½)·in/out⌋. All steps act on rows and columns apart, so that however many
        steps there are, ids are gathered once.
        """
        rows, columns = np.arange(self.source[0]), np.arange(self.source[1])
        for step in self.steps:
            if isinstance(step, Resize):
                rows = rows[nearest_indices(len(rows), step.height)]
                columns = columns[nearest_indices(len(columns), step.width)]
            elif isinstance(step, Crop):
                rows = rows[step.top : step.top + step.height]
                columns = columns[step.left : step.left + step.width]
            else:
                columns = columns[::-1]
        return rows, columns

    def apply_to_ids(self, ids: np.ndarray) -> np.ndarray:
        """Resamples (…, H, W) ids of size `source` by nearest to (…, H', W')."""
        rows, columns = self.source_indices()
        return ids[..., rows[:, None], columns]


def nearest_indices(source: int, target: int) -> np.ndarray:
    """(target,) int64: ⌊(i + ½)·source/target⌋, computed in whole numbers."""
    return (2 * np.arange(target) + 1) * source // (2 * target)


def shortest_edge_size(height: int, width: int, shorter: int, longest: int) -> Size:
    """The size whose shorter side is `shorter`, both scaled down if the longer exceeds `longest`; each ⌊x + ½⌋.

    `shorter` 0 leaves the size as it is.
    """
    if shorter == 0:
        return height, width
    scale = shorter / min(height, width)
    new_height, new_width = (float(shorter), scale * width) if height < width else (scale * height, float(shorter))
    if max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


@dataclass(frozen=True)
class ResizeRule:
    """Shorter side drawn from `sizes`, longer side at most `longest`.

    Attributes:
        sizes: candidates (``choice``), or lowest and highest (``range``, inclusive).
        longest: limit on the longer side.
        sampling: ``choice`` or ``range``.
    """

    sizes: tuple[int, ...]
    longest: int
    sampling: str = "choice"

    def draw(self, rng: np.random.Generator, size: Size) -> Resize:
        """A random resize of an image of (H, W)."""
        if self.sampling == "range":
            shorter = int(rng.integers(self.sizes[0], self.sizes[1] + 1))
        else:
            shorter = self.sizes[int(rng.integers(len(self.sizes)))]
        return Resize(*shortest_edge_size(*size, shorter, self.longest))


@dataclass(frozen=True)
class CropRule:
    """A random box, redrawn while one class fills too much of it.

    Attributes:
        kind: ``absolute``: min(size, side); ``absolute_range``: each side uniform in [min(side, a), min(side, b)];
            ``relative``: ⌊side·f + ½⌋; ``relative_range``: f uniform in [f, 1].
        size: pixels or fractions: (height, width), for ``absolute_range`` (a, b).
        largest_class: redraw up to 10 times until two classes are there and the largest has less than this part of
            the supervised pixels; at 1.0 and above any box will do.
    """

    kind: str
    size: tuple[float, float]
    largest_class: float = 1.0

    TRIES = 10

    def draw(self, rng: np.random.Generator, size: Size, count_classes: Callable[[Crop], np.ndarray]) -> Crop:
        """A random box in an image of (H, W).

        Args:
            rng: source of chance.
            size: height and width of what is cropped.
            count_classes: box → pixels of each class in it (zeros allowed); called only if `largest_class` < 1.
        """
        if self.largest_class >= 1.0:
            return self._draw_once(rng, size)
        for _ in range(self.TRIES):
            crop = self._draw_once(rng, size)
            counts = count_classes(crop)
            if (counts > 0).sum() > 1 and counts.max() < counts.sum() * self.largest_class:
                break
        return crop

    def _draw_once(self, rng: np.random.Generator, size: Size) -> Crop:
        height, width = self._draw_size(rng, size)
        top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
        return Crop(int(top), int(left), height, width)

    def _draw_size(self, rng: np.random.Generator, size: Size) -> Size:
        height, width = size
        if self.kind == "absolute":
            return min(int(self.size[0]), height), min(int(self.size[1]), width)
        if self.kind == "absolute_range":
            low, high = int(self.size[0]), int(self.size[1])
            sides = [int(rng.integers(min(side, low), min(side, high) + 1)) for side in size]
            return sides[0], sides[1]
        fractions = np.array(self.size, float)
        if self.kind == "relative_range":
            fractions = fractions + rng.random(2) * (1 - fractions)
        return max(1, int(height * fractions[0] + 0.5)), max(1, int(width * fractions[1] + 0.5))


CROP_KINDS = ("absolute", "absolute_range", "relative", "relative_range")


# ------------------------------------------------------------------ colour
def _table(factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """(256,) uint8: v·factor + offset in float32, clipped and truncated."""
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(values, 0, 255).astype(np.uint8)


_IDENTITY = np.arange(256, dtype=np.uint8)


def _in_hsv(image: np.ndarray, tables: Sequence[np.ndarray], image_format: str) -> np.ndarray:
    """Applies three tables to OpenCV's 8-bit hue (0..179), saturation and value."""
    there, back = (
        (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB) if image_format == "RGB" else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
    )
    hsv = cv2.LUT(cv2.cvtColor(image, there), np.stack(tables, axis=-1)[None])
    return cv2.cvtColor(hsv, back)


def scale_saturation(image: np.ndarray, factor: float, image_format: str) -> np.ndarray:
    """Saturation × `factor` of an (H, W, 3) uint8 image."""
    return _in_hsv(image, (_IDENTITY, _table(factor), _IDENTITY), image_format)


def turn_hue(image: np.ndarray, steps: int, image_format: str) -> np.ndarray:
    """Hue turned by `steps` of 2°, modulo 180, of an (H, W, 3) uint8 image."""
    hue = ((np.arange(256) + steps) % 180).astype(np.uint8)
    return _in_hsv(image, (hue, _IDENTITY, _IDENTITY), image_format)


def distort_colors(image: np.ndarray, rng: np.random.Generator, image_format: str) -> np.ndarray:
    """The colour distortion of SSD: each step with probability ½, each clips and truncates to 8 bits.

    Brightness + U(-32, 32); contrast × U(0.5, 1.5), either before or after saturation × U(0.5, 1.5) and hue + an
    integer of [-18, 18].

    Args:
        image: (H, W, 3) uint8.
        rng: source of chance.
        image_format: ``RGB`` or ``BGR``.

    Returns:
        (H, W, 3) uint8.
    """

    def contrast(pixels: np.ndarray) -> np.ndarray:
        return cv2.LUT(pixels, _table(factor=rng.uniform(0.5, 1.5))) if rng.random() < 0.5 else pixels

    if rng.random() < 0.5:
        image = cv2.LUT(image, _table(offset=rng.uniform(-32, 32)))
    contrast_first = rng.random() < 0.5
    if contrast_first:
        image = contrast(image)
    if rng.random() < 0.5:
        image = scale_saturation(image, rng.uniform(0.5, 1.5), image_format)
    if rng.random() < 0.5:
        image = turn_hue(image, int(rng.integers(-18, 19)), image_format)
    return image if contrast_first else contrast(image)


# ------------------------------------------------------------------ canvas
CANVAS_GREY = 128


def pad_to_canvas(image: np.ndarray, planes: np.ndarray, canvas: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads right and bottom to canvas × canvas: image with grey 128, planes with `fill`.

    Args:
        image: (H, W, 3) uint8.
        planes: (P, H, W) ids.
        canvas: side of the square; 0 or below pads nothing.
        fill: id of unsupervised pixels.

    Raises:
        UserError: if the image is larger than the canvas.
    """
    height, width = image.shape[:2]
    if canvas <= 0 or (height, width) == (canvas, canvas):
        return image, planes
    if height > canvas or width > canvas:
        raise UserError(
            f"INPUT.SIZE_DIVISIBILITY {canvas} is smaller than an augmented image ({width}x{height}): "
            "enlarge it, set it to -1, or enable INPUT.CROP with a size that fits"
        )
    padded = np.full((canvas, canvas, 3), CANVAS_GREY, np.uint8)
    padded[:height, :width] = image
    ids = np.full((planes.shape[0], canvas, canvas), fill, planes.dtype)
    ids[:, :height, :width] = planes
    return padded, ids

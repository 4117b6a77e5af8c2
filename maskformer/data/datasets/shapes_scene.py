"""Drawing the scenes of the `shapes` data set (what they show: `maskformer.data.datasets.shapes`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np

SIZE = 128
STUFF = ("grass", "water")
THINGS = ("disc", "bar", "star")

_SPLIT_SEEDS = {"train": 1, "val": 2}
_SUBPIXEL = 4  # bits after the point in the coordinates given to OpenCV
_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


class Scene(NamedTuple):
    """One drawn scene; H = W = `SIZE`.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        ids: (H, W) int32 panoptic ids, every pixel belongs to a segment.
        segments: ``id, category_id, isthing, iscrowd, area`` (visible pixels) and ``bbox`` (x, y, w, h) of each
            segment; stuff first, then things from back to front.
    """

    image: np.ndarray
    ids: np.ndarray
    segments: list[dict[str, Any]]


class _Thing(NamedTuple):
    kind: int
    x: float
    y: float
    radius: float
    color: np.ndarray
    mask: np.ndarray
    area: int


# ------------------------------------------------------------------ drawing
def _stripes(rng: np.random.Generator) -> np.ndarray:
    """(H, W) in [-1, 1]: straight stripes, 5 to 9 pixels apart, in any direction."""
    angle, period, phase = rng.uniform(0, math.pi), rng.uniform(5, 9), rng.uniform(0, 2 * math.pi)
    along = _COLUMNS * np.float32(math.cos(angle)) + _ROWS * np.float32(math.sin(angle))
    return np.sin(along * np.float32(2 * math.pi / period) + np.float32(phase))


def _blobs(rng: np.random.Generator) -> np.ndarray:
    """(H, W) in [-1, 1]: round blobs of about the width of the stripes."""
    cells = int(rng.integers(22, 40))
    noise = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.clip(cv2.resize(noise, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) * np.float32(1.3), -1, 1)


def _color(rng: np.random.Generator, others: Sequence[np.ndarray] = ()) -> np.ndarray:
    """(3,) float32 in 35..220, as far from `others` as a few tries find (every object's outline can be seen)."""
    best, best_distance = np.zeros(3, np.float32), -1.0
    for _ in range(6):
        color = rng.uniform(35, 220, 3).astype(np.float32)
        distance = min((float(np.linalg.norm(color - other)) for other in others), default=1e9)
        if distance > best_distance:
            best, best_distance = color, distance
        if best_distance > 80:
            break
    return best


def _paint(texture: np.ndarray, color: np.ndarray, swing: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32: `color`, moved along `swing` by the texture."""
    return color + texture[..., None] * swing


def _swing(rng: np.random.Generator, strength: float) -> np.ndarray:
    """(3,) float32 colour change of a texture: mostly brightness, a little hue."""
    return (strength * (0.8 + rng.uniform(-0.4, 0.4, 3)) * rng.choice((-1.0, 1.0))).astype(np.float32)


def _ground(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Both kinds of stuff: (H, W, 3) float32 colours and (H, W) uint8 class (index into `STUFF`)."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = (_COLUMNS - SIZE / 2) / SIZE, (_ROWS - SIZE / 2) / SIZE
    across = x * math.cos(angle) + y * math.sin(angle)
    along = y * math.cos(angle) - x * math.sin(angle)
    curve = np.full_like(across, rng.uniform(-0.2, 0.2))
    for _ in range(2):
        curve += rng.uniform(0.03, 0.12) * np.sin(rng.uniform(3, 12) * along + rng.uniform(0, 2 * math.pi))
    kinds = (across > curve).astype(np.uint8)
    colors = [_color(rng), _color(rng)]
    swings = [_swing(rng, rng.uniform(25, 45)), _swing(rng, rng.uniform(25, 45))]
    if rng.random() < 0.5:
        colors[1], swings[1] = colors[0], swings[0]
    grass, water = _paint(_stripes(rng), colors[0], swings[0]), _paint(_blobs(rng), colors[1], swings[1])
    return np.where(kinds[..., None] == 0, grass, water), kinds


def _outline(rng: np.random.Generator, kind: int, x: float, y: float, radius: float) -> np.ndarray:
    """(H, W) bool mask of one thing, cut at the border of the scene."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    scale = 1 << _SUBPIXEL
    if kind == 0:
        cv2.circle(mask, (round(x * scale), round(y * scale)), round(radius * scale), 1, -1, shift=_SUBPIXEL)
        return mask.astype(bool)
    turn = rng.uniform(0, 2 * math.pi)
    if kind == 1:
        half = math.atan(rng.uniform(0.3, 0.45))
        angles, reach = np.array([half, math.pi - half, math.pi + half, -half]), np.full(4, 1.45 * radius)
    else:
        angles, reach = np.arange(10) * math.pi / 5, np.tile([1.4 * radius, rng.uniform(0.55, 0.7) * radius], 5)
    points = np.stack([x + reach * np.cos(angles + turn), y + reach * np.sin(angles + turn)], axis=1)
    cv2.fillPoly(mask, [np.round(points * scale).astype(np.int32)], 1, shift=_SUBPIXEL)
    return mask.astype(bool)


def _propose(rng: np.random.Generator, things: Sequence[_Thing]) -> tuple[int, float, float, float]:
    """Class, centre and radius of a new thing: usually beside, and of the class of, one that is there."""
    radius = rng.uniform(14, 24) * SIZE / 128
    if things and rng.random() < 0.8:
        beside = things[int(rng.integers(len(things)))]
        kind = beside.kind if rng.random() < 0.9 else int(rng.integers(len(THINGS)))
        angle, distance = rng.uniform(0, 2 * math.pi), (beside.radius + radius) * rng.uniform(0.65, 0.95)
        return kind, beside.x + distance * math.cos(angle), beside.y + distance * math.sin(angle), radius
    x, y = rng.uniform(0.08, 0.92, 2) * SIZE
    return int(rng.integers(len(THINGS))), float(x), float(y), radius


def _fits(mask: np.ndarray, radius: float, things: Sequence[_Thing], owner: np.ndarray) -> bool:
    """Whether most of the new thing lies inside the scene and every thing below it stays half visible."""
    if mask.sum() < 1.3 * radius * radius:
        return False
    visible = np.bincount(owner[~mask], minlength=len(things) + 1)[1:]
    return all(left >= 0.6 * thing.area for left, thing in zip(visible, things, strict=True))


def _place(rng: np.random.Generator, grounds: Sequence[np.ndarray]) -> tuple[list[_Thing], np.ndarray]:
    """3 to 6 things from back to front, and (H, W) int64 owner of each pixel (0 = stuff, i + 1 = thing i)."""
    wanted = int(rng.integers(3, 7))
    things: list[_Thing] = []
    owner = np.zeros((SIZE, SIZE), np.int64)
    tries = 0
    while len(things) < 3 or (len(things) < wanted and tries < 6 * wanted):
        tries += 1
        kind, x, y, radius = _propose(rng, things)
        mask = _outline(rng, kind, x, y, radius)
        if not (0 <= x < SIZE and 0 <= y < SIZE and _fits(mask, radius, things, owner)):
            continue
        things.append(_Thing(kind, x, y, radius, _color(rng, [*grounds, *(t.color for t in things)]), mask, mask.sum()))
        owner[mask] = len(things)
    return things, owner


def _fill(rng: np.random.Generator, image: np.ndarray, thing: _Thing) -> None:
    """Paints one thing, flat, shaded or textured, with a darker rim, into (H, W, 3) float32 `image`."""
    style = rng.random()
    if style < 0.5:
        paint = np.broadcast_to(thing.color, image.shape)
    elif style < 0.85:
        angle = rng.uniform(0, 2 * math.pi)
        ramp = ((_COLUMNS - thing.x) * math.cos(angle) + (_ROWS - thing.y) * math.sin(angle)) / thing.radius
        paint = _paint(ramp.astype(np.float32), thing.color, _swing(rng, 30))
    else:
        paint = _paint((_stripes, _blobs)[int(rng.integers(2))](rng), thing.color, _swing(rng, 15))
    np.copyto(image, paint, where=thing.mask[..., None])
    inside = cv2.erode(thing.mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    image[thing.mask & ~inside] *= np.float32(0.65)


def _segments(ids: np.ndarray, categories: dict[int, int]) -> list[dict[str, Any]]:
    """The segments of (H, W) `ids` that can be seen, in the order of `categories` (id → class)."""
    segments = []
    for segment_id, category in categories.items():
        mask = ids == segment_id
        area = int(mask.sum())
        if area:
            left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
            segments.append(
                {
                    "id": segment_id,
                    "category_id": category,
                    "isthing": category >= len(STUFF),
                    "iscrowd": 0,
                    "area": area,
                    "bbox": [int(left), int(top), int(width), int(height)],
                }
            )
    return segments


@lru_cache(maxsize=2)
def draw_scene(split: str, index: int) -> Scene:
    """Draws scene `index` of `split`; the last scenes are kept, so image and labels are drawn once.

    The arrays are read-only, because they are shared.
    """
    rng = np.random.default_rng((_SPLIT_SEEDS[split], index))
    image, kinds = _ground(rng)
    things, owner = _place(rng, [image[kinds == k].mean(axis=0) for k in range(2) if (kinds == k).any()])
    for thing in things:
        _fill(rng, image, thing)
    image = cv2.GaussianBlur(image, (3, 3), 0.6)
    light = 1 + rng.uniform(-0.15, 0.15) * (_COLUMNS / SIZE - 0.5) + rng.uniform(-0.15, 0.15) * (_ROWS / SIZE - 0.5)
    image = image * light[..., None] + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(5)
    pixels = np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)
    ids = np.where(owner == 0, kinds + 1, owner + len(STUFF)).astype(np.int32)
    categories = {1: 0, 2: 1} | {len(STUFF) + 1 + i: len(STUFF) + thing.kind for i, thing in enumerate(things)}
    pixels.setflags(write=False)
    ids.setflags(write=False)
    return Scene(pixels, ids, _segments(ids, categories))

"""The distribution of colours over 2,000 samples: SSD's distortion, read from pixels that tell what was done to them.

As in `test_augmentation_distributions`, each check is proved by rules that are deliberately wrong.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from scipy import stats

from maskformer.data.transforms import distort_colors
from tests.unit.data.draws import DRAWS, a_half, generators, independent, rejected

GREYS = np.arange(40, 137, dtype=np.uint8)
HUES = slice(len(GREYS), len(GREYS) + 180)
LOW, HIGH = 88, 136
CLIPPED = ((240, 120, 120), (60, 100, 240), (250, 200, 40), (120, 240, 160))
Distortion = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def probe() -> np.ndarray:
    """One row of pixels that tell what was done to them: greys, every hue, and colours that contrast clips.

    Greys and hues stay inside 0..255 for every brightness, contrast and saturation there is.
    """
    hues = [colorsys.hsv_to_rgb(h / 180, 1 - LOW / HIGH, HIGH) for h in range(180)]
    rows = [np.repeat(GREYS[:, None], 3, 1), np.round(hues), CLIPPED]
    return np.concatenate(rows).astype(np.uint8)[None]


class Estimates(NamedTuple):
    """What was done to the colours of each of N samples, read from their probes.

    Attributes:
        contrast: (N,) factors.
        brightness: (N,) what was added.
        saturation: (N,) factors.
        hue: (N,) steps of 2°.
        first: whether contrast came before the others, of those samples where the two orders can be told apart.
    """

    contrast: np.ndarray
    brightness: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    first: np.ndarray


def estimate(probes: Sequence[np.ndarray]) -> Estimates:
    pixels = np.concatenate(probes).astype(float)
    greys, hues, clipped = pixels[:, : len(GREYS), 0], pixels[:, HUES], pixels[:, HUES.stop :]
    contrast, intercept = np.polyfit(GREYS.astype(float), greys.T, 1)
    contrast[np.abs(contrast - 1) < 1e-6] = 1
    # Truncation costs half a step on average: in the contrast, and in the brightness itself.
    brightness = (intercept + 0.5 * (contrast != 1)) / contrast
    brightness[np.abs(brightness) < 0.01] = 0
    saturation = (1 - hues.min(2) / hues.max(2)).mean(1) * (HIGH + brightness) / (HIGH - LOW)
    brightness[brightness != 0] += 0.5
    plane = np.array([2, -1 - math.sqrt(3) * 1j, -1 + math.sqrt(3) * 1j]).conj()  # whose angle is the hue
    turn = np.angle(((hues @ plane) * (probe()[0, HUES] @ plane).conj()).mean(1))
    hue = np.round(turn / (2 * math.pi) * 180).astype(int)
    guesses = [predict(contrast, brightness, saturation, hue, first) for first in (True, False)]
    errors = [np.abs(guess - clipped).max((1, 2)) for guess in guesses]
    told = (np.maximum(*errors) > 12) & (np.minimum(*errors) < np.maximum(*errors) / 3)
    return Estimates(contrast, brightness, saturation, hue, (errors[0] < errors[1])[told])


def predict(
    contrast: np.ndarray, brightness: np.ndarray, saturation: np.ndarray, hue: np.ndarray, first: bool
) -> np.ndarray:
    """What becomes of the pixels that clip: (N, P, 3)."""
    pixels = np.clip(np.array(CLIPPED, float) + brightness[:, None, None], 0, 255)
    if first:
        pixels = np.clip(pixels * contrast[:, None, None], 0, 255)
    for sample, factor, steps in zip(pixels, saturation, hue, strict=True):
        for i, (r, g, b) in enumerate(sample):
            h, s, v = colorsys.rgb_to_hsv(r, g, b)
            sample[i] = colorsys.hsv_to_rgb((h + steps / 180) % 1, min(1.0, s * factor), v)
    return pixels if first else np.clip(pixels * contrast[:, None, None], 0, 255)


def in_bins(values: np.ndarray, low: float, high: float, off: float) -> float:
    """p that a value is `off` with probability ½, else uniform in [low, high]: by chi-square over eight bins."""
    edges = np.linspace(low, high, 9)
    step = edges[1] - edges[0]
    counts = np.histogram(np.clip(values, low, high), edges)[0]
    outside = np.mean((values < low - step / 8) | (values > high + step / 8))
    if outside > 0.005:
        return 0.0
    # `off` may lie on an edge, where it falls to either side: its two bins count as one.
    near = [i for i in range(8) if edges[i] - 0.1 * step <= off <= edges[i + 1] + 0.1 * step]
    expected = np.full(8, len(values) / 16)
    expected[near[0]] += len(values) / 2
    join = np.add.reduceat
    starts = [i for i in range(8) if i not in near[1:]]
    return float(stats.chisquare(join(counts, starts), join(expected, starts)).pvalue)


def check_colors(distort: Distortion) -> dict[str, float]:
    """p-values of SSD's colour distortion."""
    image = probe()
    found = estimate([distort(image.copy(), rng) for rng in generators()])
    counts = np.bincount(np.clip(found.hue + 19, 0, 38), minlength=39)
    share = np.full(37, DRAWS / 74)
    share[18] += DRAWS / 2
    return {
        "brightness": in_bins(found.brightness, -32, 32, 0),
        "contrast": in_bins(found.contrast, 0.5, 1.5, 1),
        "saturation": in_bins(found.saturation, 0.5, 1.5, 1),
        "hue": 0.0 if counts[0] + counts[38] else float(stats.chisquare(counts[1:38], share).pvalue),
        "ends of hue": float(stats.binomtest(int((np.abs(found.hue) == 18).sum()), DRAWS, 1 / 37).pvalue),
        "order": a_half(found.first.tolist()) if len(found.first) > 150 else 0.0,
        "brightness and hue": independent(list(found.brightness != 0), list(found.hue != 0)),
        "contrast and saturation": independent(list(found.contrast != 1), list(np.abs(found.saturation - 1) > 0.05)),
    }


def plain_distortion(
    *,
    brightness: float = 32,
    contrast: tuple[float, float] = (0.5, 1.5),
    saturation: tuple[float, float] = (0.5, 1.5),
    hue: int = 18,
    probability: float = 0.5,
    first: float = 0.5,
) -> Distortion:
    """The rule written down once more, with everything about it that could be wrong."""

    def clip(values: np.ndarray) -> np.ndarray:
        return np.clip(values, 0, 255).astype(np.uint8)

    def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < 0.5:
            image = clip(image + np.float32(rng.uniform(-brightness, brightness)))
        contrast_first, scale = rng.random() < first, rng.uniform(*contrast) if rng.random() < probability else 1.0
        if contrast_first:
            image = clip(image * np.float32(scale))
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if rng.random() < probability:
            hsv[..., 1] = clip(hsv[..., 1] * np.float32(rng.uniform(*saturation)))
        if rng.random() < 0.5:
            hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-hue, hue + 1)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        return image if contrast_first else clip(image * np.float32(scale))

    return distort


def test_colours() -> None:
    assert rejected(check_colors(lambda image, rng: distort_colors(image, rng, "RGB"))) == set()


def test_the_probe_reads_what_was_done() -> None:
    def only(**options: Any) -> Estimates:
        script: Any = _Script(options)
        return estimate([distort_colors(probe(), script, "RGB")])

    nothing = only()
    assert (nothing.contrast[0], nothing.brightness[0], nothing.hue[0], len(nothing.first)) == (1, 0, 0, 0)
    assert nothing.saturation[0] == pytest.approx(1, abs=0.01)
    assert only(brightness=-20.0).brightness[0] == pytest.approx(-20, abs=0.6)
    assert only(contrast=1.3).contrast[0] == pytest.approx(1.3, abs=0.01)
    assert only(saturation=0.6, brightness=10.0).saturation[0] == pytest.approx(0.6, abs=0.02)
    for turn in range(-18, 19):  # where little colour is left
        assert only(hue=turn, contrast=0.5, brightness=-32.0, saturation=0.5).hue[0] == turn
    assert only(contrast=1.5, saturation=0.5, first=True).first.tolist() == [True]
    assert only(contrast=1.5, saturation=0.5, first=False).first.tolist() == [False]


class _Script:
    """A generator whose coins and numbers are given; steps that are not named do not happen."""

    def __init__(self, options: dict[str, Any]) -> None:
        order = ["contrast", "saturation", "hue"] if options.get("first") else ["saturation", "hue", "contrast"]
        steps = ["brightness", "first", *order]
        self.coins = [0.0 if options.get(step, False) is not False else 1.0 for step in steps]
        self.numbers = [options[step] for step in steps if step in options and step != "first"]

    def random(self) -> float:
        return self.coins.pop(0)

    def uniform(self, low: float, high: float) -> float:
        return float(self.numbers.pop(0))

    def integers(self, low: int, high: int) -> int:
        return int(self.numbers.pop(0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"hue": 17}, ["ends of hue"]),
        ({"hue": 19}, ["hue"]),
        ({"first": 1.0}, ["order"]),
        ({"first": 0.0}, ["order"]),
        ({"first": 0.3}, ["order"]),
        ({"brightness": 24}, ["brightness"]),
        ({"contrast": (0.6, 1.4)}, ["contrast"]),
        ({"saturation": (0.5, 1.4)}, ["saturation"]),
        ({"probability": 0.4}, ["contrast", "saturation"]),
    ],
    ids=str,
)
def test_wrong_colours_are_rejected(options: dict[str, Any], expected: list[str]) -> None:
    found = rejected(check_colors(plain_distortion(**options)))
    assert found >= set(expected)
    assert bool(found) == bool(expected)

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from maskformer.data import transforms
from maskformer.data.transforms import (
    Crop,
    CropRule,
    Geometry,
    Mirror,
    Resize,
    ResizeRule,
    distort_colors,
    nearest_indices,
    pad_to_canvas,
    scale_saturation,
    shortest_edge_size,
    turn_hue,
)
from maskformer.errors import UserError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def any_counts(crop: Crop) -> np.ndarray:
    raise AssertionError("classes must not be counted")


# ------------------------------------------------------------------ sizes
@pytest.mark.parametrize(
    ("size", "shorter", "longest", "expected"),
    [
        ((480, 640), 512, 2048, (512, 683)),  # 682.67
        ((640, 480), 512, 2048, (683, 512)),
        ((500, 375), 512, 2048, (683, 512)),
        ((100, 101), 50, 1000, (50, 51)),  # 50.5 rounds up
        ((100, 300), 100, 200, (67, 200)),  # 66.67
        ((300, 100), 100, 150, (150, 50)),
        ((100, 100), 30, 20, (20, 20)),
        ((1, 1000), 8, 100, (1, 100)),  # 0.1 would be 0
        ((37, 53), 0, 10, (37, 53)),
    ],
)
def test_shortest_edge_size(size: tuple[int, int], shorter: int, longest: int, expected: tuple[int, int]) -> None:
    assert shortest_edge_size(*size, shorter, longest) == expected


def test_resize_choice_is_uniform() -> None:
    sizes, generator, draws = tuple(range(100, 116)), rng(), 16_000
    rule = ResizeRule(sizes, 1000)
    counts = np.bincount([rule.draw(generator, (50, 70)).height for _ in range(draws)], minlength=116)[100:]
    assert counts.sum() == draws
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_resize_range_includes_both_ends() -> None:
    generator, draws = rng(), 12_000
    rule = ResizeRule((10, 21), 1000, "range")
    counts = np.bincount([rule.draw(generator, (5, 7)).height for _ in range(draws)])
    assert counts[:10].sum() == 0
    assert len(counts) == 22
    assert abs(counts[10:] - 1000).max() < 5 * np.sqrt(1000)


# ------------------------------------------------------------------ geometry
def test_nearest_indices_by_hand() -> None:
    assert nearest_indices(4, 2).tolist() == [1, 3]
    assert nearest_indices(5, 3).tolist() == [0, 2, 4]
    assert nearest_indices(2, 5).tolist() == [0, 0, 1, 1, 1]  # (2 + 1/2) * 2/5 = 1 exactly
    assert nearest_indices(3, 3).tolist() == [0, 1, 2]


def test_ids_by_steps_and_at_once_agree() -> None:
    ids = rng().integers(-1, 50, (2, 37, 53)).astype(np.int16)
    geometry = Geometry((37, 53)).then(Mirror(), Resize(61, 40), Crop(3, 5, 50, 30), Mirror(), Resize(20, 44))
    expected = ids[:, :, ::-1]
    expected = expected[:, nearest_indices(37, 61)][:, :, nearest_indices(53, 40)]
    expected = expected[:, 3:53, 5:35][:, :, ::-1]
    expected = expected[:, nearest_indices(50, 20)][:, :, nearest_indices(30, 44)]
    assert geometry.size == (20, 44)
    assert np.array_equal(geometry.apply_to_ids(ids), expected)
    assert np.array_equal(geometry.apply_to_ids(ids[0]), expected[0])


def test_image_is_resized_by_pil_bilinear() -> None:
    image = rng().integers(0, 256, (40, 60, 3), dtype=np.uint8)
    geometry = Geometry((40, 60)).then(Resize(20, 33), Crop(2, 3, 10, 20), Mirror())
    resized = np.asarray(Image.fromarray(image).resize((33, 20), Image.Resampling.BILINEAR))
    assert np.array_equal(geometry.apply_to_image(image), resized[2:12, 3:23][:, ::-1])
    # Antialiased when shrinking: the mean of each 2 x 2 block has weight 9/16, its surroundings the rest.
    assert not np.array_equal(resized, cv2.resize(image, (33, 20), interpolation=cv2.INTER_LINEAR))


def test_image_shrunk_by_hand() -> None:
    # Filter support 2 at scale 2: weights 3/8, 3/8, 1/8 after renormalising at the border -> 1, 3, 3 of 7.
    row = np.array([[0, 70, 140, 210]], np.uint8).repeat(1, 0)[..., None].repeat(3, 2)
    shrunk = Geometry((1, 4)).then(Resize(1, 2)).apply_to_image(row)
    assert shrunk[0, :, 0].tolist() == [round((3 * 0 + 3 * 70 + 140) / 7), round((70 + 3 * 140 + 3 * 210) / 7)]


def test_image_and_ids_move_together() -> None:
    ids = np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20))).astype(np.int16)[None]
    image = (ids[0] * 20)[..., None].repeat(3, 2).astype(np.uint8)
    geometry = Geometry((60, 80)).then(Resize(90, 120), Crop(17, 9, 60, 77), Mirror())
    moved, moved_ids = geometry.apply_to_image(image)[..., 0], geometry.apply_to_ids(ids)[0]
    same = moved == moved_ids * 20
    assert same.mean() > 0.85  # all but blurred borders
    assert np.abs(moved.astype(int) - moved_ids * 20)[same.shape[0] // 2].max() <= 20


# ------------------------------------------------------------------ crops
def test_crop_absolute() -> None:
    generator = rng()
    rule = CropRule("absolute", (4, 30))
    crops = [rule.draw(generator, (6, 20), any_counts) for _ in range(3000)]
    assert {(c.height, c.width) for c in crops} == {(4, 20)}
    tops = np.bincount([c.top for c in crops])
    assert len(tops) == 3
    assert abs(tops - 1000).max() < 5 * np.sqrt(1000)
    assert {c.left for c in crops} == {0}


def test_crop_absolute_range_draws_each_side() -> None:
    generator, draws = rng(), 11_700
    rule = CropRule("absolute_range", (384, 600))
    crops = [rule.draw(generator, (500, 700), any_counts) for _ in range(draws)]
    heights, widths = np.array([c.height for c in crops]), np.array([c.width for c in crops])
    for sides, low, high in ((heights, 384, 500), (widths, 384, 600)):
        counts = np.bincount(sides)[low:]
        assert sides.min() == low
        assert sides.max() == high
        mean = draws / (high - low + 1)
        assert abs(counts - mean).max() < 5 * np.sqrt(mean)
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.05
    small = rule.draw(generator, (300, 390), any_counts)
    assert small.height == 300
    assert 384 <= small.width <= 390


def test_crop_relative() -> None:
    crop = CropRule("relative", (0.5, 0.25)).draw(rng(), (5, 10), any_counts)
    assert (crop.height, crop.width) == (3, 3)  # 2.5 and 2.5 round up


def test_crop_relative_range() -> None:
    generator = rng()
    rule = CropRule("relative_range", (0.6, 0.9))
    crops = [rule.draw(generator, (1000, 1000), any_counts) for _ in range(4000)]
    heights, widths = np.array([c.height for c in crops]), np.array([c.width for c in crops])
    assert (heights.min(), heights.max()) == (pytest.approx(600, abs=2), pytest.approx(1000, abs=2))
    assert (widths.min(), widths.max()) == (pytest.approx(900, abs=2), pytest.approx(1000, abs=2))
    assert heights.mean() == pytest.approx(800, abs=10)
    assert widths.mean() == pytest.approx(950, abs=3)
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.07
    assert all(0 <= c.top <= 1000 - c.height and 0 <= c.left <= 1000 - c.width for c in crops)


@pytest.mark.parametrize(
    ("counts", "tries"),
    [
        ([10, 0], 10),  # one class: never enough
        ([75, 25], 10),  # exactly the limit is too much
        ([74, 26], 1),
        ([0, 0], 10),
        ([50, 0, 50], 1),
    ],
)
def test_crop_tries(counts: list[int], tries: int) -> None:
    seen: list[Crop] = []

    def count(crop: Crop) -> np.ndarray:
        seen.append(crop)
        return np.array(counts)

    found = CropRule("absolute", (5, 5), 0.75).draw(rng(), (50, 50), count)
    assert len(seen) == tries
    assert found == seen[-1]
    assert len(set(seen)) == tries


# ------------------------------------------------------------------ colour
class ScriptedRng:
    """Gives the answers it was told to and notes what it was asked."""

    def __init__(self, coins: list[bool], uniform: list[float], integers: list[int]) -> None:
        self.coins, self.answers, self.whole = list(coins), list(uniform), list(integers)
        self.asked: list[tuple[Any, ...]] = []

    def random(self) -> float:
        return 0.49 if self.coins.pop(0) else 0.5

    def uniform(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return self.answers.pop(0)

    def integers(self, low: int, high: int) -> int:
        self.asked.append((low, high))
        return self.whole.pop(0)


def convert(pixels: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    return np.clip(pixels.astype(np.float32) * np.float32(factor) + np.float32(offset), 0, 255).astype(np.uint8)


def slow_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = convert(hsv[..., 1], factor)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def slow_hue(image: np.ndarray, steps: int) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + steps) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


NOISE = rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("contrast_first", [True, False])
def test_colours_follow_the_rule_in_order(contrast_first: bool) -> None:
    brightness, contrast, saturation, hue = 21.7, 1.31, 0.67, -18
    coins = [True, contrast_first, True, True, True]
    uniform = [brightness, contrast, saturation] if contrast_first else [brightness, saturation, contrast]
    script = ScriptedRng(coins, uniform, [hue])
    found = distort_colors(NOISE, script, "RGB")  # type: ignore[arg-type]
    expected = convert(NOISE, offset=brightness)
    if contrast_first:
        expected = slow_hue(slow_saturation(convert(expected, contrast), saturation), hue)
    else:
        expected = convert(slow_hue(slow_saturation(expected, saturation), hue), contrast)
    assert np.array_equal(found, expected)
    half = (0.5, 1.5)
    assert script.asked == [(-32, 32), half, half, (-18, 19)] if contrast_first else [(-32, 32), half, (-18, 19), half]


def test_colours_by_hand() -> None:
    assert transforms._table(offset=31.9)[[0, 100, 250]].tolist() == [31, 131, 255]
    assert transforms._table(offset=-32)[[0, 32, 33]].tolist() == [0, 0, 1]
    assert transforms._table(factor=0.5)[[1, 3, 255]].tolist() == [0, 1, 127]
    red = np.array([[[200, 0, 0]]], np.uint8)
    assert turn_hue(red, 60, "RGB").tolist() == [[[0, 200, 0]]]
    assert turn_hue(red, -60, "RGB").tolist() == [[[0, 0, 200]]]
    assert turn_hue(red[..., ::-1], 60, "BGR").tolist() == [[[0, 200, 0]]]
    assert scale_saturation(red, 0.5, "RGB").tolist() == [[[200, 100, 100]]]  # saturation 255 -> 127


def test_bgr_is_rgb_reversed() -> None:
    for seed in range(20):
        rgb = distort_colors(NOISE, rng(seed), "RGB")
        bgr = distort_colors(np.ascontiguousarray(NOISE[..., ::-1]), rng(seed), "BGR")
        assert np.array_equal(rgb, bgr[..., ::-1])


def test_each_colour_step_has_probability_one_half() -> None:
    # Grey has no saturation, so only brightness and contrast change it; a red that is never clipped shows hue.
    grey, generator, draws = np.full((1, 1, 3), 100, np.uint8), rng(5), 8000
    values = np.array([distort_colors(grey, generator, "RGB")[0, 0, 0] for _ in range(draws)], int)
    assert (values == 100).mean() == pytest.approx(0.25 + 0.25 / 64 + 0.25 / 100 + 0.25 / 100, abs=0.025)
    assert values.min() < 45  # both, downward: at least (100 - 32) / 2
    assert values.max() > 180
    hues = []
    for _ in range(draws):
        changed = distort_colors(np.array([[[110, 50, 50]]], np.uint8), generator, "RGB")
        hues.append(int(cv2.cvtColor(changed, cv2.COLOR_RGB2HSV)[0, 0, 0]))
    turned = (np.array(hues) + 90) % 180 - 90
    assert (np.abs(turned) <= 1).mean() == pytest.approx(0.5 + 0.5 * 3 / 37, abs=0.04)
    assert turned.min() == pytest.approx(-18, abs=2)  # rounding of dark colours
    assert turned.max() == pytest.approx(18, abs=2)


# ------------------------------------------------------------------ canvas
def test_canvas() -> None:
    image, ids = np.full((2, 3, 3), 7, np.uint8), np.full((2, 2, 3), 5, np.int16)
    padded, padded_ids = pad_to_canvas(image, ids, 4, -1)
    assert padded.shape == (4, 4, 3)
    assert padded_ids.shape == (2, 4, 4)
    assert padded_ids.dtype == np.int16
    assert (padded[:2, :3] == 7).all()
    assert padded.sum() == 6 * 3 * 7 + 10 * 3 * 128
    assert (padded_ids[:, :2, :3] == 5).all()
    assert padded_ids.sum() == 2 * (6 * 5 - 10)
    for none in (0, -1):
        assert pad_to_canvas(image, ids, none, -1)[0] is image


def test_canvas_too_small() -> None:
    with pytest.raises(UserError, match=r"INPUT.SIZE_DIVISIBILITY 2 is smaller than an augmented image \(3x2\)"):
        pad_to_canvas(np.zeros((2, 3, 3), np.uint8), np.zeros((1, 2, 3), np.int16), 2, -1)

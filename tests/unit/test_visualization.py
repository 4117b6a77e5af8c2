"""Pictures: sizes, colours where they belong, names and legends that can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from maskformer.data.dataset import Metadata, distinct_colors
from maskformer.visualization import (
    LegendEntry,
    add_legend,
    draw_instances,
    draw_panoptic,
    draw_semantic,
    instance_overlay,
    panoptic_overlay,
    semantic_overlay,
    side_by_side,
)
from maskformer.visualization.canvas import PAPER, enlargement, readable_on, shortened, text_height, text_width
from maskformer.visualization.painting import shade


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(
        name="little",
        classes=["sky", "cat"],
        things=[False, True],
        colors=[(255, 0, 0), (0, 0, 255)],
        ignore_label=255,
        evaluators=(),
        dataset_ids=[0, 1],
        truth=(),
    )


def scene(height: int, width: int) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """A grey image; sky above, two cats below, void in the lower right corner."""
    image = np.full((height, width, 3), 128, dtype=np.uint8)
    ids = np.ones((height, width), dtype=np.int32)
    ids[height // 2 :, : width // 3] = 2
    ids[height // 2 :, width // 3 :] = 3
    ids[-height // 8 :, -width // 8 :] = 0
    segments = [
        {"id": 1, "category_id": 0, "isthing": False, "score": 0.99},
        {"id": 2, "category_id": 1, "isthing": True, "score": 0.93},
        {"id": 3, "category_id": 1, "isthing": True, "score": 0.72},
    ]
    return image, ids, segments


SIZES = [(128, 128), (8, 3), (1, 1), (97, 301), (480, 640), (1080, 1920)]


@pytest.mark.parametrize("size", SIZES)
def test_every_drawing_at_every_size(size: tuple[int, int], metadata: Metadata) -> None:
    image, ids, segments = scene(*size)
    factor = enlargement(*size)
    assert max(size) * factor >= 640
    labels = np.array([255, 0, 1, 1])[ids]
    masks = torch.from_numpy(np.stack([ids == 2, ids == 3]))
    instances = {"masks": masks, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.3])}
    pictures = [
        draw_semantic(image, torch.from_numpy(labels), metadata),
        draw_panoptic(image, ids, segments, metadata),
        draw_instances(image, instances, metadata),
    ]
    for picture in pictures:
        assert picture.dtype == np.uint8
        assert picture.shape[1] == size[1] * factor
        assert picture.shape[0] > size[0] * factor  # the legend
    assert (image == 128).all()


def test_a_very_large_picture_is_not_enlarged_and_its_text_grows() -> None:
    assert enlargement(2160, 3840) == 1
    assert text_height(2160, 3840) > 2 * text_height(720, 1280) > 2 * 13


def test_colours_lie_where_the_classes_are(metadata: Metadata) -> None:
    image, ids, _ = scene(640, 640)
    labels = np.array([255, 0, 1, 1])[ids]
    picture = semantic_overlay(image, labels, metadata, opacity=0.5).picture.astype(int)
    assert abs(picture[40, 40] - (192, 64, 64)).max() <= 1  # half red, half grey
    assert abs(picture[600, 40] - (64, 64, 192)).max() <= 1
    unlabelled = picture[630, 630]
    assert unlabelled[0] == unlabelled[1] == unlabelled[2] < 128
    assert (picture[320 - 1, 40] > 130).all()  # a light line between the two


def test_things_of_one_class_differ_in_colour(metadata: Metadata) -> None:
    image, ids, segments = scene(640, 640)
    picture = panoptic_overlay(image, ids, segments, metadata).picture.astype(int)
    assert abs(picture[630, 10] - picture[630, 500]).max() > 20
    shades = [shade((180, 40, 60), number) for number in range(7)]
    assert len(set(shades)) == 7
    assert shade((180, 40, 60), 0) == (180, 40, 60)


def test_legends(metadata: Metadata) -> None:
    image, ids, segments = scene(200, 200)
    semantic = semantic_overlay(image, np.array([255, 0, 1, 1])[ids], metadata).legend
    assert [entry.text for entry in semantic] == ["sky  50%", "cat  48%", "unlabelled"]
    panoptic = panoptic_overlay(image, ids, segments, metadata).legend
    assert [entry.text for entry in panoptic] == ["cat  x2  72% to 93%", "sky", "unlabelled"]
    assert len(panoptic[0].colors) == 2


def test_segments_without_score_and_empty_results(metadata: Metadata) -> None:
    image, ids, segments = scene(64, 64)
    for segment in segments:
        del segment["score"]
    assert panoptic_overlay(image, ids, segments, metadata).legend[0].text == "cat  x2"
    assert draw_panoptic(image, np.zeros_like(ids), [], metadata).shape[1] == 640
    nothing = {"masks": np.zeros((0, 64, 64), bool), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    assert draw_instances(image, nothing, metadata).shape == (640, 640, 3)


def test_unsure_instances_are_left_out_and_the_surest_is_on_top(metadata: Metadata) -> None:
    image = np.full((640, 640, 3), 128, dtype=np.uint8)
    masks = np.zeros((3, 640, 640), dtype=bool)
    masks[0, 100:400, 100:400] = masks[1, 200:600, 200:600] = masks[2, :50, :50] = True
    instances = {"masks": masks, "labels": np.ones(3, int), "scores": np.array([0.6, 0.9, 0.2])}
    overlay = instance_overlay(image, instances, metadata)
    assert overlay.legend[0].text == "cat  x2  60% to 90%"
    picture = overlay.picture.astype(int)
    assert abs(picture[210, 210] - picture[590, 590]).max() <= 1  # the overlap belongs to the surer one
    assert abs(picture[210, 210] - picture[110, 110]).max() > 10
    assert (picture[25, 25] == 128).all()


def test_names_are_written(metadata: Metadata) -> None:
    """A wide region carries its name: a box in the full class colour."""
    picture = semantic_overlay(np.zeros((300, 640, 3), np.uint8), np.zeros((300, 640), int), metadata).picture
    assert (picture == (255, 0, 0)).all(-1).sum() > 100
    tiny = np.full((640, 640), 1)
    tiny[:6, :6] = 0  # too small to carry one
    picture = semantic_overlay(np.zeros((640, 640, 3), np.uint8), tiny, metadata).picture
    assert (picture == (255, 0, 0)).all(-1).sum() == 0


def test_side_by_side() -> None:
    small, large = np.zeros((100, 80, 3), np.uint8), np.full((700, 700, 3), 9, np.uint8)
    row = side_by_side([small, large], ["left", "a title that is far too long for its picture " * 9])
    assert row.shape[1] >= 700 + 7 * 80
    assert row.shape[0] > 700
    assert (row[-1, -1] == 9).all()
    assert (row[0, 0] == PAPER).all()
    assert side_by_side([large]).shape == (700, 700, 3)
    with pytest.raises(ValueError, match="2 pictures need as many titles"):
        side_by_side([small, large], ["one"])


def test_legends_of_many_classes_stay_inside() -> None:
    picture = np.zeros((100, 700, 3), np.uint8)
    entries = [LegendEntry(f"a class with a rather long name {i}", (c,)) for i, c in enumerate(distinct_colors(60))]
    legend = add_legend(picture, entries)
    assert legend.shape[1] == 700
    assert legend.shape[0] > 60 * 13 // 2
    assert add_legend(picture, []) is picture
    assert add_legend(picture[:, :40], entries).shape[1] == 40


def test_text() -> None:
    assert shortened("short", 500, 14) == "short"
    cut = shortened("a long name that does not fit", 80, 14)
    assert cut.endswith("...")
    assert text_width(cut, 14) <= 80
    assert readable_on((255, 255, 0)) == (0, 0, 0)
    assert readable_on((0, 0, 120)) == (255, 255, 255)


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_what_is_no_picture_is_refused(image: np.ndarray, metadata: Metadata) -> None:
    with pytest.raises(ValueError, match=r"a picture must be \(H, W, 3\) uint8 RGB"):
        draw_semantic(image, np.zeros((4, 4), int), metadata)


def test_a_map_of_another_size_is_refused(metadata: Metadata) -> None:
    with pytest.raises(ValueError, match="the image is"):
        draw_semantic(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), int), metadata)

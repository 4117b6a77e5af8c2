"""SegmentMap: the one path of supervision."""

from __future__ import annotations

import pytest
import torch

from maskformer.structures import SegmentMap


def test_from_label_map_is_ascending_and_leaves_ignored_pixels_out() -> None:
    labels = torch.tensor([[7, 255, 2], [2, 2, 7]], dtype=torch.uint8)
    segments = SegmentMap.from_label_map(labels, 255)
    assert segments.labels.tolist() == [2, 7]
    assert segments.ids[0].tolist() == [[1, -1, 0], [0, 0, 1]]
    assert segments.label_map(255).tolist() == labels.tolist()
    assert segments.areas().tolist() == [3, 2]


def test_from_label_map_with_an_ignore_value_between_the_classes() -> None:
    segments = SegmentMap.from_label_map(torch.tensor([[0, 1, 2, 1]]), 1)
    assert segments.labels.tolist() == [0, 2]
    assert segments.ids[0, 0].tolist() == [0, -1, 1, -1]


def test_all_ignored_is_a_valid_map_without_segments() -> None:
    segments = SegmentMap.from_label_map(torch.full((4, 4), 255), 255)
    assert len(segments) == 0
    assert segments.masks().shape == (0, 4, 4)
    assert segments.label_map(9).unique().tolist() == [9]
    assert segments.areas().tolist() == []


def test_from_panoptic_keeps_order_and_leaves_crowd_and_void_out() -> None:
    ids = torch.tensor([[70000, 0, 3], [9, 9, 3]])
    info = [
        {"id": 9, "category_id": 4, "iscrowd": 0},
        {"id": 3, "category_id": 1, "iscrowd": 1},
        {"id": 70000, "category_id": 2},
        {"id": 55, "category_id": 2},
    ]
    segments = SegmentMap.from_panoptic(ids, info)
    assert segments.labels.tolist() == [4, 2, 2]
    assert segments.ids[0].tolist() == [[1, -1, -1], [0, 0, -1]]
    assert segments.drop_empty().labels.tolist() == [4, 2]


def test_overlapping_masks_use_as_few_planes_as_their_order_allows() -> None:
    masks = torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[0, :, :2] = True
    masks[1, :, 1:3] = True  # overlaps the first
    masks[2, :, 3:] = True  # free on the first plane
    segments = SegmentMap.from_masks(masks, torch.tensor([5, 6, 7]))
    assert segments.ids.shape[0] == 2
    assert segments.planes.tolist() == [0, 1, 0]
    assert torch.equal(segments.masks(), masks)
    assert segments.areas().tolist() == [4, 4, 2]


def test_pad_and_resize_share_one_path() -> None:
    segments = SegmentMap.from_label_map(torch.tensor([[1, 2], [3, 4]]), 255)
    padded = segments.pad(3, 4)
    assert padded.ids[0].tolist() == [[0, 1, -1, -1], [2, 3, -1, -1], [-1, -1, -1, -1]]
    assert padded.resize_nearest(2, 2).ids[0].tolist() == [[0, -1], [2, -1]]  # source index ⌊i·in/out⌋


def test_select_renumbers() -> None:
    segments = SegmentMap.from_label_map(torch.tensor([[1, 2, 3, 255]]), 255)
    chosen = segments.select([2, 0])
    assert chosen.labels.tolist() == [3, 1]
    assert chosen.ids[0, 0].tolist() == [1, -1, 0, -1]


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(2, 2, dtype=torch.int16), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(1, 2, 2), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(1, 2, 2, dtype=torch.int16), torch.zeros(0)),
        (torch.zeros(2, 2, 2, dtype=torch.int16), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(2, 2, 2, dtype=torch.int16), torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),
    ],
)
def test_wrong_shapes_are_refused(arguments: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be|needed"):
        SegmentMap(*arguments)

"""What Detectron2's and other mappers give, as segments: worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from maskformer.errors import UserError
from maskformer.integrations.detectron2.supervision import segment_map
from maskformer.structures import SegmentMap

LEFT = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
RIGHT = [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
ACROSS = [[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def instances(masks: Any, classes: list[int], size: tuple[int, int] = (3, 4)) -> Instances:
    made = Instances(size)
    made.gt_classes = torch.tensor(classes, dtype=torch.int64)
    made.gt_masks = masks
    return made


def bits(*masks: list[list[int]]) -> torch.Tensor:
    return torch.tensor(masks, dtype=torch.bool).reshape(-1, 3, 4)


@pytest.mark.parametrize("kind", [BitMasks, lambda masks: masks, lambda masks: masks.to(torch.uint8)])
def test_detectron2_masks_become_one_plane_where_none_overlap(kind: Any) -> None:
    found = segment_map({"instances": instances(kind(bits(LEFT, RIGHT)), [7, 2])}, 255)
    assert found.plane is None
    assert found.labels.tolist() == [7, 2]
    assert found.ids.tolist() == [[[0, 0, -1, 1], [0, 0, -1, 1], [-1, -1, -1, 1]]]


def test_detectron2_masks_that_overlap_lie_in_planes() -> None:
    found = segment_map({"instances": instances(BitMasks(bits(LEFT, RIGHT, ACROSS)), [7, 2, 7])}, 255)
    assert found.planes.tolist() == [0, 0, 1]
    assert torch.equal(found.masks(), bits(LEFT, RIGHT, ACROSS))
    assert found.labels.tolist() == [7, 2, 7]
    # As a label map, which per-pixel models train on, the last plane wins.
    assert found.label_map(255).tolist() == [[7, 7, 7, 7], [7, 7, 255, 2], [255, 255, 255, 2]]


def test_detectron2_polygons_are_filled_at_the_size_of_the_image() -> None:
    square = [np.array([1.0, 0.0, 3.0, 0.0, 3.0, 2.0, 1.0, 2.0])]
    two_parts = [np.array([0.0, 2.0, 1.0, 2.0, 1.0, 3.0, 0.0, 3.0]), np.array([3.0, 2.0, 4.0, 2.0, 4.0, 3.0, 3.0, 3.0])]
    found = segment_map({"instances": instances(PolygonMasks([square, two_parts]), [0, 1])}, 255)
    assert found.ids.tolist() == [[[-1, 0, 0, -1], [-1, 0, 0, -1], [1, -1, -1, 1]]]


def test_detectron2_instances_without_pixels_are_dropped_unless_kept() -> None:
    sample = {"instances": instances(BitMasks(bits(LEFT, [[0] * 4] * 3, RIGHT)), [7, 5, 2])}
    assert segment_map(sample, 255).labels.tolist() == [7, 2]
    assert segment_map(sample, 255).ids.unique().tolist() == [-1, 0, 1]
    kept = segment_map(sample, 255, keep_empty=True)
    assert kept.labels.tolist() == [7, 5, 2]
    assert kept.areas().tolist() == [4, 0, 3]


def test_detectron2_image_without_annotations_has_no_segment() -> None:
    for bare in (Instances((3, 4)), instances(BitMasks(bits()), []), instances(PolygonMasks([]), [])):
        found = segment_map({"instances": bare}, 255)
        assert len(found) == 0
        assert found.ids.tolist() == [[[-1] * 4] * 3]


def test_detectron2_label_map_becomes_a_segment_a_class() -> None:
    labels = torch.tensor([[4, 4, 255], [1, 4, 255]])
    found = segment_map({"sem_seg": labels}, 255)
    assert found.labels.tolist() == [1, 4]
    assert found.ids.tolist() == [[[1, 1, -1], [0, 1, -1]]]
    # Another ignore label, as of Mapillary Vistas, makes 255 a class like any other.
    assert segment_map({"sem_seg": labels}, 4).labels.tolist() == [1, 255]
    assert len(segment_map({"sem_seg": torch.full((2, 2), 255)}, 255)) == 0


def test_detectron2_own_segments_come_first_and_instances_before_labels() -> None:
    own = SegmentMap.from_label_map(torch.zeros(3, 4), 255)
    labels = torch.where(bits(LEFT)[0], 7, 255)
    sample = {"segments": own, "instances": instances(bits(LEFT), [7]), "sem_seg": labels}
    assert segment_map(sample, 255) is own
    del sample["segments"]
    assert segment_map(sample, 255).labels.tolist() == [7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {}, "none of 'segments', 'instances' and 'sem_seg'"),
        (lambda i: i.remove("gt_masks") or {"instances": i}, "set MODEL.MASK_ON True"),
        (lambda i: i.remove("gt_classes") or {"instances": i}, "have no gt_classes"),
        (lambda i: {"instances": instances(Boxes(torch.zeros(1, 4)), [0])}, "are Boxes, but can only be BitMasks"),
        (lambda i: {"instances": instances(bits(LEFT), [0], (4, 4))}, "are 3x4 but its instances 4x4"),
        (lambda i: {"sem_seg": torch.zeros(1, 3, 4).long()}, r"is \(1, 3, 4\) torch.int64"),
        (lambda i: {"sem_seg": torch.zeros(3, 4)}, "must be integer labels"),
    ],
)
def test_detectron2_supervision_that_cannot_be_used_is_named(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        segment_map({"file_name": "a.jpg", **change(instances(bits(LEFT), [0]))}, 255)
    assert "a.jpg" in str(caught.value)


# ------------------------------------------------------------------ what would train on something else in silence
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (6, 8), (4, 3)])
@pytest.mark.parametrize("kind", ["segments", "instances", "sem_seg"])
def test_detectron2_truth_of_another_size_than_the_image_is_refused(kind: str, size: tuple[int, int]) -> None:
    def sample(height: int, width: int) -> dict[str, Any]:
        labels = torch.zeros(height, width).long()
        found = instances(labels[None].bool(), [0], (height, width))
        truth = {"segments": SegmentMap.from_label_map(labels, 255), "instances": found, "sem_seg": labels}
        return {"file_name": "a.jpg", "image": torch.zeros(3, 3, 4), kind: truth[kind]}

    assert segment_map(sample(3, 4), 255).size == (3, 4)
    with pytest.raises(UserError, match=rf"truth of a.jpg is {size[0]}x{size[1]} but its image 3x4"):
        segment_map(sample(*size), 255)


@pytest.mark.parametrize("kind", ["segments", "instances", "sem_seg"])
@pytest.mark.parametrize("label", [-1, 3, 254])
def test_detectron2_labels_that_the_model_has_not_are_refused(kind: str, label: int) -> None:
    def sample(label: int) -> dict[str, Any]:
        labels = torch.tensor([[0, 255], [2, label]])
        own = SegmentMap(torch.tensor([[[0, -1], [1, 2]]], dtype=torch.int16), torch.tensor([0, 2, label]))
        masks = torch.stack([labels == 0, labels == 2, labels == label])
        truth = {"segments": own, "instances": instances(masks, [0, 2, label], (2, 2)), "sem_seg": labels}
        return {"file_name": "a.jpg", kind: truth[kind]}

    assert len(segment_map(sample(1), 255, num_classes=3)) == 3
    assert len(segment_map(sample(label), 255)) == 3  # nothing known of the classes
    message = f"truth of a.jpg has the label {label}, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 3 .labels 0..2. and IGNORE"
    with pytest.raises(UserError, match=f"{message}_VALUE 255"):
        segment_map(sample(label), 255, num_classes=3)


def test_detectron2_image_without_supervised_pixel_has_no_wrong_label() -> None:
    assert len(segment_map({"sem_seg": torch.full((2, 2), 255)}, 255, num_classes=3)) == 0


def test_detectron2_stuff_beside_instances_is_refused_and_not_dropped() -> None:
    found = instances(bits(LEFT), [7])
    inside = torch.where(bits(LEFT)[0], 0, 255)  # as Detectron2's "separated" COCO: all things are 0 there
    sample = {"file_name": "a.jpg", "instances": found, "sem_seg": inside}
    assert segment_map(sample, 255).labels.tolist() == [7]
    stuff = inside.clone()
    stuff[2, 3] = 53
    with pytest.raises(UserError, match=r"sample of a.jpg has instances and a sem_seg .* train with MaskFormerMapper"):
        segment_map({**sample, "sem_seg": stuff}, 255)
    with pytest.raises(UserError, match=r"sem_seg of a.jpg is 2x4 but its instances 3x4"):
        segment_map({**sample, "sem_seg": inside[:2]}, 255)

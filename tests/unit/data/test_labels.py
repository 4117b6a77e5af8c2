from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer.data import labels
from maskformer.data.dataset import Metadata
from maskformer.errors import UserError
from maskformer.structures import SegmentMap

MakeMetadata = Callable[..., Metadata]


def save_labels(path: Path, values: list[list[int]], dtype: type = np.uint8) -> dict[str, str]:
    Image.fromarray(np.array(values, dtype)).save(path)
    return {"sem_seg_file_name": str(path), "file_name": "a.jpg"}


def save_ids(path: Path, ids: list[list[int]], segments: list[dict[str, int]]) -> dict[str, object]:
    array = np.array(ids)
    Image.fromarray(np.stack([array % 256, array // 256 % 256, array // 65536], -1).astype(np.uint8)).save(path)
    return {"pan_seg_file_name": str(path), "segments_info": segments, "image_id": 3, "file_name": "a.jpg"}


def as_map(planes: labels.Planes) -> SegmentMap:
    return labels.planes_to_segment_map(*planes, keep_empty=True)


# ------------------------------------------------------------------ semantic
def test_semantic_segments_ascend_and_leave_out_ignored(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    record = save_labels(tmp_path / "a.png", [[3, 1, 255], [1, 255, 0]])
    planes, classes, plane = labels.semantic_planes(record, make_metadata(4))
    assert planes.tolist() == [[[2, 1, -1], [1, -1, 0]]]
    assert planes.dtype == np.int16
    assert classes.tolist() == [0, 1, 3]
    assert plane is None
    assert labels.read_semantic(record, make_metadata(4)).tolist() == [[3, 1, 255], [1, 255, 0]]


def test_semantic_agrees_with_segment_map(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    values = np.random.default_rng(0).choice([0, 2, 5, 65535], (30, 40))
    record = save_labels(tmp_path / "a.tif", values.tolist(), np.uint16)
    found = as_map(labels.semantic_planes(record, make_metadata(6, ignore_label=65535)))
    expected = SegmentMap.from_label_map(torch.from_numpy(values), 65535)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.labels, expected.labels)


def test_raw_labels_are_mapped_and_merged(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    metadata = make_metadata(2, raw_labels=((7, 1), (8, 1), (26, 0), (0, 255)))
    record = save_labels(tmp_path / "a.png", [[7, 8, 0], [26, 26, 0]])
    assert labels.read_semantic(record, metadata).tolist() == [[1, 1, 255], [0, 0, 255]]
    planes, classes, _ = labels.semantic_planes(record, metadata)
    assert planes.tolist() == [[[1, 1, -1], [0, 0, -1]]]
    assert classes.tolist() == [0, 1]


def test_only_ignored_pixels(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    record = save_labels(tmp_path / "a.png", [[255, 255]])
    planes, classes, _ = labels.semantic_planes(record, make_metadata(4))
    assert planes.tolist() == [[[-1, -1]]]
    assert len(classes) == 0
    assert len(as_map((planes, classes, None))) == 0


@pytest.mark.parametrize("read", [labels.semantic_planes, labels.read_semantic])
@pytest.mark.parametrize(("value", "dtype"), [(4, np.uint8), (254, np.uint8), (60000, np.uint16), (70000, np.int32)])
def test_unknown_label(
    tmp_path: Path, make_metadata: MakeMetadata, read: Callable[..., object], value: int, dtype: type
) -> None:
    name = "a.tif" if dtype == np.int32 else "a.png"
    record = save_labels(tmp_path / name, [[0, value]], dtype)
    with pytest.raises(UserError) as error:
        read(record, make_metadata(4, remedy="set 'labels:' in dataset.yaml"))
    message = str(error.value)
    for part in (name, f"the label {value}", "4 classes (labels 0..3)", "ignore label 255", "set 'labels:'"):
        assert part in message, message
    assert "\n" not in message


def test_raw_label_that_is_not_listed(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    record = save_labels(tmp_path / "a.png", [[7, 9]])
    with pytest.raises(UserError, match="the label 9"):
        labels.semantic_planes(record, make_metadata(2, raw_labels=((7, 1), (8, 0))))


# ------------------------------------------------------------------ panoptic
SEGMENTS = [
    {"id": 70000, "category_id": 2, "iscrowd": 0},
    {"id": 300, "category_id": 0, "iscrowd": 1},
    {"id": 5, "category_id": 2, "iscrowd": 0, "area": 99},
]


def test_panoptic_keeps_order_and_leaves_out_crowd(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    record = save_ids(tmp_path / "a.png", [[70000, 300, 0], [5, 5, 70000]], SEGMENTS)
    metadata = make_metadata(3, things=(0, 2), truth=("pan_seg",))
    planes, classes, _ = labels.panoptic_planes(record, metadata)
    assert planes.tolist() == [[[0, -1, -1], [1, 1, 0]]]
    assert classes.tolist() == [2, 2]
    expected = SegmentMap.from_panoptic(torch.tensor([[70000, 300, 0], [5, 5, 70000]]), SEGMENTS)
    assert np.array_equal(expected.ids.numpy(), planes)
    # As a label map, the crowd is ignored as well.
    assert labels.read_semantic(record, metadata).tolist() == [[2, 255, 255], [2, 2, 2]]


def test_panoptic_truth_for_evaluation(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    record = save_ids(tmp_path / "a.png", [[70000, 300, 0], [5, 5, 70000]], SEGMENTS)
    ids, segments = labels.read_panoptic(record, make_metadata(3, things=(2,)))
    assert ids.tolist() == [[70000, 300, 0], [5, 5, 70000]]
    assert [s["area"] for s in segments] == [2, 1, 99]  # counted where not recorded
    assert [s["iscrowd"] for s in segments] == [0, 1, 0]
    assert [s["isthing"] for s in segments] == [True, False, True]
    assert "isthing" not in SEGMENTS[0]


def test_panoptic_segment_without_pixels(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    record = save_ids(tmp_path / "a.png", [[5, 5]], SEGMENTS)
    planes, classes, plane = labels.panoptic_planes(record, make_metadata(3))
    assert classes.tolist() == [2, 2]
    kept = labels.planes_to_segment_map(planes, classes, plane, keep_empty=True)
    dropped = labels.planes_to_segment_map(planes, classes, plane, keep_empty=False)
    assert (len(kept), kept.ids.tolist()) == (2, [[[1, 1]]])
    assert (len(dropped), dropped.ids.tolist()) == (1, [[[0, 0]]])


def test_id_that_is_not_listed(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    record = save_ids(tmp_path / "a.png", [[5, 6]], SEGMENTS)
    for read in (labels.panoptic_planes, labels.read_panoptic):
        with pytest.raises(UserError, match="the id 6, which segments_info of image 3 does not list"):
            read(record, make_metadata(3))


def test_category_outside_the_classes(tmp_path: Path, make_metadata: MakeMetadata) -> None:
    record = save_ids(tmp_path / "a.png", [[5, 5]], SEGMENTS)
    with pytest.raises(UserError, match="category_id 2, but data set 'toy' has 2 classes"):
        labels.panoptic_planes(record, make_metadata(2))


# ------------------------------------------------------------------ instances
def test_instances_lie_in_planes_where_they_overlap(make_metadata: MakeMetadata) -> None:
    square = [[0, 0, 4, 0, 4, 4, 0, 4]]
    over = [[2, 2, 6, 2, 6, 6, 2, 6]]
    apart = [[6, 0, 8, 0, 8, 2, 6, 2]]
    annotations = [
        {"id": 1, "category_id": 1, "segmentation": square},
        {"id": 2, "category_id": 0, "segmentation": over},
        {"id": 3, "category_id": 0, "segmentation": apart},
        {"id": 4, "category_id": 0, "segmentation": {"size": [6, 8], "counts": [0, 48]}, "iscrowd": 1},
    ]
    record = {"file_name": "a.jpg", "height": 6, "width": 8, "annotations": annotations}
    planes, classes, plane = labels.instance_planes(record, make_metadata(2))
    assert planes.shape == (2, 6, 8)
    assert classes.tolist() == [1, 0, 0]
    assert plane is not None
    assert plane.tolist() == [0, 1, 0]
    assert as_map((planes, classes, plane)).masks().sum((1, 2)).tolist() == [16, 16, 4]


def test_image_without_instances(make_metadata: MakeMetadata) -> None:
    record = {"file_name": "a.jpg", "height": 6, "width": 8, "annotations": []}
    planes, classes, plane = labels.instance_planes(record, make_metadata(2))
    assert planes.shape == (1, 6, 8)
    assert (planes == -1).all()
    assert len(classes) == 0
    assert plane is None


def test_dropping_keeps_planes_in_step() -> None:
    planes = np.full((2, 2, 3), -1, np.int16)
    planes[0, 0, 0], planes[1, 1, 1] = 0, 2
    found = labels.planes_to_segment_map(planes, np.array([5, 6, 7]), np.array([0, 0, 1]), keep_empty=False)
    assert found.labels.tolist() == [5, 7]
    assert found.planes.tolist() == [0, 1]
    assert found.masks().sum((1, 2)).tolist() == [1, 1]

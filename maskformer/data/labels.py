"""The truth of a record: from label files to contiguous labels, and from there to segments.

Every task ends in the same form, an index plane: (P, H, W) int16 that says for each pixel which segment it belongs to
(-1: none), and the (M,) int64 class of each segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from maskformer.data import image_io
from maskformer.data.dataset import Metadata, Record
from maskformer.errors import UserError
from maskformer.structures import UNSUPERVISED, SegmentMap

Planes = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Index planes (P, H, W) int16, classes (M,) int64, plane of each segment (M,) int64 or None."""

_MAX_RAW_LABEL = 65535


@lru_cache(maxsize=16)
def _label_table(pairs: tuple[tuple[int, int], ...], num_classes: int, ignore_label: int) -> np.ndarray:
    """(65536 or more,) int32: raw value → contiguous label, `ignore_label`, or -1 for values that mean nothing."""
    table = np.full(max(_MAX_RAW_LABEL, ignore_label) + 1, -1, np.int32)
    for raw, label in pairs or [(i, i) for i in range(num_classes)]:
        table[raw] = label
    if not pairs:
        table[ignore_label] = ignore_label
    return table


def _unknown_label(file_name: str, value: int, metadata: Metadata) -> UserError:
    if metadata.raw_labels:
        known = f"its labels: table lists only {sorted(raw for raw, _ in metadata.raw_labels)[:12]} …"
    else:
        last = metadata.num_classes - 1
        known = f"it has {metadata.num_classes} classes (labels 0..{last}) and ignore label {metadata.ignore_label}"
    return UserError(
        f"sem_seg_file_name {file_name!r} holds the label {value}, which data set {metadata.name!r} does not know: "
        f"{known}; {metadata.remedy}"
    )


def _raw_semantic(record: Record, metadata: Metadata) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stored label map, the raw values present (ascending) and their contiguous labels."""
    file_name = str(record["sem_seg_file_name"])
    raw = image_io.read_label_map(file_name)
    if raw.size == 0 or int(raw.max()) > _MAX_RAW_LABEL or int(raw.min()) < 0:
        value = int(raw.min()) if raw.size and int(raw.min()) < 0 else int(raw.max(initial=0))
        raise _unknown_label(file_name, value, metadata)
    present = np.flatnonzero(np.bincount(raw.reshape(-1)))
    labels = _label_table(metadata.raw_labels, metadata.num_classes, metadata.ignore_label)[present]
    if (labels < 0).any():
        raise _unknown_label(file_name, int(present[labels < 0][-1]), metadata)
    return raw, present, labels


def read_semantic(record: Record, metadata: Metadata) -> np.ndarray:
    """The (H, W) int32 contiguous labels, ignore label included; derived from panoptic truth where there is no file.

    Raises:
        UserError: if the file is missing, damaged, or holds a value outside the known ones.
    """
    if "sem_seg_file_name" not in record:
        planes, labels, _ = panoptic_planes(record, metadata)
        return np.append(labels, metadata.ignore_label).astype(np.int32)[planes[0]]
    raw, present, labels = _raw_semantic(record, metadata)
    table = np.full(int(present[-1]) + 1, metadata.ignore_label, np.int32)
    table[present] = labels
    return table[raw]


def semantic_planes(record: Record, metadata: Metadata) -> Planes:
    """One segment per class present, ascending by label."""
    if "sem_seg_file_name" in record:
        raw, present, labels = _raw_semantic(record, metadata)
    else:
        raw = read_semantic(record, metadata)
        present = labels = np.flatnonzero(np.bincount(raw.reshape(-1)))
    classes = np.unique(labels[labels != metadata.ignore_label]).astype(np.int64)
    table = np.full(int(present[-1]) + 1, UNSUPERVISED, np.int16)
    supervised = labels != metadata.ignore_label
    table[present[supervised]] = np.searchsorted(classes, labels[supervised])
    return table[raw][None], classes, None


def panoptic_planes(record: Record, metadata: Metadata) -> Planes:
    """One segment per entry of ``segments_info`` that is not a crowd, in its order; void and crowd unsupervised."""
    segments = list(record["segments_info"])
    ids, table = _panoptic_ids(record, segments)
    kept = [s for s in segments if not s.get("iscrowd", 0)]
    classes = np.array([s["category_id"] for s in kept], np.int64)
    _check_categories(classes, str(record["pan_seg_file_name"]), metadata)
    table[:] = 0
    for index, segment in enumerate(kept):
        if segment["id"] < len(table):
            table[segment["id"]] = index + 1
    return (table[ids] - np.int16(1))[None], classes, None


def _panoptic_ids(record: Record, segments: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The (H, W) ids and a scratch table indexed by id; refuses ids that ``segments_info`` does not list."""
    file_name = str(record["pan_seg_file_name"])
    ids = image_io.read_panoptic_ids(file_name)
    # Zeroed memory is only mapped where it is touched, so a table up to the largest id (2^24) costs a few pages.
    table = np.zeros(int(ids.max(initial=0)) + 1, np.int16)
    table[0] = 1
    for segment in segments:
        if segment["id"] < len(table):
            table[segment["id"]] = 1
    unknown = ids[table[ids] == 0]
    if unknown.size:
        raise UserError(
            f"pan_seg_file_name {file_name!r} holds the id {int(unknown[0])}, which segments_info of image "
            f"{record.get('image_id')!r} does not list: the PNG and the JSON are not of the same version"
        )
    return ids, table


def _check_categories(classes: np.ndarray, file_name: str, metadata: Metadata) -> None:
    wrong = classes[(classes < 0) | (classes >= metadata.num_classes)]
    if wrong.size:
        raise UserError(
            f"the truth of {file_name!r} has category_id {int(wrong[0])}, but data set {metadata.name!r} has "
            f"{metadata.num_classes} classes (0..{metadata.num_classes - 1}): {metadata.remedy}"
        )


def read_panoptic(record: Record, metadata: Metadata) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The truth that evaluation compares with.

    Returns:
        (H, W) int32 ids, 0 = void; and ``segments_info`` with contiguous ``category_id``, crowds included, ``area``
        as recorded, or counted here where the record has none.
    """
    segments = [dict(s) for s in record["segments_info"]]
    ids, _ = _panoptic_ids(record, segments)
    _check_categories(np.array([s["category_id"] for s in segments], int), str(record["pan_seg_file_name"]), metadata)
    for segment in segments:
        segment.setdefault("isthing", metadata.things[segment["category_id"]])
        segment.setdefault("iscrowd", 0)
        if "area" not in segment:
            segment["area"] = int((ids == segment["id"]).sum())
    return ids, segments


def instance_planes(record: Record, metadata: Metadata) -> Planes:
    """One segment per annotation that is not a crowd; overlapping masks lie in different planes."""
    height, width = int(record["height"]), int(record["width"])
    kept = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    classes = np.array([a["category_id"] for a in kept], np.int64)
    _check_categories(classes, str(record["file_name"]), metadata)
    masks = np.zeros((len(kept), height, width), bool)
    for mask, annotation in zip(masks, kept, strict=True):
        where = f"annotation {annotation.get('id')!r} of image {str(record['file_name'])!r}"
        mask[:] = image_io.decode_segmentation(annotation["segmentation"], height, width, where)
    laid = SegmentMap.from_masks(torch.from_numpy(masks), torch.from_numpy(classes))
    return laid.ids.numpy(), classes, None if laid.plane is None else laid.plane.numpy()


READERS = {"semantic": semantic_planes, "panoptic": panoptic_planes, "instance": instance_planes}
"""Task → what reads a record's segments."""


def planes_to_segment_map(
    planes: np.ndarray, classes: np.ndarray, plane: np.ndarray | None, keep_empty: bool
) -> SegmentMap:
    """Wraps index planes as `SegmentMap`, without segments that have no pixel left unless `keep_empty`.

    Args:
        planes: (P, H, W) int16.
        classes: (M,) int64.
        plane: (M,) int64 or None.
        keep_empty: keep segments without pixels as empty masks.
    """
    if not keep_empty and len(classes):
        # Shifted by one, so that unsupervised pixels count at 0.
        areas = np.bincount((planes + np.int16(1)).reshape(-1), minlength=len(classes) + 1)[1:]
        kept = np.flatnonzero(areas)
        if len(kept) < len(classes):
            table = np.full(len(classes) + 1, UNSUPERVISED, np.int16)
            table[kept] = np.arange(len(kept), dtype=np.int16)
            planes, classes = table[planes], classes[kept]
            plane = None if plane is None else plane[kept]
    return SegmentMap(
        torch.from_numpy(np.ascontiguousarray(planes)),
        torch.from_numpy(classes),
        None if plane is None else torch.from_numpy(plane),
    )

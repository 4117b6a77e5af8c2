"""Data sets in COCO's JSON formats, and COCO 2017 panoptic itself.

``coco_2017_{train,val}_panoptic``: ``coco/{split}2017/*.jpg``, ``coco/annotations/panoptic_{split}2017.json`` and
``coco/panoptic_{split}2017/*.png`` under `datasets_root`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maskformer.data.dataset import Dataset, Metadata, Record, datasets_root
from maskformer.data.datasets.files import require_files, require_folder
from maskformer.data.datasets.tables import read_table
from maskformer.data.paths import inside
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

NAMES = ("coco_2017_train_panoptic", "coco_2017_val_panoptic")
IGNORE_LABEL = 255
_HIGHEST_ID = 256**3 - 1  # three channels of 8 bits
_REMEDY = (
    "download http://images.cocodataset.org/zips/{split}2017.zip and "
    "http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip, unpack both under "
    "$DETECTRON2_DATASETS/coco, and there annotations/panoptic_{split}2017.zip, which needs no preparation"
)


def build(name: str) -> Dataset:
    """``coco_2017_train_panoptic`` or ``coco_2017_val_panoptic``."""
    split = name.split("_")[2]
    root = datasets_root() / "coco"
    table = read_table("coco_panoptic_133.json")
    metadata = Metadata(
        name=name,
        classes=table.classes,
        things=table.things,
        colors=table.colors,
        ignore_label=IGNORE_LABEL,
        evaluators=("panoptic_seg",),
        dataset_ids=table.dataset_ids,
        truth=("pan_seg",),
        annotation_file=str(root / "annotations" / f"panoptic_{split}2017.json"),
        panoptic_root=str(root / f"panoptic_{split}2017"),
    )
    return Dataset(metadata, partial(panoptic_records, metadata, root / f"{split}2017", _REMEDY.format(split=split)))


# ------------------------------------------------------------------ the JSON formats
def read_json(path: str | Path, keys: Sequence[str], dataset: str, remedy: str) -> dict[str, Any]:
    """Reads a COCO JSON file and checks that it has these lists.

    Raises:
        UserError: if it is missing, damaged or of another kind.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"annotation file {str(path)!r} of data set {dataset!r} does not exist: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"annotation file {str(path)!r} of data set {dataset!r} is not valid JSON ({error})") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"annotation file {str(path)!r} of data set {dataset!r} has no list {key!r} as COCO's have")
    return content


def _by_id(images: Sequence[Mapping[str, Any]], path: str) -> dict[Any, Mapping[str, Any]]:
    table = {image["id"]: image for image in images}
    if len(table) != len(images):
        raise UserError(f"annotation file {path!r} lists an image id twice: give each image its own id")
    return table


def _contiguous(category_id: Any, contiguous: Mapping[int, int], metadata: Metadata, owner: str) -> int:
    if category_id not in contiguous:
        raise UserError(
            f"annotation file {metadata.annotation_file!r} has category_id {category_id!r} at {owner}, which is none "
            f"of the {metadata.num_classes} classes of data set {metadata.name!r}: correct the file or the class list"
        )
    return contiguous[category_id]


def _malformed(metadata: Metadata, error: Exception) -> UserError:
    return UserError(
        f"annotation file {metadata.annotation_file!r} of data set {metadata.name!r} lacks what COCO's format "
        f"requires ({type(error).__name__}: {error})"
    )


def panoptic_records(metadata: Metadata, image_root: Path, remedy: str) -> list[Record]:
    """Records of a COCO panoptic JSON (`metadata.annotation_file`) and its PNGs (`metadata.panoptic_root`).

    Raises:
        UserError: if a file or folder is missing, or the JSON is damaged or does not fit the classes.
    """
    path, png_root = str(metadata.annotation_file), Path(str(metadata.panoptic_root))
    content = read_json(path, ("images", "annotations"), metadata.name, remedy)
    for folder in (image_root, png_root):
        require_folder(folder, metadata.name, remedy)
    contiguous = metadata.contiguous_ids
    records: list[Record] = []
    try:
        images = _by_id(content["images"], path)
        for annotation in content["annotations"]:
            image = images[annotation["image_id"]]
            records.append(
                {
                    "file_name": str(inside(image_root, image["file_name"], path)),
                    "image_id": image["id"],
                    "height": int(image["height"]),
                    "width": int(image["width"]),
                    "pan_seg_file_name": str(inside(png_root, annotation["file_name"], path)),
                    "segments_info": _segments(annotation["segments_info"], image["id"], contiguous, metadata),
                }
            )
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(metadata, error) from error
    for field in ("file_name", "pan_seg_file_name"):
        require_files((r[field] for r in records), field, metadata.name, remedy)
    return records


def _segments(
    entries: Sequence[Mapping[str, Any]], image_id: Any, contiguous: Mapping[int, int], metadata: Metadata
) -> list[dict[str, Any]]:
    """The ``segments_info`` of one image with contiguous labels.

    Raises:
        UserError: if an id cannot stand in a PNG or stands for two segments, or a category is none of the classes.
    """
    segments: dict[int, dict[str, Any]] = {}
    for segment in entries:
        identity, owner = int(segment["id"]), f"segment {segment['id']} of image {image_id}"
        if identity in segments or not 1 <= identity <= _HIGHEST_ID:
            fault = "twice" if identity in segments else f"which is none of 1..{_HIGHEST_ID}, as 0 is void"
            raise UserError(
                f"annotation file {metadata.annotation_file!r} has the id {identity} in segments_info of image "
                f"{image_id!r}, {fault}: give each segment an id of its own, which its pixels in the PNG have"
            )
        segments[identity] = {
            "id": identity,
            "category_id": _contiguous(segment["category_id"], contiguous, metadata, owner),
            "isthing": metadata.things[contiguous[segment["category_id"]]],
            "iscrowd": int(segment.get("iscrowd", 0)),
            **{key: segment[key] for key in ("area", "bbox") if key in segment},
        }
    return list(segments.values())


def instance_records(metadata: Metadata, image_root: Path, remedy: str) -> list[Record]:
    """Records of a COCO instances JSON (`metadata.annotation_file`), ordered by image id; crowds included.

    Polygons of fewer than three points are left out, an annotation without any other mask too; they are counted.

    Raises:
        UserError: as `panoptic_records`.
    """
    path = str(metadata.annotation_file)
    content = read_json(path, ("images", "annotations"), metadata.name, remedy)
    require_folder(image_root, metadata.name, remedy)
    contiguous = metadata.contiguous_ids
    dropped = 0
    try:
        images = _by_id(content["images"], path)
        annotations: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in images}
        for annotation in content["annotations"]:
            segmentation = _usable(annotation["segmentation"])
            if segmentation is None:
                dropped += 1
                continue
            owner = f"annotation {annotation['id']}"
            annotations[annotation["image_id"]].append(
                {
                    "id": annotation["id"],
                    "category_id": _contiguous(annotation["category_id"], contiguous, metadata, owner),
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                    "segmentation": segmentation,
                    **{key: annotation[key] for key in ("area", "bbox") if key in annotation},
                }
            )
        records: list[Record] = [
            {
                "file_name": str(inside(image_root, images[image_id]["file_name"], path)),
                "image_id": image_id,
                "height": int(images[image_id]["height"]),
                "width": int(images[image_id]["width"]),
                "annotations": annotations[image_id],
            }
            for image_id in sorted(images)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(metadata, error) from error
    if dropped:
        logger.warning("%s: %d annotations have no polygon of three points and were left out", metadata.name, dropped)
    require_files((r["file_name"] for r in records), "file_name", metadata.name, remedy)
    return records


def _usable(segmentation: Any) -> Any:
    """The segmentation without polygons that enclose nothing; None if no other is left."""
    if not isinstance(segmentation, list):
        return segmentation
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
    return polygons or None

"""ADE20K's annotations and instance annotations → panoptic PNGs and COCO panoptic JSON.

Stuff classes first, one segment each, ascending; then one segment for each object, pasted over. Pixels of a thing class
that belong to no object become void. What a segment is stands also inside its PNG, so that each file is complete in
itself: a later run reads it from there, and the JSON is put together at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskformer.data import image_io
from maskformer.data.dataset import Color
from maskformer.data.datasets import ade20k
from maskformer.data.datasets.tables import ClassTable, read_table
from maskformer.data.preparation import ade20k as semantic
from maskformer.data.preparation import files, runner
from maskformer.data.preparation.ade20k import OFFICIAL, Item
from maskformer.data.preparation.command import build_parser, run_command
from maskformer.errors import UserError
from maskformer.writing import write_text

_KEY = "segments_info"
_DESCRIPTION = """\
ADE20K (150 classes), panoptic: writes ADEChallengeData2016/ade20k_panoptic_{train,val} and the JSON files beside
from annotations and annotations_instance, and annotations_detectron2, which mIoU is measured on."""


@dataclass(frozen=True)
class PanopticMaps:
    """Raw annotation and instance annotation → panoptic PNG.

    Attributes:
        table: classes of ADE20K.
        instances: folder of the split's instance annotations.
        as_published: state the areas and boxes of stuff as before objects are pasted over, and keep stuff that they
            cover entirely, as the published preparation does.
    """

    table: ClassTable
    instances: Path
    as_published: bool

    def finished(self, item: Item) -> dict[str, Any] | None:
        """The annotation inside a PNG that is whole and was made of this picture in the same way.

        Only this command writes such annotations, so what they were made from is not gone through again.
        """
        if not files.is_whole(item.target, image_io.image_size(item.image, "image"), "RGB"):
            return None
        try:
            kept = json.loads(files.read_texts(item.target)[_KEY])
            annotation: dict[str, Any] = kept["annotation"]
            own = kept["as_published"] is self.as_published and annotation["file_name"] == item.target.name
            listed = {0, *(segment["id"] for segment in annotation["segments_info"])}
        except (KeyError, TypeError, ValueError):
            return None
        return annotation if own and set(np.unique(image_io.read_panoptic_ids(item.target))) <= listed else None

    def make(self, item: Item) -> dict[str, Any]:
        """Writes the PNG and returns its entry of the JSON, with ``height`` and ``width`` besides."""
        raw = semantic.read_raw(item.image, item.raw)
        classes, objects = self._read_instances(item, raw.shape)
        ids, segments = panoptic_segments(raw, classes, objects, self.table, self.as_published, str(item.raw))
        annotation = {
            "image_id": item.image.stem,
            "file_name": item.target.name,
            "segments_info": segments,
            "height": int(raw.shape[0]),
            "width": int(raw.shape[1]),
        }
        colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
        text = json.dumps({"as_published": self.as_published, "annotation": annotation})
        files.write_label_map(colors, item.target, {_KEY: text})
        return annotation

    def _read_instances(self, item: Item, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(H, W) instance class 0..100 and (H, W) number of the object, 0 where there is none."""
        path = self.instances / f"{item.image.stem}.png"
        packed = image_io.read_panoptic_ids(path, "annotations_instance")
        image_io.check_size(packed.shape, size, path, "annotations_instance", f"annotation {str(item.raw)!r}")
        return packed & 255, packed >> 8 & 255


def panoptic_segments(
    raw: np.ndarray, classes: np.ndarray, objects: np.ndarray, table: ClassTable, as_published: bool, where: str
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Segments of one image.

    Args:
        raw: (H, W) 0 = other, 1..K.
        classes: (H, W) instance class: i is the i-th thing class in label order; 0 is none.
        objects: (H, W) number of the object, 0 is none.
        table: K classes.
        as_published: see `PanopticMaps`.
        where: named in errors.

    Returns:
        (H, W) int32 ids, 0 = void; and ``segments_info``.

    Raises:
        UserError: if an object has no class, or several.
    """
    things = [label for label, thing in enumerate(table.things) if thing]
    taken = {_id(color) for color, thing in zip(table.colors, table.things, strict=True) if not thing}
    ids = np.zeros(raw.shape, np.int32)
    found: list[tuple[int, int]] = []
    stuff: list[dict[str, Any]] = []
    for label in np.unique(raw[raw > 0]).tolist():
        if not table.things[label - 1]:
            identity = _id(table.colors[label - 1])
            ids[raw == label] = identity
            found.append((identity, label - 1))
    if as_published:
        stuff = [_segment(ids, *one) for one in found]
        found = []
    used: dict[int, int] = {}
    for number in np.unique(objects[objects > 0]).tolist():
        mask = objects == number
        kinds = np.unique(classes[mask])
        if len(kinds) != 1 or not 1 <= kinds[0] <= len(things):
            raise UserError(
                f"the instance annotation of {where!r} gives object {number} the classes {kinds.tolist()}, but an "
                f"object has one class of 1..{len(things)}: unpack annotations_instance again"
            )
        label = things[int(kinds[0]) - 1]
        identity, used[label] = _object_id(table.colors[label], used.get(label, 0), taken)
        ids[mask] = identity
        found.append((identity, label))
    visible = set(np.unique(ids).tolist())
    return ids, stuff + [_segment(ids, *one) for one in found if one[0] in visible]


def _id(color: Color) -> int:
    return color[0] + 256 * color[1] + 65536 * color[2]


def _object_id(color: Color, step: int, taken: set[int]) -> tuple[int, int]:
    """A free id whose colour is near that of the class, and the step to go on from; takes it."""
    while True:
        # Three periods without a common divisor: no offset comes again within 190,747 steps.
        offsets = (37 * step % 61 - 30, 23 * step % 59 - 29, 41 * step % 53 - 26) if step else (0, 0, 0)
        red, green, blue = (min(max(channel + offset, 0), 255) for channel, offset in zip(color, offsets, strict=True))
        identity = _id((red, green, blue))
        step += 1
        if identity not in taken and identity != 0:
            taken.add(identity)
            return identity, step


def _segment(ids: np.ndarray, identity: int, label: int) -> dict[str, Any]:
    mask = ids == identity
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "id": identity,
        "category_id": label,
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "iscrowd": 0,
    }


def _panoptic_json(annotations: Sequence[dict[str, Any]], items: Sequence[Item], table: ClassTable) -> str:
    images = [
        {"id": a["image_id"], "file_name": item.image.name, "height": a["height"], "width": a["width"]}
        for a, item in zip(annotations, items, strict=True)
    ]
    kept = [{key: a[key] for key in ("image_id", "file_name", "segments_info")} for a in annotations]
    categories = [
        {"id": label, "name": name, "isthing": int(thing), "color": list(color)}
        for label, (name, thing, color) in enumerate(zip(table.classes, table.things, table.colors, strict=True))
    ]
    return json.dumps({"images": images, "annotations": kept, "categories": categories})


def prepare(
    root: Path, splits: Sequence[str], *, workers: int, overwrite: bool = False, as_published: bool = False
) -> None:
    """Writes PNGs and JSON of these splits, and the label maps if they are not there.

    Args:
        root: folder of all data sets.
        splits: of ``train``, ``val``.
        workers: processes.
        overwrite: write also what is there.
        as_published: see `PanopticMaps`.

    Raises:
        UserError: if something is missing or damaged, or cannot be written.
    """
    own, table = root / ade20k.FOLDER, read_table(ade20k.TABLE)
    remedy = f"{ade20k.DOWNLOAD}, {ade20k.DOWNLOAD_INSTANCES}"
    for split in splits:
        files.require(own / "annotations_instance" / ade20k.FOLDERS[split], remedy)
    semantic.prepare(root, splits, workers=workers, overwrite=overwrite)
    for split in splits:
        name = f"ade20k_panoptic_{split}"
        items = semantic.pictures(own, split, name)
        step = PanopticMaps(table, own / "annotations_instance" / ade20k.FOLDERS[split], as_published)
        outcome = runner.run(step, items, what=f"PNGs of {name}", workers=workers, overwrite=overwrite)
        write_text(own / f"{name}.json", _panoptic_json(outcome.results, items, table))
        targets = [item.target for item in items]
        runner.verify(name, targets, outcome, official=OFFICIAL[split], kind="panoptic PNGs")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``datasets/prepare_ade20k_pan_seg.py``; returns its exit code."""
    parser = build_parser(_DESCRIPTION, list(OFFICIAL))
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="state areas of stuff as before objects are pasted over it, and keep stuff that they cover entirely, "
        "which counts as missed in PQ (default: what is visible)",
    )

    def work(arguments: argparse.Namespace) -> None:
        prepare(
            arguments.root,
            arguments.splits,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            as_published=arguments.as_published,
        )

    return run_command(parser, work, argv)

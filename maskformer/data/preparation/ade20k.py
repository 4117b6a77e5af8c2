"""ADE20K's raw annotations (0 = other, 1..150) → label maps (0..149, 255 = ignored)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskformer.data import image_io
from maskformer.data.datasets import ade20k
from maskformer.data.datasets.files import find_files, pair_files
from maskformer.data.preparation import files, runner
from maskformer.data.preparation.command import plain_command
from maskformer.errors import UserError

OFFICIAL = {"train": 20210, "val": 2000}
NUM_CLASSES = 150
_DESCRIPTION = """\
ADE20K (150 classes), semantic: writes ADEChallengeData2016/annotations_detectron2 from annotations."""


class Item(NamedTuple):
    """One picture."""

    image: Path
    raw: Path
    target: Path


@dataclass(frozen=True)
class LabelMaps:
    """Raw annotation → label map."""

    def finished(self, item: Item) -> bool | None:
        """True if the label map is what `make` writes."""
        return (item.target.is_file() and files.holds(item.target, _label_map(item))) or None

    def make(self, item: Item) -> bool:
        """Writes the label map."""
        files.write_label_map(_label_map(item), item.target)
        return True


def _label_map(item: Item) -> np.ndarray:
    return read_raw(item.image, item.raw) - np.uint8(1)  # 0 becomes 255


def read_raw(image: Path, path: Path) -> np.ndarray:
    """The (H, W) uint8 raw annotation of an image.

    Raises:
        UserError: if it is missing, damaged, of another size, or holds anything but 0..150.
    """
    raw = image_io.read_label_map(path, "annotation")
    files.check_same_size(image, raw.shape, path, "annotation")
    lowest, highest = int(raw.min(initial=0)), int(raw.max(initial=0))
    if lowest < 0 or highest > NUM_CLASSES:
        raise UserError(
            f"annotation {str(path)!r} holds {lowest if lowest < 0 else highest}, but ADE20K's raw annotations hold "
            f"0..{NUM_CLASSES}: unpack the download again"
        )
    return raw.astype(np.uint8)


def pictures(root: Path, split: str, target: str) -> list[Item]:
    """Every image of a split, of any type that is read later, with its raw annotation and the file to be made of it.

    Args:
        root: of ADEChallengeData2016.
        split: ``train`` or ``val``.
        target: folder below `root`.

    Raises:
        UserError: if a folder, an image or an annotation is missing, or two images have one name.
    """
    name = f"{root.name} ({split})"
    images = files.require(root / "images" / ade20k.FOLDERS[split], ade20k.DOWNLOAD)
    raw = files.require(root / "annotations" / ade20k.FOLDERS[split], ade20k.DOWNLOAD)
    found = find_files(images, "*", name, ade20k.DOWNLOAD)
    masks = find_files(raw, "*.png", name, ade20k.DOWNLOAD)
    records = pair_files(found, masks, name, str(images), str(raw), ade20k.DOWNLOAD, complete=True)
    return [
        Item(found[r["image_id"]], Path(r["sem_seg_file_name"]), root / target / f"{r['image_id']}.png")
        for r in records
    ]


def prepare(root: Path, splits: Sequence[str], *, workers: int, overwrite: bool = False) -> None:
    """Writes the label maps of these splits.

    Args:
        root: folder of all data sets.
        splits: of ``train``, ``val``.
        workers: processes.
        overwrite: write also what is there.

    Raises:
        UserError: if something is missing or damaged, or cannot be written.
    """
    for split in splits:
        name = f"ade20k_sem_seg_{split}"
        items = pictures(root / ade20k.FOLDER, split, f"annotations_detectron2/{ade20k.FOLDERS[split]}")
        outcome = runner.run(LabelMaps(), items, what=f"label maps of {name}", workers=workers, overwrite=overwrite)
        runner.verify(name, [item.target for item in items], outcome, official=OFFICIAL[split])


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``datasets/prepare_ade20k_sem_seg.py``; returns its exit code."""
    return plain_command(_DESCRIPTION, list(OFFICIAL), prepare, argv)

"""Cityscapes' label ids → the 19 classes that are trained (``labelTrainIds``), 255 = ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskformer.data import image_io
from maskformer.data.datasets import cityscapes
from maskformer.data.datasets.tables import read_rows
from maskformer.data.preparation import files, runner
from maskformer.data.preparation.command import plain_command
from maskformer.errors import UserError

OFFICIAL = {"train": 2975, "val": 500}
_KNOWN_IDS = {*range(34), 255}  # 255 is what 8 bits leave of -1, the license plate
_RAW, _TARGET = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
_DESCRIPTION = """\
Cityscapes (19 classes), semantic: writes *_gtFine_labelTrainIds.png beside every *_gtFine_labelIds.png of
cityscapes/gtFine."""


class Item(NamedTuple):
    """One picture."""

    raw: Path
    target: Path


@dataclass(frozen=True)
class TrainIds:
    """Label ids → train ids.

    Attributes:
        labels: (256,) uint8: id → label, 255 for those that are not trained.
    """

    labels: np.ndarray

    def finished(self, item: Item) -> bool | None:
        """True if the label map is what `make` writes."""
        return (item.target.is_file() and files.holds(item.target, self._label_map(item))) or None

    def make(self, item: Item) -> bool:
        """Writes the label map."""
        files.write_label_map(self._label_map(item), item.target)
        return True

    def _label_map(self, item: Item) -> np.ndarray:
        raw = image_io.read_label_map(item.raw, "label ids")
        unknown = sorted(set(np.unique(raw).tolist()) - _KNOWN_IDS)
        if unknown:
            raise UserError(
                f"label ids {str(item.raw)!r} hold {unknown[0]}, which is no id of Cityscapes (0..33): unpack the "
                "download again"
            )
        found: np.ndarray = self.labels[raw]
        return found


def label_table() -> np.ndarray:
    """(256,) uint8: id of Cityscapes → label."""
    table = np.full(256, cityscapes.IGNORE_LABEL, np.uint8)
    for row in read_rows(cityscapes.TABLE):
        table[row["id"]] = row["label"]
    return table


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
    step = TrainIds(label_table())
    for split in splits:
        folder = files.require(root / cityscapes.FOLDER / "gtFine" / split, cityscapes.DOWNLOAD)
        raw = [path for path in sorted(folder.glob(cityscapes.RAW_LABELS)) if not path.name.startswith(".")]
        if not raw:
            raise UserError(f"folder {str(folder)!r} has no <city>/*{_RAW}: {cityscapes.DOWNLOAD}")
        items = [Item(path, path.with_name(path.name.removesuffix(_RAW) + _TARGET)) for path in raw]
        name = f"cityscapes_fine_sem_seg_{split}"
        outcome = runner.run(step, items, what=f"label maps of {name}", workers=workers, overwrite=overwrite)
        runner.verify(name, [item.target for item in items], outcome, official=OFFICIAL[split])


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``datasets/prepare_cityscapes_sem_seg.py``; returns its exit code."""
    return plain_command(_DESCRIPTION, list(OFFICIAL), prepare, argv)

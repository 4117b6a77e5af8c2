"""What a data set is: `Metadata` (names, things, colours, ignore label) and `Dataset` (metadata and lazy records)."""

from __future__ import annotations

import colorsys
import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maskformer.errors import UserError

Record = dict[str, Any]
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Metadata:
    """What a data set's labels mean. K = number of classes; class i of every list is contiguous label i.

    Attributes:
        name: catalog name.
        classes: K names.
        things: K flags, true for countable objects.
        colors: K distinct (r, g, b), 0..255.
        ignore_label: value of unsupervised pixels in contiguous label maps, outside 0..K-1.
        evaluators: what the published protocol measures here, of ``sem_seg``, ``panoptic_seg``, ``instances``.
        dataset_ids: K ids that the data set's own files use (prediction files are written with them).
        truth: record fields that hold labels, of ``sem_seg``, ``pan_seg``, ``annotations``.
        raw_labels: (raw value, contiguous label or `ignore_label`) pairs of the label files; empty: values are
            contiguous labels already.
        remedy: what to do when a label file holds a value that means nothing.
        annotation_file: COCO JSON (panoptic or instances) the records come from, None where there is none.
        panoptic_root: folder of the truth's panoptic PNGs, None where there is none.
    """

    name: str
    classes: list[str]
    things: list[bool]
    colors: list[Color]
    ignore_label: int
    evaluators: tuple[str, ...]
    dataset_ids: list[int]
    truth: tuple[str, ...]
    raw_labels: tuple[tuple[int, int], ...] = ()
    remedy: str = "prepare the data set's label files again"
    annotation_file: str | None = None
    panoptic_root: str | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.classes), len(self.things), len(self.colors), len(self.dataset_ids)}
        if len(lengths) != 1:
            raise ValueError(f"classes, things, colors and dataset_ids of {self.name} differ in length: {lengths}")
        if 0 <= self.ignore_label < len(self.classes):
            raise ValueError(f"ignore label {self.ignore_label} of {self.name} is also a class")

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    @property
    def contiguous_ids(self) -> dict[int, int]:
        """Data set id → contiguous label."""
        return {dataset_id: label for label, dataset_id in enumerate(self.dataset_ids)}


class Dataset:
    """Metadata and records; the disk is touched when `records` is first read.

    Args:
        metadata: what the labels mean.
        list_records: makes the records and raises `UserError` for whatever is missing.
        uniform: every record has the size of the first one and at least one segment, so none needs looking at
            (data sets that are drawn on the fly).
    """

    def __init__(
        self, metadata: Metadata, list_records: Callable[[], Sequence[Record]], *, uniform: bool = False
    ) -> None:
        self.metadata = metadata
        self.uniform = uniform
        self._list_records = list_records

    @cached_property
    def records(self) -> Sequence[Record]:
        """The records: ``file_name, image_id, height, width`` and the fields named in ``metadata.truth``.

        Raises:
            UserError: if a file or folder is missing, or there is no record at all.
        """
        records = self._list_records()
        if len(records) == 0:
            raise UserError(f"data set {self.metadata.name!r} is empty: it lists no image")
        return records


def datasets_root() -> Path:
    """The folder under which the built-in data sets lie: ``$DETECTRON2_DATASETS``, else or if empty ``./datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as the end of a sentence."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(n) for n in close) + "?"
    return "known are " + ", ".join(sorted(names)) if names else "none is known"


def distinct_colors(count: int, taken: Sequence[Color] = ()) -> list[Color]:
    """`count` colours that differ from each other and from `taken`; the same at every call.

    Hues advance by the golden ratio, so that neighbours in the list are far apart.
    """
    used = set(taken)
    colors: list[Color] = []
    step = 0
    while len(colors) < count:
        hue = (0.02 + step * 0.6180339887) % 1.0
        saturation = (0.75, 0.95, 0.55)[step % 3]
        value = (0.95, 0.7, 0.85)[(step // 3) % 3]
        red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
        step += 1
        if (red, green, blue) not in used:
            used.add((red, green, blue))
            colors.append((red, green, blue))
    return colors

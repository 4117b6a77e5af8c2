"""Prediction files: JSON written as results come, RLE masks, and PNGs of segment ids."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from maskformer import distributed
from maskformer.data.image_io import read_panoptic_ids
from maskformer.errors import UserError

PARTIAL = ".partial"
"""Ends the names of files that are being written."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk or a folder without permission is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); free space or choose another OUTPUT_DIR"
        ) from error


@dataclass(frozen=True)
class Shard:
    """Items that one process has written for a file of all processes.

    Attributes:
        name: of its temporary file, in the folder of the final one.
        count: of items.
        size: in bytes.
    """

    name: str
    count: int
    size: int


class JsonStream:
    """A JSON list (or an object holding one) that grows on disk and gets its name only when it is complete.

    With several processes each writes its items to a shard of its own; the main process appends the others' to its own
    in the order of the ranks, so that the file is the one that a single process would have written.

    Args:
        path: of the finished file; its folder is made.
        list_key: None for a file that is a list; else the key of the list in an object.
    """

    def __init__(self, path: Path, list_key: str | None = None) -> None:
        self.path = path
        self.list_key = list_key
        self.count = 0
        self._committed = False
        self._temporary: Path | None = None
        self._file: TextIOWrapper | None = None

    def _open(self) -> tuple[TextIOWrapper, Path]:
        """The temporary file of this process, and its path."""
        if self._file is None and self._temporary is not None:
            self._file = self._temporary.open("a", encoding="utf-8")
        elif self._file is None or self._temporary is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rank = distributed.rank()
            temporary = self.path.with_name(f".{self.path.name}.{rank}.{os.getpid()}{PARTIAL}")
            self._file = temporary.open("w", encoding="utf-8")
            self._temporary = temporary
            if rank == 0:
                self._file.write("[" if self.list_key is None else f"{{{json.dumps(self.list_key)}: [")
        return self._file, self._temporary

    def write(self, item: Any) -> None:
        """Append an item to the list."""
        with _writing(self.path):
            self._open()[0].write(("," if self.count else "") + "\n" + json.dumps(item))
        self.count += 1

    def shard(self) -> Shard | None:
        """What this process has written, safely on disk; None if it is nothing."""
        if self._temporary is None:
            return None
        with _writing(self.path):
            self._close()
            return Shard(self._temporary.name, self.count, self._temporary.stat().st_size)

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with file:
                file.flush()
                os.fsync(file.fileno())

    def commit(self, others: Mapping[str, Any] | None = None, shards: Sequence[Shard] = ()) -> Path:
        """Finish the file and give it its name, in one step; for the main process.

        Args:
            others: further keys of the object (only with `list_key`).
            shards: of all processes, by rank; this one's own may be among them.

        Raises:
            UserError: if a shard is not there or the file cannot be written.
        """
        if self._committed:
            return self.path
        own = None if self._temporary is None else self._temporary.name
        parts = [(self.path.with_name(shard.name), shard) for shard in shards if shard.name != own]
        for path, shard in parts:
            self._check(path, shard)
        with _writing(self.path):
            file, temporary = self._open()
            for path, shard in parts:
                file.write("," if self.count else "")
                file.flush()
                with path.open("rb") as source:
                    shutil.copyfileobj(source, file.buffer)
                self.count += shard.count
            file.write("\n]")
            if self.list_key is not None:
                for key, value in (others or {}).items():
                    file.write(f",\n{json.dumps(key)}: {json.dumps(value)}")
                file.write("}")
            file.write("\n")
            self._close()
            temporary.replace(self.path)
            for path, _ in parts:
                path.unlink(missing_ok=True)
        self._temporary = None
        self._committed = True
        return self.path

    def _check(self, path: Path, shard: Shard) -> None:
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            found = "is not there" if size is None else f"has {size} bytes instead of {shard.size}"
            raise UserError(
                f"{path}, written by another process for {self.path.name}, {found} for the main process; "
                "OUTPUT_DIR must be on a file system that all machines share"
            )

    def discard(self) -> None:
        """Throw an unfinished file, or this process's part of it, away; a finished one stays."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None
            self.count = 0

    def remove_leftovers(self) -> None:
        """Remove what killed processes have left of this file; only while no process writes it."""
        remove_partials(self.path.parent, self.path.name)


def remove_partials(folder: Path, name: str) -> None:
    """Remove temporary files.

    Args:
        folder: where they are; need not exist.
        name: pattern of what their names would have been.
    """
    for path in folder.glob(f".{name}.*{PARTIAL}"):
        with _writing(path):
            path.unlink(missing_ok=True)


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """COCO RLE of each mask, ready for JSON.

    Args:
        masks: (M, H, W) bool.
    """
    if len(masks) == 0:
        return []
    runs = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": [int(n) for n in run["size"]], "counts": run["counts"].decode("ascii")} for run in runs]


def encode_label_map(label_map: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    """COCO RLE of each label's pixels, from the runs of the map itself: no mask is made.

    Args:
        label_map: (H, W) integers.

    Yields:
        Label and RLE, ascending by label.
    """
    flat = label_map.T.reshape(-1)  # COCO runs down the columns
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    ends = np.append(starts[1:], flat.size)
    run_labels = flat[starts]
    for label in np.unique(run_labels).tolist():
        own = run_labels == label
        # Borders between "not this label" and "this label", from the first pixel to the last.
        borders = np.stack([starts[own], ends[own]], axis=1).reshape(-1)
        end = [] if borders[-1] == flat.size else [flat.size]
        counts = np.diff(np.concatenate(([0], borders, end)))
        size = [int(n) for n in label_map.shape]
        run = coco_mask.frPyObjects({"size": size, "counts": counts.tolist()}, *size)
        yield label, {"size": size, "counts": run["counts"].decode("ascii")}


def decode_mask(segmentation: Mapping[str, Any]) -> np.ndarray:
    """(H, W) bool mask of a COCO RLE."""
    counts = segmentation["counts"]
    run = {"size": list(segmentation["size"]), "counts": counts.encode("ascii") if isinstance(counts, str) else counts}
    return coco_mask.decode(run).astype(bool)


def write_panoptic_png(ids: np.ndarray, path: Path) -> None:
    """Segment ids as a colour PNG, id = R + 256·G + 65536·B.

    Args:
        ids: (H, W) integers in [0, 2^24).
        path: written under a temporary name first; its folder is made.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= 2**24):
        raise ValueError(f"a panoptic PNG holds ids in [0, 2^24), not {ids.min()}..{ids.max()}")
    wide = ids.astype(np.uint32)
    colors = np.stack([wide & 255, wide >> 8 & 255, wide >> 16 & 255], axis=-1).astype(np.uint8)
    write_png(colors, path)


def read_panoptic_png(path: Path) -> np.ndarray:
    """(H, W) int32 segment ids of a panoptic PNG.

    Raises:
        UserError: if it is missing, damaged, or no RGB image.
    """
    return read_panoptic_ids(path, "prediction")


def write_png(colors: np.ndarray, path: Path) -> None:
    """(H, W, 3) uint8 RGB as a PNG that never exists half-written; its folder is made."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colors).save(temporary, format="PNG", compress_level=3)
        temporary.replace(path)

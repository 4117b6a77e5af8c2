"""Prediction files: JSON written as results come, RLE masks, and PNGs of segment ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from maskformer.errors import UserError


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk or a folder without permission is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); free space or choose another OUTPUT_DIR"
        ) from error


class JsonStream:
    """A JSON list (or an object holding one) that grows on disk and gets its name only when it is complete.

    Args:
        path: of the finished file; its folder is made.
        list_key: None for a file that is a list; else the key of the list in an object.
    """

    def __init__(self, path: Path, list_key: str | None = None) -> None:
        self.path = path
        self.list_key = list_key
        self.count = 0
        self._committed = False
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._file: IO[str] | None = None

    def _open(self) -> IO[str]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w", encoding="utf-8")
            self._file.write("[" if self.list_key is None else f"{{{json.dumps(self.list_key)}: [")
        return self._file

    def write(self, item: Any) -> None:
        """Append an item to the list."""
        with _writing(self.path):
            self._open().write(("," if self.count else "") + "\n" + json.dumps(item))
        self.count += 1

    def commit(self, others: Mapping[str, Any] | None = None) -> Path:
        """Finish the file and give it its name, in one step.

        Args:
            others: further keys of the object (only with `list_key`).
        """
        if self._committed:
            return self.path
        with _writing(self.path):
            file = self._open()
            file.write("\n]")
            if self.list_key is not None:
                for key, value in (others or {}).items():
                    file.write(f",\n{json.dumps(key)}: {json.dumps(value)}")
                file.write("}")
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._file = None
            self._temporary.replace(self.path)
        self._committed = True
        return self.path

    def discard(self) -> None:
        """Throw an unfinished file away; a finished one stays."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._temporary.unlink(missing_ok=True)


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
    """(H, W) int32 segment ids of a panoptic PNG."""
    with Image.open(path) as image:
        colors = np.asarray(image.convert("RGB"), dtype=np.int32)
    return colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]


def write_png(colors: np.ndarray, path: Path) -> None:
    """(H, W, 3) uint8 RGB as a PNG that never exists half-written; its folder is made."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colors).save(temporary, format="PNG", compress_level=3)
        temporary.replace(path)

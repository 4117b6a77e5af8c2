"""COCO-Stuff-10k v1.0: image lists → folders of images; MATLAB label maps (1 = unlabelled, 2..172) → PNGs (minus 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskformer.data.datasets import coco_stuff
from maskformer.data.preparation import files, runner
from maskformer.data.preparation.command import plain_command
from maskformer.errors import UserError

OFFICIAL = {"train": 9000, "test": 1000}
HIGHEST = 172  # 1 is unlabelled, 2..172 are the classes
_DESCRIPTION = """\
COCO-Stuff-10k v1.0 (171 classes), semantic: writes coco/coco_stuff_10k/images_detectron2 and annotations_detectron2
from images, annotations/*.mat and imageLists/*.txt."""


class Item(NamedTuple):
    """One picture."""

    image: Path
    raw: Path
    target_image: Path
    target: Path


@dataclass(frozen=True)
class Pictures:
    """Image and ``.mat`` → image in the folder of its split, and label map."""

    def finished(self, item: Item) -> bool | None:
        """True if both files are what `make` writes."""
        if not (item.target.is_file() and item.image.is_file()):
            return None
        same = files.is_copy(item.image, item.target_image)
        return (same and files.holds(item.target, _label_map(item))) or None

    def make(self, item: Item) -> bool:
        """Writes both files, the label map last."""
        label_map = _label_map(item)
        files.copy_file(item.image, item.target_image)
        files.write_label_map(label_map, item.target)
        return True


def _label_map(item: Item) -> np.ndarray:
    raw = read_matlab_labels(item.raw, item.image)
    lowest, highest = int(raw.min(initial=1)), int(raw.max(initial=1))
    if lowest < 1 or highest > HIGHEST:
        raise UserError(
            f"annotation {str(item.raw)!r} holds {lowest if lowest < 1 else highest}, but COCO-Stuff v1.0 holds "
            f"1..{HIGHEST} (1 = unlabelled): {coco_stuff.DOWNLOAD}"
        )
    return (raw.astype(np.int32) - 2).astype(np.uint8)  # -1 becomes 255


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise UserError(
            "reading COCO-Stuff's .mat files needs h5py, which is not installed: pip install h5py"
        ) from None
    return h5py


def read_matlab_labels(path: Path, image: Path) -> np.ndarray:
    """The (H, W) matrix ``S`` of a ``.mat`` file in MATLAB's HDF5 format, which stores it transposed.

    Nothing is read before type and size are known to be right, and nothing that lies outside of the file.

    Args:
        path: of the ``.mat`` file.
        image: that the matrix must have the size of.

    Raises:
        UserError: if a file is missing or damaged, or there is no such matrix of whole numbers of the image's size, or
            h5py is not installed.
    """
    h5py = _h5py()
    if not path.is_file():
        raise UserError(f"annotation {str(path)!r} does not exist: {coco_stuff.DOWNLOAD}")
    try:
        with h5py.File(path, "r") as file:
            matrix: Any = file["S"] if isinstance(file.get("S", getlink=True), h5py.HardLink) else None
            if not _is_matrix(matrix, h5py):
                raise _no_matrix(path)
            files.check_same_size(image, matrix.shape[::-1], path, "annotation")
            stored = np.asarray(matrix)
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"annotation {str(path)!r} cannot be read ({reason:.120}): {coco_stuff.DOWNLOAD}") from error
    if stored.dtype.kind == "f" and not (np.isfinite(stored).all() and np.array_equal(stored, np.trunc(stored))):
        raise _no_matrix(path)
    return stored.T


def _is_matrix(value: Any, h5py: Any) -> bool:
    """Whether this is a matrix of real numbers whose values lie in the file itself."""
    if not isinstance(value, h5py.Dataset) or value.ndim != 2 or value.dtype.kind not in "iuf":
        return False
    return not value.is_virtual and not value.external


def _no_matrix(path: Path) -> UserError:
    return UserError(
        f"annotation {str(path)!r} has no 'S' that is a matrix of whole numbers inside of the file: unpack it again"
    )


def pictures(own: Path, split: str) -> list[Item]:
    """Every picture that a list names.

    Raises:
        UserError: if the list or a folder is missing, or the list is empty.
    """
    for folder in ("images", "annotations", "imageLists"):
        files.require(own / folder, coco_stuff.DOWNLOAD)
    path = own / "imageLists" / f"{split}.txt"
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"list {str(path)!r} does not exist: {coco_stuff.DOWNLOAD}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"list {str(path)!r} cannot be read ({error}): unpack the download again") from error
    if not names or len(set(names)) != len(names) or any(Path(name).name != name for name in names):
        raise UserError(f"list {str(path)!r} is empty or names a file twice or by a path: unpack the download again")
    images, label_maps = own / "images_detectron2" / split, own / "annotations_detectron2" / split
    return [
        Item(
            image=own / "images" / f"{name}.jpg",
            raw=own / "annotations" / f"{name}.mat",
            target_image=images / f"{name}.jpg",
            target=label_maps / f"{name}.png",
        )
        for name in names
    ]


def prepare(root: Path, splits: Sequence[str], *, workers: int, overwrite: bool = False) -> None:
    """Writes images and label maps of these splits.

    Args:
        root: folder of all data sets.
        splits: of ``train``, ``test``.
        workers: processes.
        overwrite: write also what is there.

    Raises:
        UserError: if something is missing or damaged, or cannot be written.
    """
    _h5py()
    for split in splits:
        name, items = f"coco_2017_{split}_stuff_10k_sem_seg", pictures(root / coco_stuff.FOLDER, split)
        outcome = runner.run(Pictures(), items, what=f"pictures of {name}", workers=workers, overwrite=overwrite)
        official = OFFICIAL[split]
        runner.verify(name, [item.target_image for item in items], outcome, official=official, kind="images")
        runner.verify(name, [item.target for item in items], outcome, official=official)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``datasets/prepare_coco_stuff_10k_v1.0_sem_seg.py``; returns its exit code."""
    return plain_command(_DESCRIPTION, list(OFFICIAL), prepare, argv)

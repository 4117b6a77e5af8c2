"""ADE20K as it is published in full → images of at most 512 pixels (shorter side) and label maps of 847 classes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maskformer.data import image_io
from maskformer.data.datasets import ade20k_full
from maskformer.data.datasets.tables import read_rows
from maskformer.data.preparation import files, runner
from maskformer.data.preparation.command import plain_command
from maskformer.data.transforms import Geometry, Resize, shortest_edge_size
from maskformer.errors import UserError
from maskformer.pickles import CodeRefusedError, InertArray, RefusedError, load_pickle
from maskformer.writing import atomic_write

OFFICIAL = {"train": 25574, "val": 2000}
INDEX = "index_ade20k.pkl"
SHORTER_SIDE = 512
JPEG_QUALITY = 95
_NO_LIMIT = 2**31
_MOST_INDICES = 26 * 256
_DESCRIPTION = """\
ADE20K-Full (847 classes), semantic: writes ADE20K_2021_17_01/images_detectron2 and annotations_detectron2 from what
index_ade20k.pkl lists; pictures whose shorter side exceeds 512 pixels are shrunk to that."""


class Item(NamedTuple):
    """One picture."""

    image: Path
    raw: Path
    target_image: Path
    target: Path


@dataclass(frozen=True)
class ShrunkPictures:
    """Image and ``_seg.png`` → image and label map.

    Attributes:
        labels: (6656,) uint16: class index of the full data set → label, 65535 for those that are not used.
    """

    labels: np.ndarray

    def finished(self, item: Item) -> bool | None:
        """True if the label map is what `make` writes, and the image is too, or, if shrunk, whole and of its size."""
        if not item.target.is_file():
            return None
        original = image_io.image_size(item.image, "image")
        size = target_size(*original)
        if size == original:
            whole = files.is_copy(item.image, item.target_image)
        else:
            whole = files.is_whole(item.target_image, size, "RGB")
        return (whole and files.holds(item.target, self._label_map(item))) or None

    def make(self, item: Item) -> bool:
        """Writes both files, the label map last."""
        label_map = self._label_map(item)
        original, size = image_io.image_size(item.image, "image"), label_map.shape
        if size == original:
            files.copy_file(item.image, item.target_image)
        else:
            pixels = image_io.read_image(item.image, field="image")
            image = Geometry(original).then(Resize(*size)).apply_to_image(pixels)
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
            with atomic_write(item.target_image) as file:
                file.write(buffer.getvalue())
        files.write_label_map(label_map, item.target)
        return True

    def _label_map(self, item: Item) -> np.ndarray:
        """(H, W) uint16 of the size that the picture is shrunk to."""
        raw = _read_coded(item.raw)
        height, width = raw.shape[:2]
        files.check_same_size(item.image, (height, width), item.raw, "annotation")
        label_map: np.ndarray = self.labels[raw[..., 0].astype(np.int64) // 10 * 256 + raw[..., 1]]
        size = target_size(height, width)
        return label_map if size == (height, width) else _nearest(label_map, size)


def _read_coded(path: Path) -> np.ndarray:
    """The (H, W, 3) uint8 colours of a ``_seg.png``.

    Raises:
        UserError: if it is missing or damaged, or has no colours.
    """
    colors = image_io.read_image(path, "RGB", "annotation")
    with Image.open(path) as image:
        mode = image.mode
    if mode not in ("RGB", "P"):
        raise UserError(
            f"annotation {str(path)!r} has mode {mode}, but ADE20K's *_seg.png are RGB images with the class in red "
            "and green: unpack the download again"
        )
    return colors


def target_size(height: int, width: int) -> tuple[int, int]:
    """Height and width with a shorter side of at most 512."""
    if min(height, width) <= SHORTER_SIDE:
        return height, width
    return shortest_edge_size(height, width, SHORTER_SIDE, _NO_LIMIT)


def _nearest(label_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resampled by nearest, source index ⌊(i + ½)·in/out⌋."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(label_map.shape, size, strict=True)
    )
    return label_map[rows[:, None], columns]


def label_table() -> np.ndarray:
    """(6656,) uint16: class index of the full data set → label."""
    table = np.full(_MOST_INDICES, ade20k_full.IGNORE_LABEL, np.uint16)
    for row in read_rows(ade20k_full.TABLE):
        table[row["ade_index"]] = row["label"]
    return table


# ------------------------------------------------------------------ the index
def read_index(path: Path) -> list[tuple[str, str]]:
    """Folder and file name of every picture, as ``index_ade20k.pkl`` lists them; nothing in it is executed.

    Raises:
        UserError: if it is missing or damaged, asks for more than plain containers and numbers, or lists no files.
    """
    try:
        content = load_pickle(path, texts=True)
    except FileNotFoundError:
        raise UserError(f"file {str(path)!r} does not exist: {ade20k_full.DOWNLOAD}") from None
    except RefusedError as refusal:
        distrust = "do not trust it, and " if isinstance(refusal, CodeRefusedError) else ""
        raise UserError(
            f"file {str(path)!r} asks for {refusal}, but an index needs only lists and numbers: {distrust}unpack the "
            "official download again"
        ) from refusal
    except Exception as error:  # a damaged pickle can raise almost anything, and all of it means the same
        reason = " ".join(ascii(str(error)).split())
        raise UserError(f"file {str(path)!r} is damaged ({reason:.100}): unpack the download again") from error
    folders, names = (_strings(content, key, path) for key in ("folder", "filename"))
    if len(folders) != len(names) or not names:
        raise UserError(
            f"file {str(path)!r} lists {len(folders)} folders and {len(names)} file names: unpack the download again"
        )
    return list(zip(folders, names, strict=True))


def _strings(content: Any, key: str, path: Path) -> list[str]:
    values = content.get(key) if isinstance(content, Mapping) else None
    if isinstance(values, InertArray):
        with suppress(RefusedError, ValueError, TypeError):
            values = values.to_list()
    texts: list[Any] = [_plain(value) for value in values] if isinstance(values, (list, tuple)) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"file {str(path)!r} has no list {key!r} of names, as ADE20K's index has: unpack it again")
    return texts


def _plain(value: Any) -> Any:
    """The text that one of numpy's scalars holds; anything else as it is."""
    if isinstance(value, InertArray):
        with suppress(RefusedError, ValueError, TypeError):
            return value.to_numpy().item()
    return value


def _place(folder: str, name: str, path: Path) -> PurePosixPath:
    """Where a picture lies under the folder of all data sets, which it must not leave.

    Raises:
        UserError: if it would, or the folder is not one of the data set's.
    """
    place = PurePosixPath(folder.replace("\\", "/"))
    parts = place.parts
    forbidden = any(sign in folder + name for sign in (":", "\0")) or any(sign in name for sign in "/\\")
    if place.is_absolute() or ".." in parts or forbidden or name in ("", ".", ".."):
        raise UserError(
            f"file {str(path)!r} lists the picture {name!r:.200} in {folder!r:.200}, which lies outside of the data "
            "set: unpack the official download again"
        )
    if parts[:1] != (ade20k_full.FOLDER,):
        raise UserError(
            f"file {str(path)!r} lists the folder {folder!r:.200}, but the official index's folders begin with "
            f"'{ade20k_full.FOLDER}/': unpack the official download again"
        )
    return place


def split_of(folder: str, name: str) -> str:
    """``train`` or ``val``, as the second part of the file name says, else the folder.

    Raises:
        UserError: if neither says it.
    """
    token = [*name.split("_"), ""][1]
    parts = PurePosixPath(folder).parts
    for split, part in ade20k_full.FOLDERS.items():
        if token == split or (token not in ade20k_full.FOLDERS and part in parts):
            return split
    raise UserError(f"{INDEX} lists {folder}/{name}, which belongs to neither training nor validation")


def pictures(root: Path, splits: Sequence[str]) -> dict[str, list[Item]]:
    """Every picture of the index with the files to be made of it, by split.

    Raises:
        UserError: if the index cannot be used, or has two pictures of one name.
    """
    own = files.require(root / ade20k_full.FOLDER, ade20k_full.DOWNLOAD)
    items: dict[str, dict[str, Item]] = {split: {} for split in ade20k_full.FOLDERS}
    for folder, name in read_index(own / INDEX):
        place = _place(folder, name, own / INDEX)
        split, stem = split_of(str(place), name), PurePosixPath(name).stem
        if name in items[split]:
            raise UserError(f"file {str(own / INDEX)!r} lists two pictures of the name {name!r}: unpack it again")
        part = ade20k_full.FOLDERS[split]
        items[split][name] = Item(
            image=root / place / name,
            raw=root / place / f"{stem}_seg.png",
            target_image=own / "images_detectron2" / part / name,
            target=own / "annotations_detectron2" / part / f"{stem}.tif",
        )
    return {split: list(items[split].values()) for split in splits}


def prepare(root: Path, splits: Sequence[str], *, workers: int, overwrite: bool = False) -> None:
    """Writes images and label maps of these splits.

    Args:
        root: folder of all data sets.
        splits: of ``train``, ``val``.
        workers: processes.
        overwrite: write also what is there.

    Raises:
        UserError: if something is missing or damaged, or cannot be written.
    """
    step = ShrunkPictures(label_table())
    for split, items in pictures(root, splits).items():
        name = f"ade20k_full_sem_seg_{split}"
        if not items:
            raise UserError(f"{INDEX} under {str(root)!r} lists no picture of {split}: leave it out with --splits")
        outcome = runner.run(step, items, what=f"pictures of {name}", workers=workers, overwrite=overwrite)
        official = OFFICIAL[split]
        runner.verify(name, [item.target_image for item in items], outcome, official=official, kind="images")
        runner.verify(name, [item.target for item in items], outcome, official=official)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``datasets/prepare_ade20k_full_sem_seg.py``; returns its exit code."""
    return plain_command(_DESCRIPTION, list(OFFICIAL), prepare, argv)

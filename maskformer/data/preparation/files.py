"""Reading and writing the files of a preparation."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from maskformer.data import image_io
from maskformer.errors import UserError
from maskformer.writing import atomic_write


def require(folder: Path, remedy: str) -> Path:
    """Refuses a missing folder.

    Raises:
        UserError: naming it and the remedy.
    """
    if not folder.is_dir():
        raise UserError(f"folder {str(folder)!r} does not exist: {remedy}")
    return folder


def is_whole(path: Path, size: tuple[int, int], mode: str) -> bool:
    """Whether a file is an image that can be decoded to the end.

    Args:
        path: may be missing.
        size: (H, W) that it must have.
        mode: that it must have, as Pillow calls it.
    """
    return _whole_image(path, size, mode) is not None


def holds(path: Path, labels: np.ndarray) -> bool:
    """Whether a file is what `write_label_map` writes for these labels, (H, W) uint8 or uint16."""
    image = _whole_image(path, labels.shape, Image.fromarray(labels[:1, :1]).mode)
    return image is not None and np.array_equal(np.asarray(image), labels)


def _whole_image(path: Path, size: tuple[int, ...], mode: str) -> Image.Image | None:
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of a PNG to its very end, which decoding does not ask for
        with Image.open(path) as image:
            if image.size != (size[1], size[0]) or image.mode != mode:
                return None
            image.load()
            return image
    except Exception:  # whatever a damaged file leads to: it is made again
        return None


def write_label_map(labels: np.ndarray, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes an image of numbers that never exists half-written; its folder is made.

    Args:
        labels: (H, W) uint8 or uint16, or (H, W, 3) uint8.
        path: ``.png`` or ``.tif``.
        texts: kept inside the PNG, key → value.

    Raises:
        UserError: if it cannot be written.
    """
    image = Image.fromarray(np.ascontiguousarray(labels))
    with atomic_write(path) as file:
        if path.suffix == ".tif":
            image.save(file, format="TIFF", compression="tiff_lzw")
            return
        info = PngInfo()
        for key, value in (texts or {}).items():
            info.add_text(key, value, zip=True)
        image.save(file, format="PNG", pnginfo=info)


def read_texts(path: Path) -> dict[str, str]:
    """The texts inside a PNG."""
    with Image.open(path) as image:
        image.load()
        return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}


def is_copy(source: Path, target: Path) -> bool:
    """Whether a target is there and has the source's content."""
    return target.is_file() and (target.samefile(source) or filecmp.cmp(source, target, shallow=False))


def copy_file(source: Path, target: Path) -> None:
    """The same content under another name: a hard link where the disk has them, which takes no space, else a copy.

    Raises:
        UserError: if the source cannot be read or the target not be written.
    """
    if not source.is_file():
        raise UserError(f"file {str(source)!r} does not exist: unpack the download again")
    linked = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source.resolve(), linked)  # of a symbolic link it would be the link, which leads nowhere from there
        linked.replace(target)
        linked.unlink(missing_ok=True)  # renaming one link to a file onto another does nothing
        return
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UserError(f"file {str(source)!r} cannot be read ({error.strerror}): unpack the download again") from error
    with atomic_write(target) as file:
        file.write(content)


def check_same_size(image: Path, label_size: tuple[int, ...], label: Path, field: str) -> None:
    """Refuses labels of another size than their image.

    Raises:
        UserError: naming both.
    """
    size = image_io.image_size(image, "image")
    image_io.check_size(label_size, size, label, field, f"image {str(image)!r}", image)

"""Reading pixels: images, label maps, panoptic ids, RLE and polygon masks. Bad files become one-sentence errors.

Names that begin with ``shapes://`` are drawn instead of read (`maskformer.data.datasets.shapes`), so records of that
data set are ordinary records.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from maskformer.data.datasets import shapes
from maskformer.data.rle import check_runs
from maskformer.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
IMAGE_FORMATS = ("RGB", "BGR")

# What PIL raises on damaged files, all of it from calls on the file alone.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError),
    *(struct.error, Image.DecompressionBombError),
)
_LABEL_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16B", "I;16L"})
_ORIENTATION = 0x0112
_PNG_EXIF = frozenset({"exif", "Raw profile type exif"})
_FARTHEST = 2**20
"""Pixels from the origin: pycocotools walks along a polygon's edges, and takes memory for every step."""


def _cannot_read(path: str | Path, field: str, why: object) -> UserError:
    reason = " ".join(str(why).split()) or type(why).__name__
    return UserError(f"{field} {str(path)!r} cannot be read ({reason}): replace or re-encode the file")


def _open(path: str | Path, field: str) -> Image.Image:
    """Opens a file and reads its header only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{field} {str(path)!r} does not exist: check the path and the data set's root") from None
    except UnidentifiedImageError as error:
        reason = "it is empty" if Path(path).stat().st_size == 0 else "it is in no known image format"
        raise _cannot_read(path, field, reason) from error
    except _DECODING_ERRORS as error:
        raise _cannot_read(path, field, _plain(error, path)) from error


def _plain(error: Exception, path: str | Path) -> str:
    """The error without the file's name, which the sentence has already."""
    return str(error).replace(f"'{path}'", "it").replace(str(path), "it") or type(error).__name__


def _load(image: Image.Image, path: str | Path, field: str) -> Image.Image:
    """Decodes the pixels and turns them as the EXIF orientation says."""
    try:
        image.load()
        return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    except _DECODING_ERRORS as error:
        raise _cannot_read(path, field, _plain(error, path)) from error


def _is_turned(image: Image.Image, path: str | Path, field: str) -> bool:
    """Whether the EXIF orientation exchanges height and width."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except _DECODING_ERRORS as error:
        raise _cannot_read(path, field, _plain(error, path)) from error


def image_size(path: str | Path, field: str = "file_name") -> tuple[int, int]:
    """Height and width after EXIF orientation; only the header is read.

    Raises:
        UserError: if the file is missing or not an image.
    """
    if str(path).startswith(shapes.SCHEME):
        return shapes.SIZE, shapes.SIZE
    with _open(path, field) as image:
        width, height = image.size
        if isinstance(image, PngImageFile) and not _PNG_EXIF & image.info.keys():
            return height, width  # PIL would decode the whole file in search of more
        turned = _is_turned(image, path, field)
    return (width, height) if turned else (height, width)


def read_image(path: str | Path, image_format: str = "RGB", field: str = "file_name") -> np.ndarray:
    """Reads a colour image; palette, grey, CMYK and transparent images are converted, transparency is dropped.

    Args:
        path: file, or ``shapes://`` name.
        image_format: ``RGB`` or ``BGR``, the order of the channels.
        field: what the file is to the user, named in errors.

    Returns:
        (H, W, 3) uint8, turned as the EXIF orientation says; perhaps read-only.

    Raises:
        UserError: if the file is missing, damaged, or has one channel of more than 8 bits.
    """
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"INPUT.FORMAT is {image_format!r}, but images can only be read as RGB or BGR")
    if str(path).startswith(shapes.SCHEME):
        pixels = shapes.read(str(path))
    else:
        with _open(path, field) as opened:
            if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
                raise UserError(
                    f"{field} {str(path)!r} is a grey image of more than 8 bits (mode {opened.mode}): "
                    "convert it to 8-bit grey or RGB, so that you decide how its range is scaled"
                )
            loaded = _load(opened, path, field)
            try:
                pixels = np.asarray(loaded if loaded.mode == "RGB" else loaded.convert("RGB"))
            except _DECODING_ERRORS as error:
                raise _cannot_read(path, field, _plain(error, path)) from error
    return pixels if image_format == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


def read_label_map(path: str | Path, field: str = "sem_seg_file_name") -> np.ndarray:
    """Reads a label file of one channel (PNG, TIF; 1 to 16 or 32 bits); a palette image gives its indices.

    Returns:
        (H, W) integer values as stored in the file (uint8, uint16 or int32).

    Raises:
        UserError: if the file is missing, damaged, or has several channels, or is a JPEG.
    """
    if str(path).startswith(shapes.SCHEME):
        return shapes.read(str(path))
    with _open(path, field) as opened:
        if opened.mode not in _LABEL_MODES:
            raise UserError(
                f"{field} {str(path)!r} has mode {opened.mode}, but a label map has one channel of whole numbers: "
                "save class ids as 8- or 16-bit grey PNG"
            )
        if opened.format == "JPEG":
            raise UserError(f"{field} {str(path)!r} is a JPEG, which does not keep class ids exactly: save it as PNG")
        scale = _grey_scale(opened)
        labels = np.asarray(_load(opened, path, field))
    if labels.dtype == np.bool_:
        return labels.astype(np.uint8)
    if labels.dtype.byteorder == ">":
        labels = labels.astype(labels.dtype.newbyteorder("="))
    return labels // np.uint8(scale) if scale != 1 else labels


def _grey_scale(image: Image.Image) -> int:
    """The factor by which PIL stretches grey PNGs of 2 and 4 bits to 0..255."""
    if isinstance(image, PngImageFile) and image.mode == "L" and image.tile:
        return {"L;2": 85, "L;4": 17}.get(str(image.tile[0][3]), 1)
    return 1


def read_panoptic_ids(path: str | Path, field: str = "pan_seg_file_name") -> np.ndarray:
    """Reads a panoptic PNG: id = R + 256·G + 65536·B, 0 is void.

    Returns:
        (H, W) int32 ids.

    Raises:
        UserError: if the file is missing, damaged, or not an RGB image of 8 bits.
    """
    if str(path).startswith(shapes.SCHEME):
        return shapes.read(str(path))
    with _open(path, field) as opened:
        if opened.mode != "RGB":
            raise UserError(
                f"{field} {str(path)!r} has mode {opened.mode}, but panoptic ids are stored in an RGB PNG as "
                "R + 256*G + 65536*B: convert the file"
            )
        loaded = _load(opened, path, field)
    # Four bytes a pixel are one little-endian number as they stand; the fourth is only filling.
    packed = np.frombuffer(loaded.tobytes("raw", "RGBX"), dtype="<i4")
    ids: np.ndarray = (packed & 0xFFFFFF).astype(np.int32, copy=False).reshape(loaded.height, loaded.width)
    return ids


def check_size(
    found: tuple[int, ...],
    expected: tuple[int, ...],
    path: str | Path,
    field: str,
    of: str,
    image: str | Path | None = None,
) -> None:
    """Refuses a file whose (H, W) is not the expected one.

    Args:
        found: (H, W) of the file.
        expected: (H, W) that it should have.
        path: of the file.
        field: what the file is to the user.
        of: what has the expected size.
        image: whose EXIF orientation may explain the difference.

    Raises:
        UserError: naming the file and both sizes.
    """
    if tuple(found) == tuple(expected):
        return
    remedy = "make the sizes equal"
    if image is not None and tuple(found) == tuple(expected)[::-1]:
        with _open(image, "image") as opened:
            if _is_turned(opened, image, "image"):
                remedy = (
                    "the image carries an EXIF orientation, by which it is turned, that its annotation does not share, "
                    "so remove the orientation from its EXIF data, or turn the annotation too"
                )
    raise UserError(
        f"{field} {str(path)!r} is {found[1]}x{found[0]} pixels (width x height) but {of} is "
        f"{expected[1]}x{expected[0]}: {remedy}"
    )


def segmentation_to_rle(segmentation: Any, height: int, width: int, where: str) -> dict[str, Any]:
    """One COCO ``segmentation`` (polygons, uncompressed or compressed RLE) as compressed RLE.

    Args:
        segmentation: list of polygons (x, y, x, y, …), or a dict with ``size`` and ``counts``.
        height: of the image.
        width: of the image.
        where: what is encoded, named in errors.

    Returns:
        ``size`` and ``counts`` as pycocotools takes them.

    Raises:
        UserError: if it is none of these, or was made for another size or number of pixels.
    """
    from pycocotools import mask as coco_mask

    try:
        if not isinstance(segmentation, Mapping):
            rle: Any = coco_mask.merge(coco_mask.frPyObjects([_polygon(p) for p in segmentation], height, width))
            return dict(rle)
        if list(segmentation["size"]) != [height, width]:
            raise UserError(
                f"{where} has an RLE mask of size {list(segmentation['size'])} (height, width) but the image is "
                f"[{height}, {width}]: make the mask anew for this image"
            )
        counts = segmentation["counts"]
        check_runs(counts, height * width)
        rle = {"size": [height, width], "counts": counts}
        return rle if isinstance(counts, (str, bytes)) else dict(coco_mask.frPyObjects(rle, height, width))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{where} has a segmentation that is neither polygons nor RLE ({error}): correct it") from error


def _polygon(points: Any) -> list[float]:
    """The numbers of one polygon, as pycocotools takes them: four it would take for a box."""
    numbers = np.asarray(points, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size < 6 or numbers.size % 2:
        raise ValueError(f"a polygon of {numbers.size} numbers; it needs x and y of three points or more")
    if not np.abs(numbers).max() <= _FARTHEST:
        raise ValueError("a polygon with points that are far from every image")
    polygon: list[float] = numbers.tolist()
    return polygon


def decode_segmentation(segmentation: Any, height: int, width: int, where: str) -> np.ndarray:
    """Decodes one COCO ``segmentation``; arguments and errors as `segmentation_to_rle`.

    Returns:
        (H, W) bool.
    """
    from pycocotools import mask as coco_mask

    decoded: np.ndarray = coco_mask.decode(segmentation_to_rle(segmentation, height, width, where))
    return decoded.astype(bool)

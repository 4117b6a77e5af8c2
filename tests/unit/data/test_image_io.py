from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskformer.data.image_io import (
    check_size,
    decode_segmentation,
    image_size,
    read_image,
    read_label_map,
    read_panoptic_ids,
)
from maskformer.errors import UserError

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10


def grey_png(path: Path, values: list[list[int]], bits: int) -> None:
    """Writes a grey PNG of few bits a pixel, which PIL itself cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b""
    for row in values:
        packed = "".join(f"{v:0{bits}b}" for v in row)
        packed += "0" * (-len(packed) % 8)
        rows += b"\0" + int(packed, 2).to_bytes(len(packed) // 8, "big")
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def one_sentence(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# ------------------------------------------------------------------ images
def test_channel_order(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), PIXELS)
    assert np.array_equal(read_image(tmp_path / "a.png", "BGR"), PIXELS[..., ::-1])


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, turn: int) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    expected = np.rot90(pixels, turn)
    found = read_image(tmp_path / "a.jpg")
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() < 40
    assert image_size(tmp_path / "a.jpg") == expected.shape[:2]


def test_exif_orientation_is_applied_to_labels(tmp_path: Path) -> None:
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(labels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_label_map(tmp_path / "a.png"), np.rot90(labels, 3))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode).save(path)
    found = read_image(path)
    assert found.shape == (3, 4, 3)
    assert found.dtype == np.uint8
    assert (found == 255).all()


def test_palette_image_gives_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_16_bit_grey_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 4), 1000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        read_image(tmp_path / "a.png")
    one_sentence(error, "a.png", "8-bit")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError) as error:
        read_image(path)
    one_sentence(error, "file_name", f"cut.{suffix}", "cannot be read", "re-encode")
    assert str(error.value).count(str(path)) == 1


def test_damaged_content(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_label_map(path)
    one_sentence(error, "sem_seg_file_name", "a.png", "cannot be read")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for read in (read_image, image_size, read_label_map, read_panoptic_ids):
        with pytest.raises(UserError) as error:
            read(tmp_path / "no.png")  # type: ignore[operator]
        one_sentence(error, "no.png", "does not exist")
        with pytest.raises(UserError):
            read(tmp_path)  # type: ignore[operator]


@pytest.mark.parametrize(("content", "reason"), [("hello", "it is in no known image format"), ("", "it is empty")])
def test_what_is_no_image(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        image_size(path)
    assert str(error.value) == f"file_name {str(path)!r} cannot be read ({reason}): replace or re-encode the file"


def test_unknown_format() -> None:
    with pytest.raises(UserError, match=r"INPUT\.FORMAT is 'L'"):
        read_image("shapes://val/image/000000.png", "L")


# ------------------------------------------------------------------ label maps
@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint8), ("a.png", np.uint16), ("a.tif", np.uint16)])
def test_label_values_are_kept(tmp_path: Path, name: str, dtype: type) -> None:
    labels = np.array([[0, 1, 2], [3, 200, np.iinfo(dtype).max]], dtype)
    Image.fromarray(labels).save(tmp_path / name)
    assert np.array_equal(read_label_map(tmp_path / name), labels)


def test_palette_labels_give_indices(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).convert("P")
    image.putpalette([i % 256 for i in range(300, 300 + 768)])
    image.save(tmp_path / "a.png")
    assert read_label_map(tmp_path / "a.png").tolist() == [[0, 1, 2, 255]]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_labels_of_few_bits_are_not_stretched(tmp_path: Path, bits: int) -> None:
    values = [[0, 1, 2**bits - 1], [2**bits - 1, 0, 1]]
    grey_png(tmp_path / "a.png", values, bits)
    found = read_label_map(tmp_path / "a.png")
    assert found.tolist() == values
    assert found.dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_labels_of_several_channels_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 3)).save(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        read_label_map(tmp_path / "a.png")
    one_sentence(error, "a.png", f"mode {mode}", "one channel")


def test_jpeg_labels_are_refused(tmp_path: Path) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="JPEG"):
        read_label_map(tmp_path / "a.jpg")


# ------------------------------------------------------------------ panoptic ids
def test_panoptic_ids_by_hand(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [7, 5, 3], [255, 255, 255]]], np.uint8)).save(
        tmp_path / "a.png"
    )
    ids = read_panoptic_ids(tmp_path / "a.png")
    assert ids.tolist() == [[1, 256, 65536, 7 + 5 * 256 + 3 * 65536, 2**24 - 1]]
    assert ids.dtype == np.int32


def test_panoptic_ids_need_three_channels(tmp_path: Path) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        read_panoptic_ids(tmp_path / "a.png")
    one_sentence(error, "pan_seg_file_name", "a.png", "mode L")


# ------------------------------------------------------------------ masks
def test_polygon_and_both_kinds_of_rle_agree() -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:5] = 1
    compressed = coco_mask.encode(np.asfortranarray(mask))
    # Columns first: 13 zeros (two columns and a row), 3 ones, ...
    uncompressed = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 20]}
    polygon = [[2, 1, 5, 1, 5, 4, 2, 4]]
    as_text = {"size": [6, 8], "counts": compressed["counts"].decode()}
    for segmentation in (compressed, uncompressed, polygon, as_text):
        found = decode_segmentation(segmentation, 6, 8, "x")
        assert found.dtype == bool
        assert np.array_equal(found, mask.astype(bool))


@pytest.mark.parametrize("bad", [{"counts": [1]}, [[1, "a"]], 5, [5], {"size": [6, 8], "counts": None}])
def test_bad_segmentation(bad: object) -> None:
    with pytest.raises(UserError) as error:
        decode_segmentation(bad, 6, 8, "annotation 3 of image 'a.jpg'")
    one_sentence(error, "annotation 3 of image 'a.jpg'")


# 62 x 173: a run of 10726 pixels. What each of these does to pycocotools depends on its version: a traceback, a mask of
# other pixels, or reading beyond its memory.
@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ("zzzz", "characters that compressed RLE does not have"),
        ("a b", "characters that compressed RLE does not have"),
        ("oooooooo0", "numbers that no mask has"),
        ("oo", "cut short"),
        ("", "0 pixels, but the image has 10726"),
        ([], "0 pixels, but the image has 10726"),
        ([10**9], "a run of 1000000000 pixels in an image of 10726"),
        ([0, 10**9], "a run of 1000000000 pixels"),
        ([-5, 10], "a run of -5 pixels"),
        ([10**30], "no whole numbers"),
        ([10726.5], "no whole numbers"),
        ([float("inf")], "no whole numbers"),
        ([True, False], "no whole numbers"),
        ([[10726]], "no whole numbers"),
        ([10725], "10725 pixels, but the image has 10726"),
        ([10000, 727], "10727 pixels, but the image has 10726"),
    ],
)
def test_run_lengths_that_are_those_of_no_mask(counts: object, words: str) -> None:
    with pytest.raises(UserError) as error:
        decode_segmentation({"size": [62, 173], "counts": counts}, 62, 173, "p.json: the prediction of image 3")
    one_sentence(error, "p.json: the prediction of image 3", words)


def test_a_compressed_string_that_is_cut_short_anywhere() -> None:
    mask = np.random.default_rng(0).random((62, 173)) < 0.02
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert np.array_equal(decode_segmentation({"size": [62, 173], "counts": counts}, 62, 173, "x"), mask)
    for end in range(len(counts)):
        with pytest.raises(UserError, match="its counts"):
            decode_segmentation({"size": [62, 173], "counts": counts[:end]}, 62, 173, "x")


@pytest.mark.parametrize(
    ("polygon", "words"),
    [
        ([1, 2], "a polygon of 2 numbers"),
        ([1, 2, 3, 4], "a polygon of 4 numbers"),  # a box to pycocotools
        ([1, 2, 3, 4, 5, 6, 7], "a polygon of 7 numbers"),
        ([1, 2, 3, 4, 5, float("nan")], "far from every image"),
        ([1, 2, 3, 4, 5, 1e12], "far from every image"),
    ],
)
def test_polygons_that_enclose_nothing(polygon: list[float], words: str) -> None:
    for segmentation in ([polygon], [[1, 1, 5, 1, 5, 4], polygon]):
        with pytest.raises(UserError) as error:
            decode_segmentation(segmentation, 6, 8, "annotation 3")
        one_sentence(error, "annotation 3", words)


def test_rle_of_another_size() -> None:
    with pytest.raises(UserError, match=r"size \[6, 9\]"):
        decode_segmentation({"size": [6, 9], "counts": [54]}, 6, 8, "annotation 3")


def test_check_size() -> None:
    check_size((3, 4), (3, 4), "a.png", "file_name", "b")
    with pytest.raises(UserError) as error:
        check_size((3, 4), (4, 3), "a.png", "sem_seg_file_name", "image 'a.jpg'")
    one_sentence(error, "'a.png' is 4x3 pixels", "image 'a.jpg' is 3x4")

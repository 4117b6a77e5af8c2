"""ADE20K: label maps and panoptic truth, compared with what was worked out by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer.data import get_dataset
from maskformer.data.preparation import ade20k, ade20k_panoptic, files
from maskformer.data.recipes import TestRecipe
from maskformer.errors import UserError

Save, Read = Callable[..., Path], Callable[[Path], Any]

# Raw values: 1 wall, 2 building (stuff); 8 bed, 13 person (the 1st and the 4th thing class).
RAW = [
    [1, 1, 1, 13, 13, 0],
    [1, 1, 1, 13, 13, 0],
    [2, 8, 8, 13, 13, 0],
    [2, 8, 8, 1, 1, 150],
]
# Two persons, one reaching over the wall; a bed that covers the building; the bed of RAW belongs to no object.
KINDS = [
    [0, 0, 4, 4, 4, 0],
    [0, 0, 4, 4, 4, 0],
    [1, 0, 0, 4, 0, 0],
    [1, 0, 0, 0, 0, 0],
]
OBJECTS = [
    [0, 0, 7, 7, 9, 0],
    [0, 0, 7, 7, 9, 0],
    [2, 0, 0, 7, 0, 0],
    [2, 0, 0, 0, 0, 0],
]
WALL, BUILDING = 120 + 256 * 120 + 65536 * 120, 180 + 256 * 120 + 65536 * 120


@pytest.fixture
def write(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Lays the picture out as downloaded; returns the folder of ADE20K."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def lay_out(raw: Any = RAW, kinds: Any = KINDS, objects: Any = OBJECTS, stem: str = "ADE_val_00000001") -> Path:
        own = tmp_path / "ADEChallengeData2016"
        raw, kinds, objects = np.array(raw), np.array(kinds), np.array(objects)
        save(np.zeros((*raw.shape, 3)), own / "images" / "validation" / f"{stem}.jpg")
        save(raw, own / "annotations" / "validation" / f"{stem}.png")
        packed = np.stack([kinds, objects, np.zeros_like(kinds)], axis=-1)
        save(packed, own / "annotations_instance" / "validation" / f"{stem}.png")
        return own

    return lay_out


def prepare(root: Path, **options: Any) -> None:
    ade20k_panoptic.prepare(root, ["val"], workers=1, **options)


def annotation(own: Path) -> dict[str, Any]:
    (entry,) = json.loads((own / "ade20k_panoptic_val.json").read_text())["annotations"]
    return dict(entry)


def ids_of(own: Path, read: Read) -> np.ndarray:
    pixels = np.array(read(own / "ade20k_panoptic_val" / "ADE_val_00000001.png"))
    return pixels @ np.array([1, 256, 65536])


# ------------------------------------------------------------------ semantic
def test_label_maps(write: Callable[..., Path], tmp_path: Path, read: Read) -> None:
    own = write()
    ade20k.prepare(tmp_path, ["val"], workers=1)
    assert read(own / "annotations_detectron2" / "validation" / "ADE_val_00000001.png") == [
        [0, 0, 0, 12, 12, 255],
        [0, 0, 0, 12, 12, 255],
        [1, 7, 7, 12, 12, 255],
        [1, 7, 7, 0, 0, 149],
    ]
    dataset = get_dataset("ade20k_sem_seg_val")
    sample = TestRecipe(dataset.metadata, "RGB", 0, 0)(dataset.records[0])
    assert sample["sem_seg"].unique().tolist() == [0, 1, 7, 12, 149, 255]


def test_other_values_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    write(raw=np.array(RAW) + 1)
    with pytest.raises(UserError, match=r"ADE_val_00000001.png' holds 151, but .* 0..150"):
        ade20k.prepare(tmp_path, ["val"], workers=1)


def test_numbers_below_0_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write() / "annotations" / "validation" / "ADE_val_00000001.png"
    Image.fromarray(np.array(RAW, np.int32) - 1).save(path, format="TIFF")
    with pytest.raises(UserError, match=r"ADE_val_00000001.png' holds -1, but .* 0..150"):
        ade20k.prepare(tmp_path, ["val"], workers=1)


@pytest.mark.parametrize("kind", ["raw", "mode", "size"])
def test_another_file_in_the_place_of_ours_is_made_again(
    write: Callable[..., Path], tmp_path: Path, save: Save, read: Read, caplog: Any, kind: str
) -> None:
    """Such as a raw annotation, which looks like a label map and would train one class off."""
    target = write() / "annotations_detectron2" / "validation" / "ADE_val_00000001.png"
    labels = (np.array(RAW) - 1) % 256
    save({"raw": RAW, "mode": labels[..., None].repeat(3, -1), "size": labels[1:]}[kind], target)
    caplog.set_level("INFO")
    ade20k.prepare(tmp_path, ["val"], workers=1)
    assert read(target) == labels.tolist()
    (warning,) = [record.message for record in caplog.records if "made again" in record.message]
    assert warning.startswith("1 label maps of ade20k_sem_seg_val were there, but damaged or other than")
    assert "(1 made, 0 kept)" in caplog.text
    caplog.clear()
    ade20k.prepare(tmp_path, ["val"], workers=1)
    assert "made again" not in caplog.text
    assert "(0 made, 1 kept)" in caplog.text


def test_an_image_without_annotation_is_named(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write()
    (own / "annotations" / "validation" / "ADE_val_00000001.png").unlink()
    with pytest.raises(UserError, match=r"images/validation/ADE_val_00000001.jpg' .* has no mask .*annotations/val"):
        ade20k.prepare(tmp_path, ["val"], workers=1)


def test_an_annotation_without_image_is_named(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write()
    write(stem="ADE_val_00000002")
    (own / "images" / "validation" / "ADE_val_00000002.jpg").unlink()
    with pytest.raises(UserError, match=r"annotations/validation/ADE_val_00000002.png' .* has no image .*images/val"):
        ade20k.prepare(tmp_path, ["val"], workers=1)


def test_images_of_other_types_are_taken_as_they_are_read_later(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write()
    image = own / "images" / "validation" / "ADE_val_00000001.jpg"
    (own / "images" / "validation" / "notes.txt").touch()
    (own / "annotations" / "validation" / "folder.png").mkdir()
    image.rename(image.with_suffix(".JPEG"))
    prepare(tmp_path)
    for name in ("ade20k_sem_seg_val", "ade20k_panoptic_val"):
        (record,) = get_dataset(name).records
        assert record["file_name"] == str(image.with_suffix(".JPEG"))
    Image.new("RGB", (6, 4)).save(image)
    with pytest.raises(UserError, match="two files for 'ADE_val_00000001'"):
        ade20k.prepare(tmp_path, ["val"], workers=1)


def test_another_size_is_refused(write: Callable[..., Path], tmp_path: Path, save: Save) -> None:
    own = write()
    save(np.zeros((4, 5)), own / "annotations" / "validation" / "ADE_val_00000001.png")
    with pytest.raises(UserError, match=r"is 5x4 pixels .* is 6x4"):
        ade20k.prepare(tmp_path, ["val"], workers=1)


def test_a_turned_photo_whose_annotation_is_not(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write()
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (6, 4)).save(own / "images" / "validation" / "ADE_val_00000001.jpg", exif=exif)
    with pytest.raises(UserError, match=r"is 6x4 pixels .* is 4x6: the image carries an EXIF orientation"):
        ade20k.prepare(tmp_path, ["val"], workers=1)
    (own / "images" / "validation" / "ADE_val_00000001.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"^image '.*ADE_val_00000001.jpg' cannot be read \(it is empty\)"):
        ade20k.prepare(tmp_path, ["val"], workers=1)


# ------------------------------------------------------------------ panoptic
def test_what_is_visible(write: Callable[..., Path], tmp_path: Path, read: Read) -> None:
    own = write()
    prepare(tmp_path)
    ids, entry = ids_of(own, read), annotation(own)
    assert (entry["image_id"], entry["file_name"]) == ("ADE_val_00000001", "ADE_val_00000001.png")
    segments = entry["segments_info"]
    # The building is covered, the flag (raw 150) is a thing without an object.
    assert [s["category_id"] for s in segments] == [0, 7, 12, 12]
    wall, bed, first, second = (s["id"] for s in segments)
    assert wall == WALL
    assert len({wall, bed, first, second, BUILDING, 0}) == 6
    assert ids.tolist() == [
        [wall, wall, first, first, second, 0],
        [wall, wall, first, first, second, 0],
        [bed, 0, 0, first, 0, 0],
        [bed, 0, 0, wall, wall, 0],
    ]
    assert [(s["area"], s["bbox"], s["iscrowd"]) for s in segments] == [
        (6, [0, 0, 5, 4], 0),
        (2, [0, 2, 1, 2], 0),
        (5, [2, 0, 2, 3], 0),
        (2, [4, 0, 1, 2], 0),
    ]
    # Ids of objects look like their class: no channel differs by more than 30.
    for identity, color in ((bed, (204, 5, 255)), (first, (150, 5, 61)), (second, (150, 5, 61))):
        channels = identity & 255, identity >> 8 & 255, identity >> 16
        assert max(abs(a - b) for a, b in zip(channels, color, strict=True)) <= 30


def test_as_published(write: Callable[..., Path], tmp_path: Path, read: Read) -> None:
    own = write()
    prepare(tmp_path)
    visible = ids_of(own, read)
    prepare(tmp_path, as_published=True)
    assert np.array_equal(ids_of(own, read), visible)
    segments = annotation(own)["segments_info"]
    assert [(s["category_id"], s["area"], s["bbox"]) for s in segments] == [
        (0, 8, [0, 0, 5, 4]),
        (1, 2, [0, 2, 1, 2]),
        (7, 2, [0, 2, 1, 2]),
        (12, 5, [2, 0, 2, 3]),
        (12, 2, [4, 0, 1, 2]),
    ]
    assert segments[1]["id"] == BUILDING
    prepare(tmp_path)  # the other way again: what was made otherwise is not kept
    assert len(annotation(own)["segments_info"]) == 4


def test_the_json_is_complete(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write()
    prepare(tmp_path)
    content = json.loads((own / "ade20k_panoptic_val.json").read_text())
    assert content["images"] == [
        {"id": "ADE_val_00000001", "file_name": "ADE_val_00000001.jpg", "height": 4, "width": 6}
    ]
    assert len(content["categories"]) == 150
    assert content["categories"][0] == {"id": 0, "name": "wall", "isthing": 0, "color": [120, 120, 120]}
    assert content["categories"][12]["isthing"] == 1
    dataset = get_dataset("ade20k_panoptic_val")
    sample = TestRecipe(dataset.metadata, "RGB", 0, 0)(dataset.records[0])
    ids, segments = sample["pan_seg"]
    assert {s["id"]: s["area"] for s in segments} == {s["id"]: int((ids == s["id"]).sum()) for s in segments}
    assert sample["sem_seg"].unique().tolist() == [0, 1, 7, 12, 149, 255]


@pytest.mark.parametrize(("raw", "expected"), [(RAW, [0, 1]), (np.zeros((4, 6)), []), (np.full((4, 6), 8), [])])
def test_images_without_objects(
    write: Callable[..., Path], tmp_path: Path, raw: Any, expected: list[int], read: Read
) -> None:
    own = write(raw=raw, kinds=np.zeros((4, 6)), objects=np.zeros((4, 6)))
    prepare(tmp_path)
    assert [s["category_id"] for s in annotation(own)["segments_info"]] == expected
    assert (ids_of(own, read) > 0).sum() == (10 if expected else 0)


def test_what_is_kept_stands_in_the_png(write: Callable[..., Path], tmp_path: Path, caplog: Any) -> None:
    own = write()
    prepare(tmp_path)
    first = (own / "ade20k_panoptic_val.json").read_text()
    (own / "ade20k_panoptic_val.json").unlink()  # as after a kill between the last PNG and the JSON
    with caplog.at_level(logging.INFO):
        prepare(tmp_path)
    assert "1 panoptic PNGs" in caplog.text
    assert "(0 made, 1 kept)" in caplog.text
    assert (own / "ade20k_panoptic_val.json").read_text() == first


@pytest.mark.parametrize("kind", ["another picture's", "another's pixels", "no texts", "grey"])
def test_panoptic_pngs_that_are_not_ours_are_made_again(
    write: Callable[..., Path], tmp_path: Path, save: Save, read: Read, kind: str
) -> None:
    own = write()
    prepare(tmp_path)
    target, before = own / "ade20k_panoptic_val" / "ADE_val_00000001.png", ids_of(own, read)
    texts, pixels = files.read_texts(target), np.array(read(target), np.uint8)
    if kind == "another picture's":
        texts = {key: text.replace("ADE_val_00000001", "ADE_val_00000002") for key, text in texts.items()}
    elif kind == "another's pixels":
        pixels[0, 0] = 1
    files.write_label_map(pixels[..., 0] if kind == "grey" else pixels, target, {} if kind == "no texts" else texts)
    prepare(tmp_path)
    assert np.array_equal(ids_of(own, read), before)
    assert files.read_texts(target)["segments_info"].count("ADE_val_00000001") == 2


@pytest.mark.parametrize(("kind", "words"), [(0, r"classes \[0, 4\]"), (101, r"classes \[4, 101\]")])
def test_objects_without_a_class_are_refused(write: Callable[..., Path], tmp_path: Path, kind: int, words: str) -> None:
    kinds = np.array(KINDS)
    kinds[0, 2] = kind
    write(kinds=kinds)
    with pytest.raises(UserError, match=rf"'.*ADE_val_00000001.png' gives object 7 the {words}"):
        prepare(tmp_path)


def test_instance_annotations_that_are_missing(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write()
    (own / "annotations_instance" / "validation" / "ADE_val_00000001.png").unlink()
    with pytest.raises(UserError, match=r"annotations_instance '.*ADE_val_00000001.png' does not exist"):
        prepare(tmp_path)
    (own / "annotations_instance" / "validation").rmdir()
    with pytest.raises(UserError, match=r"annotations_instance/validation' does not exist: .*annotations_instance.tar"):
        prepare(tmp_path)


def test_many_objects_of_one_class_have_ids_of_their_own(write: Callable[..., Path], tmp_path: Path) -> None:
    objects = np.arange(1, 253).reshape(12, 21)
    own = write(raw=np.full((12, 21), 13), kinds=np.full((12, 21), 4), objects=objects)
    prepare(tmp_path)
    segments = annotation(own)["segments_info"]
    assert len({s["id"] for s in segments}) == len(segments) == 252
    assert {s["area"] for s in segments} == {1}


def test_the_command_knows_as_published(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write()
    words = ["--root", str(tmp_path), "--splits", "val", "--workers", "1"]
    assert ade20k_panoptic.main([*words, "--as-published"]) == 0
    assert len(annotation(own)["segments_info"]) == 5

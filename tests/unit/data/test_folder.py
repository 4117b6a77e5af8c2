from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer.data import get_dataset, get_metadata
from maskformer.data.datasets.folder_yaml import read_description
from maskformer.errors import UserError

Make = Callable[..., Any]


def records(root: Path, split: str = "train") -> list[dict[str, Any]]:
    return list(get_dataset(f"folder:{root}:{split}").records)


def refused(root: Path, *parts: str, split: str = "train") -> None:
    with pytest.raises(UserError) as error:
        records(root, split)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def image(path: Path, size: tuple[int, int] = (3, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1]).save(path)


# ------------------------------------------------------------------ files
def test_default_layout(make_folder: Make) -> None:
    root = make_folder([(20, 30), (30, 20)])
    assert records(root) == [
        {
            "file_name": str(root / f"images/train/{i:03d}.png"),
            "sem_seg_file_name": str(root / f"masks/train/{i:03d}.png"),
            "image_id": f"{i:03d}",
            "height": height,
            "width": width,
        }
        for i, (height, width) in enumerate([(20, 30), (30, 20)])
    ]
    metadata = get_metadata(f"folder:{root}:train")
    assert metadata.classes == ["c0", "c1", "c2"]
    assert metadata.things == [False] * 3
    assert metadata.ignore_label == 255
    assert metadata.evaluators == ("sem_seg",)


def test_patterns(make_folder: Make) -> None:
    yaml = "classes: [a]\nimages: left/{split}/**/*_left.jpg\nmasks: fine/{split}/**/*_ids.png\n"
    root = make_folder([], yaml=yaml)
    for city, stem in (("x", "1"), ("x", "2"), ("y", "1")):
        image(root / f"left/val/{city}/{city}_{stem}_left.jpg")
        image(root / f"fine/val/{city}/{city}_{stem}_ids.png", mode="L")
        image(root / f"fine/val/{city}/{city}_{stem}_color.png")
    found = records(root, "val")
    assert [r["image_id"] for r in found] == ["x/x_1", "x/x_2", "y/y_1"]
    assert [Path(r["sem_seg_file_name"]).name for r in found] == ["x_1_ids.png", "x_2_ids.png", "y_1_ids.png"]


def test_other_files_are_counted_and_left_out(make_folder: Make, caplog: Any) -> None:
    root = make_folder([(20, 30)])
    (root / "images/train/notes.txt").write_text("x")
    (root / "images/train/.hidden.png").write_text("x")
    image(root / "masks/train/extra.png", mode="L")
    assert len(records(root)) == 1
    assert "1 files are no images" in caplog.text
    assert "1 masks have no image" in caplog.text


def test_missing_masks(make_folder: Make) -> None:
    root = make_folder([(20, 30)] * 4)
    (root / "masks/train/001.png").unlink()
    refused(root, "images/train/001.png", "has no mask '001'", "masks/train", "add the mask or remove the image")
    (root / "masks/train/003.png").unlink()
    refused(root, "001.png", "1 more of 4 images")


def test_two_images_of_one_stem(make_folder: Make) -> None:
    root = make_folder([(20, 30)])
    image(root / "images/train/000.jpg")
    refused(root, "two files for '000'", "000.jpg", "000.png")


def test_empty_and_missing_folders(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder([])
    refused(root, "is empty", "images/train/*")
    refused(root, "images/vall' of data set", "does not exist", split="vall")
    with pytest.raises(UserError, match=r"nowhere' .* does not exist"):
        get_dataset(f"folder:{tmp_path}/nowhere:train")
    for name in ("folder:", "folder:x", "folder::train", "folder:x:"):
        with pytest.raises(UserError, match="write 'folder:<path>:<split>'"):
            get_dataset(name)


def test_unreadable_image_is_found_when_listing(make_folder: Make) -> None:
    root = make_folder([(20, 30)] * 3)
    (root / "images/train/002.png").write_bytes(b"")
    refused(root, "002.png", "cannot be read")


# ------------------------------------------------------------------ dataset.yaml
def test_classes_with_things_and_colours(make_folder: Make) -> None:
    yaml = "classes: [road, {name: car, thing: true, color: [0, 0, 142]}, {name: sky, thing: false}]\nignore_label: 7\n"
    metadata = get_metadata(f"folder:{make_folder([], yaml=yaml)}:train")
    assert metadata.classes == ["road", "car", "sky"]
    assert metadata.things == [False, True, False]
    assert metadata.colors[1] == (0, 0, 142)
    assert len(set(metadata.colors)) == 3
    assert metadata.ignore_label == 7


def test_labels_are_mapped(make_folder: Make) -> None:
    yaml = "classes: [road, car]\nlabels: {7: road, 8: road, 26: car, 0: null}\nignore_label: 1\n"
    metadata = get_metadata(f"folder:{make_folder([], yaml=yaml)}:train")
    assert metadata.raw_labels == ((0, 255), (1, 255), (7, 0), (8, 0), (26, 1))
    assert metadata.ignore_label == 255


def test_ignore_label_beyond_255_classes(make_folder: Make) -> None:
    yaml = "classes:\n" + "".join(f"- c{i}\n" for i in range(256))
    assert get_metadata(f"folder:{make_folder([], yaml=yaml)}:train").ignore_label == 65535


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("clases: [a]", ("unknown key 'clases'", "did you mean 'classes'")),
        ("classes: [a", ("cannot be read", "line ")),
        ("classes: [a]\nclasses: [b]", ("line 2", "'classes' is given twice")),
        ("classes: [a]\nlabels: {0: a, 0: a}", ("'0' is given twice",)),
        ("- a\n- b", ("list, not a mapping",)),
        ("", ("NoneType, not a mapping",)),
        ("classes: !!python/object/apply:os.system ['true']", ("could not determine a constructor",)),
        ("ignore_label: 3", ("has no 'classes:'",)),
        ("classes: []", ("must be a list",)),
        ("classes: road", ("must be a list",)),
        ("classes: [yes, no]", ("the name of class 0 is True (bool)", "quotes")),
        ("classes: [a, 3]", ("the name of class 1 is 3 (int)",)),
        ("classes: [a, b, a]", ("'a' twice",)),
        ("classes: [{name: a, thin: true}]", ("class 0 has the unknown key 'thin'", "did you mean 'thing'")),
        ("classes: [{name: a, thing: 1}]", ("'thing' of class 'a' is 1",)),
        ("classes: [{name: a, color: [0, 0, 256]}]", ("'color' of class 'a'", "0..255")),
        ("classes: [{name: a, color: red}]", ("'color' of class 'a' is 'red'",)),
        ("classes: [a, b]\nignore_label: 1", ("ignore_label: 1", "class 'b'", "'labels:'")),
        ("classes: [a]\nignore_label: true", ("'ignore_label' is True",)),
        ("classes: [a]\nignore_label: 70000", ("'ignore_label' is 70000",)),
        ("classes: [road]\nlabels: {7: raod}", ("maps label 7 to 'raod'", "did you mean 'road'")),
        ("classes: [a]\nlabels: {x: a}", ("'labels:' has the value 'x'",)),
        ("classes: [a]\nlabels: {1: 2}", ("maps 1 to 2",)),
        ("classes: [a]\nlabels: [a]", ("must map values",)),
        ("classes: [a]\nlabels: {1: a}\nignore_label: 1", ("both as ignore_label and in 'labels:'",)),
        ("classes: [a]\nimages: 5", ("'images' is 5",)),
        ("classes: [a]\nmasks: masks/{split}", ("must be a pattern",)),
        ("classes: [a]\ninstances: a.json\npanoptic: b.json", ("both 'instances:' and 'panoptic:'",)),
        ("classes: [a]\ninstances: a.json\nmasks: m/*.png", ("both 'instances:' and 'masks:'",)),
        ("classes: [a]\ninstances: 5", ("'instances' must name a JSON file",)),
        ("classes: [a]\ninstances: a.json\nlabels: {1: a}", ("'labels:' is about masks",)),
        ("classes: [a]\ninstances: {val: a.json}", ("names no file for split 'train'", "known are val")),
    ],
)
def test_bad_descriptions(make_folder: Make, yaml: str, parts: tuple[str, ...]) -> None:
    refused(make_folder([], yaml=yaml), "dataset.yaml", *parts)


def test_missing_description(make_folder: Make) -> None:
    root = make_folder([])
    (root / "dataset.yaml").unlink()
    refused(root, "dataset.yaml", "does not exist", "classes:")


def test_description_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_description(tmp_path / "dataset.yaml")


# ------------------------------------------------------------------ COCO JSON
CATEGORIES = [{"id": 30, "name": "dog", "isthing": 1}, {"id": 4, "name": "sky", "isthing": 0}]


def write_panoptic(root: Path, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "images": [{"id": 9, "file_name": "a.jpg", "height": 3, "width": 4}],
        "annotations": [
            {
                "image_id": 9,
                "file_name": "a.png",
                "segments_info": [
                    {"id": 5, "category_id": 30, "iscrowd": 0, "area": 2, "bbox": [0, 0, 2, 1]},
                    {"id": 6, "category_id": 4, "iscrowd": 1, "area": 1},
                ],
            }
        ],
        "categories": CATEGORIES,
    } | changes
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "panoptic_train.json").write_text(json.dumps(content))
    return content


def with_ids(*ids: int) -> dict[str, Any]:
    segments = [{"id": identity, "category_id": 30} for identity in ids]
    return {"annotations": [{"image_id": 9, "file_name": "a.png", "segments_info": segments}]}


def panoptic_folder(
    make_folder: Make, yaml: str = "panoptic: annotations/panoptic_{split}.json\n", **changes: Any
) -> Path:
    root: Path = make_folder([], yaml=yaml)
    write_panoptic(root, **changes)
    image(root / "images/train/a.jpg")
    image(root / "annotations/panoptic_train/a.png")
    return root


def test_panoptic_folder(make_folder: Make) -> None:
    root = panoptic_folder(make_folder)
    dataset = get_dataset(f"folder:{root}:train")
    metadata = dataset.metadata
    assert metadata.classes == ["sky", "dog"]  # by id
    assert metadata.things == [False, True]
    assert metadata.dataset_ids == [4, 30]
    assert metadata.evaluators == ("sem_seg", "panoptic_seg")
    assert metadata.annotation_file == str(root / "annotations/panoptic_train.json")
    (record,) = dataset.records
    assert record["pan_seg_file_name"] == str(root / "annotations/panoptic_train/a.png")
    assert record["file_name"] == str(root / "images/train/a.jpg")
    assert record["segments_info"] == [
        {"id": 5, "category_id": 1, "isthing": True, "iscrowd": 0, "area": 2, "bbox": [0, 0, 2, 1]},
        {"id": 6, "category_id": 0, "isthing": False, "iscrowd": 1, "area": 1},
    ]


def test_panoptic_folder_with_own_classes_and_places(make_folder: Make) -> None:
    yaml = (
        "classes: [{name: dog, thing: false}, sky]\npanoptic: {train: annotations/panoptic_train.json}\n"
        "images: pics/*.jpg\nmasks: ids/{split}/*.png\n"
    )
    root = panoptic_folder(make_folder, yaml)
    image(root / "pics/a.jpg")
    image(root / "ids/train/a.png")
    dataset = get_dataset(f"folder:{root}:train")
    assert dataset.metadata.classes == ["dog", "sky"]
    assert dataset.metadata.things == [False, False]
    assert dataset.metadata.dataset_ids == [30, 4]
    (record,) = dataset.records
    assert record["pan_seg_file_name"] == str(root / "ids/train/a.png")
    assert [s["category_id"] for s in record["segments_info"]] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"categories": CATEGORIES[:1]}, ("category_id 4 at segment 6 of image 9", "1 classes")),
        ({"categories": None}, ("no list 'categories'",)),
        ({"annotations": 5}, ("no list 'annotations'",)),
        ({"categories": [{"id": 4}]}, ("category without 'id' or 'name'",)),
        ({"categories": [*CATEGORIES, {"id": 5, "name": "dog"}]}, ("two categories of one name",)),
        ({"images": []}, ("lacks what COCO's format requires", "KeyError")),
        ({"images": [{"id": 9, "file_name": "b.jpg", "height": 3, "width": 4}]}, ("b.jpg", "does not exist")),
        ({"images": [{"id": 9, "file_name": "a.jpg"}] * 2}, ("lists an image id twice",)),
        ({"images": [{"id": 9, "file_name": "a.jpg"}]}, ("'height'",)),
        ({"annotations": []}, ("is empty",)),
        (with_ids(0, 6), ("has the id 0 in segments_info of image 9, which is none of 1..16777215",)),
        (with_ids(5, -6), ("has the id -6 in",)),
        (with_ids(5, 2**24), ("has the id 16777216 in",)),
        (with_ids(5, 5), ("has the id 5 in segments_info of image 9, twice",)),
    ],
)
def test_bad_panoptic_json(make_folder: Make, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(panoptic_folder(make_folder, **changes), *parts)


@pytest.mark.parametrize("key", ["images", "annotations"])
@pytest.mark.parametrize("place", ["{root}/outside.png", "../../outside.png"])
def test_json_that_names_files_outside(make_folder: Make, key: str, place: str) -> None:
    root = panoptic_folder(make_folder)
    image(root / "outside.png")  # it is there, and would be read
    content = write_panoptic(root)
    content[key][0]["file_name"] = place.format(root=root)
    write_panoptic(root, **content)
    refused(root, "panoptic_train.json has the file_name", "outside.png", "leaves the folder")


def test_json_that_names_files_in_folders_below(make_folder: Make) -> None:
    root = panoptic_folder(make_folder)
    content = write_panoptic(root)
    for key, where in (("images", "images/train"), ("annotations", "annotations/panoptic_train")):
        content[key][0]["file_name"] = "city/b.png"
        image(root / where / "city/b.png")
    write_panoptic(root, **content)
    (record,) = records(root)
    assert record["file_name"] == str(root / "images/train/city/b.png")
    assert record["pan_seg_file_name"] == str(root / "annotations/panoptic_train/city/b.png")


def test_missing_panoptic_files(make_folder: Make) -> None:
    root = panoptic_folder(make_folder)
    (root / "annotations/panoptic_train/a.png").unlink()
    refused(root, "pan_seg_file_name", "a.png", "does not exist")
    (root / "annotations/panoptic_train").rmdir()
    refused(root, "annotations/panoptic_train' of data set", "does not exist")
    (root / "annotations/panoptic_train.json").write_text('{"images": [')
    refused(root, "is not valid JSON")
    (root / "annotations/panoptic_train.json").unlink()
    refused(root, "panoptic_train.json", "does not exist", "'panoptic:'")


def test_class_that_the_json_does_not_know(make_folder: Make) -> None:
    yaml = "classes: [dogs, sky]\npanoptic: annotations/panoptic_{split}.json\n"
    refused(panoptic_folder(make_folder, yaml), "the class 'dogs'", "did you mean 'dog'")


def test_instance_folder(make_folder: Make, caplog: Any) -> None:
    root = make_folder([], yaml="instances: instances_{split}.json\n")
    for name in ("a", "b"):
        image(root / f"images/train/{name}.jpg")
    square = [0, 0, 2, 0, 2, 2, 0, 2]
    content = {
        "images": [{"id": i, "file_name": f"{n}.jpg", "height": 3, "width": 4} for i, n in ((2, "b"), (1, "a"))],
        "categories": CATEGORIES,
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 30, "segmentation": [square, [0, 0, 1, 1]], "area": 4},
            {"id": 2, "image_id": 2, "category_id": 30, "segmentation": [[0, 0, 1, 1]]},
            {"id": 3, "image_id": 2, "category_id": 4, "segmentation": {"size": [3, 4], "counts": [12]}, "iscrowd": 1},
        ],
    }
    (root / "instances_train.json").write_text(json.dumps(content))
    dataset = get_dataset(f"folder:{root}:train")
    assert dataset.metadata.things == [True, True]  # instances are things, whatever a panoptic JSON may say
    assert dataset.metadata.evaluators == ("instances",)
    first, second = dataset.records
    assert (first["image_id"], first["annotations"]) == (1, [])
    assert [a["id"] for a in second["annotations"]] == [1, 3]
    assert second["annotations"][0]["segmentation"] == [square]
    assert [a["category_id"] for a in second["annotations"]] == [1, 0]
    assert "1 annotations have no polygon of three points" in caplog.text
    del content["annotations"][0]["segmentation"]
    (root / "instances_train.json").write_text(json.dumps(content))
    refused(root, "KeyError: 'segmentation'")


def test_instances_that_name_images_outside(make_folder: Make) -> None:
    root = make_folder([], yaml="instances: instances_{split}.json\n")
    image(root / "images/train/a.jpg")
    image(root / "b.jpg")
    images = [{"id": 1, "file_name": "../../b.jpg", "height": 3, "width": 4}]
    content = {"images": images, "categories": CATEGORIES, "annotations": []}
    (root / "instances_train.json").write_text(json.dumps(content))
    refused(root, "instances_train.json has the file_name '../../b.jpg'", "leaves the folder")


def test_masks_of_16_bits(make_folder: Make) -> None:
    root = make_folder([(3, 4)], classes=2, yaml="classes: [a, b]\nlabels: {300: a, 40000: b}\n")
    Image.fromarray(np.array([[300, 40000, 300, 300]] * 3, np.uint16)).save(root / "masks/train/000.png")
    from maskformer.data.labels import read_semantic

    dataset = get_dataset(f"folder:{root}:train")
    assert read_semantic(dataset.records[0], dataset.metadata)[0].tolist() == [0, 1, 0, 0]

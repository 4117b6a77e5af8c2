"""Data sets in both catalogs, and our recipes as mappers of Detectron2's loaders."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_panoptic

from maskformer.config import get_cfg
from maskformer.data.catalog import dataset_names
from maskformer.data.loading import build_train_loader
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import catalog, data
from maskformer.integrations.detectron2.command import build_config
from tests.miniatures import NAMES, make_miniature

ADE20K = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"
COCO = "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"
CPU = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SEED", 7]
SMALL = [*CPU, "INPUT.CROP.SIZE", (64, 64), "INPUT.SIZE_DIVISIBILITY", 64, "INPUT.MIN_SIZE_TRAIN", (72, 96)]
DETECTRON2_HAS = {"ade20k_sem_seg_val", "cityscapes_fine_sem_seg_train", "coco_2017_train_panoptic"}


@pytest.fixture
def catalogs() -> Iterator[None]:
    """Both catalogs as they were."""
    before = [dict(each) for each in (DatasetCatalog, MetadataCatalog)]
    ours = dict(catalog._OURS)
    yield
    for each, content in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        each.clear()
        each.update(content)
    catalog._OURS.clear()
    catalog._OURS.update(ours)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert torch.equal(one["image"], other["image"])
    assert torch.equal(one["segments"].ids, other["segments"].ids)
    assert torch.equal(one["segments"].labels, other["segments"].labels)
    assert [one[k] for k in ("file_name", "height", "width")] == [other[k] for k in ("file_name", "height", "width")]


# ------------------------------------------------------------------ registration
def test_detectron2_knows_all_our_data_sets_and_keeps_its_own() -> None:
    catalog.register_datasets()
    assert set(dataset_names()) <= set(DatasetCatalog.list())
    ours = {name for name in dataset_names() if isinstance(DatasetCatalog[name], catalog._Records)}
    assert {"ade20k_panoptic_train", "ade20k_full_sem_seg_val", "mapillary_vistas_sem_seg_train"} <= ours
    assert not ours & DETECTRON2_HAS
    assert catalog.register_datasets() == sorted(ours)  # again, as after another root of data sets


def test_detectron2_metadata_of_our_data_sets() -> None:
    catalog.register_datasets()
    semantic = MetadataCatalog.get("coco_2017_test_stuff_10k_sem_seg")
    assert (semantic.evaluator_type, semantic.ignore_label, len(semantic.stuff_classes)) == ("sem_seg", 255, 171)
    assert semantic.stuff_dataset_id_to_contiguous_id[1] == 0
    assert not hasattr(semantic, "thing_classes")
    panoptic = MetadataCatalog.get("ade20k_panoptic_val")
    assert panoptic.thing_classes == panoptic.stuff_classes
    assert (len(panoptic.thing_dataset_id_to_contiguous_id), len(panoptic.stuff_dataset_id_to_contiguous_id)) == (
        100,
        150,
    )
    assert (panoptic.evaluator_type, panoptic.label_divisor) == ("coco_panoptic_seg", 1000)
    assert panoptic.panoptic_json.endswith("ADEChallengeData2016/ade20k_panoptic_val.json")
    assert panoptic.stuff_colors[0] == panoptic.thing_colors[0] == [120, 120, 120]


def test_detectron2_coco_metadata_would_be_its_own(catalogs: None) -> None:
    """What we would register for COCO panoptic, had Detectron2 nothing of that name, is what it has."""
    names = NAMES["coco_panoptic"]
    theirs = [MetadataCatalog.get(name) for name in names]
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    catalog.register_datasets()
    for name, their in zip(names, theirs, strict=True):
        our = MetadataCatalog.get(name)
        for field in (
            "thing_classes",
            "stuff_classes",
            "thing_colors",
            "thing_dataset_id_to_contiguous_id",
            "stuff_dataset_id_to_contiguous_id",
            "ignore_label",
            "label_divisor",
            "evaluator_type",
            "panoptic_json",
            "panoptic_root",
        ):
            assert our.get(field) == their.get(field), field


def test_detectron2_registration_reads_nothing(catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nothing"))
    catalog.register_datasets()
    assert MetadataCatalog.get("ade20k_panoptic_val").panoptic_root.startswith(str(tmp_path))
    with pytest.raises(UserError, match="ade20k_panoptic_train"):
        DatasetCatalog.get("ade20k_panoptic_train")


def test_detectron2_folders_are_registered_when_they_are_named(catalogs: None, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind, value in (("images", (8, 6, 3)), ("masks", (8, 6))):
            path = tmp_path / kind / split / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.zeros(value, np.uint8)).save(path)
    (tmp_path / "dataset.yaml").write_text("classes: [road, {name: car, thing: true}]\n")
    name = f"folder:{tmp_path}:train"
    catalog.ensure_registered(name)
    (record,) = DatasetCatalog.get(name)
    assert (record["height"], record["width"]) == (8, 6)
    assert MetadataCatalog.get(name).stuff_classes == ["road", "car"]
    assert catalog.get_dataset(name).metadata.things == [False, True]
    with pytest.raises(UserError, match="did you mean 'ade20k_sem_seg_val'"):
        catalog.ensure_registered("ade20k_sem_seg_vall")


# ------------------------------------------------------------------ third parties
def test_detectron2_data_set_of_a_user_in_our_terms(catalogs: None, tmp_path: Path) -> None:
    make_miniature("coco_panoptic", tmp_path)
    ids = {7: 0, 9: 1, 40: 2}
    fields = {
        "thing_classes": ["a", "b", "c"],
        "stuff_classes": ["a", "b", "c"],
        "thing_dataset_id_to_contiguous_id": {7: 0, 9: 1},
        "stuff_dataset_id_to_contiguous_id": {40: 2},
    }
    root = tmp_path / "coco"
    register_coco_panoptic(
        "my_panoptic",
        fields,
        str(root / "train2017"),
        str(root / "panoptic_train2017"),
        str(root / "annotations/panoptic_train2017.json"),
    )
    metadata = catalog.get_metadata("my_panoptic")
    assert metadata.classes == ["a", "b", "c"]
    assert metadata.things == [True, True, False]
    assert metadata.contiguous_ids == ids
    assert (metadata.evaluators, metadata.truth) == (("panoptic_seg",), ("pan_seg",))
    assert len(set(metadata.colors)) == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stuff_classes": ["a", "b"], "ignore_label": 9}, (("sem_seg",), [False, False], 9)),
        ({"thing_classes": ["a", "b"]}, (("instances",), [True, True], 255)),
        # As Detectron2's Cityscapes: the list of things is for another task.
        (
            {"thing_classes": ["b"], "stuff_classes": ["a", "b"], "evaluator_type": "cityscapes_sem_seg"},
            (("sem_seg",), [False, False], 255),
        ),
    ],
)
def test_detectron2_metadata_of_a_user_in_our_terms(catalogs: None, fields: Any, expected: Any) -> None:
    DatasetCatalog.register("my_data", lambda: [{"file_name": "a.jpg", "sem_seg_file_name": "a.png"}])
    MetadataCatalog.get("my_data").set(**fields)
    dataset = catalog.get_dataset("my_data")
    found = dataset.metadata
    assert (found.evaluators, found.things, found.ignore_label) == expected
    assert dataset.records[0]["image_id"] == "a.jpg"  # which Detectron2 does not need


def test_detectron2_ids_are_those_of_the_classes_that_are_predicted() -> None:
    # As Detectron2 has COCO: 92 is the first stuff, behind "things" at 0, and 1 the first thing.
    stuff = catalog.get_metadata("coco_2017_val_panoptic_stuffonly")
    assert (stuff.num_classes, stuff.classes[:2], list(stuff.dataset_ids[:3])) == (
        54,
        ["things", "banner"],
        [0, 92, 93],
    )
    assert not any(stuff.things)
    things = catalog.get_metadata("coco_2017_val")
    assert (things.num_classes, list(things.dataset_ids[-2:]), all(things.things)) == (80, [89, 90], True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({}, "has no classes"), ({"thing_classes": ["a"], "stuff_classes": ["things", "b"]}, "differ")],
)
def test_detectron2_metadata_that_say_too_little_are_refused(catalogs: None, fields: Any, message: str) -> None:
    DatasetCatalog.register("my_data", list)
    MetadataCatalog.get("my_data").set(**fields)
    with pytest.raises(UserError, match=message):
        catalog.get_metadata("my_data")


def test_detectron2_registration_of_a_user_goes_before_ours(catalogs: None) -> None:
    assert catalog.get_metadata("ade20k_sem_seg_val").num_classes == 150
    DatasetCatalog.pop("ade20k_sem_seg_val")
    MetadataCatalog.pop("ade20k_sem_seg_val")
    DatasetCatalog.register("ade20k_sem_seg_val", lambda: [{"file_name": "mine.jpg"}])
    MetadataCatalog.get("ade20k_sem_seg_val").set(stuff_classes=["mine"])
    assert catalog.get_metadata("ade20k_sem_seg_val").classes == ["mine"]
    assert catalog.get_dataset("ade20k_sem_seg_val").records[0]["file_name"] == "mine.jpg"


# ------------------------------------------------------------------ mappers and loaders
@pytest.mark.parametrize(("family", "recipe"), [("ade20k", ADE20K), ("coco_panoptic", COCO)])
def test_detectron2_mapper_gives_the_samples_of_the_native_loader(
    family: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(make_miniature(family, tmp_path)))
    words = [*SMALL, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.ASPECT_RATIO_GROUPING", False]
    native = get_cfg(recipe, words)
    loader = build_train_loader(native)
    records = {r["file_name"]: r for r in catalog.get_dataset(NAMES[family][0]).records}
    cfg = build_config(recipe, words)
    mapper = data.MaskFormerMapper(cfg, True)
    ours = data.build_train_loader(cfg)
    for batch in range(3):
        there = next(ours)
        for place, sample in enumerate(next(loader)):
            record = {**records[sample["file_name"]], data.POSITION: 2 * batch + place}
            same(mapper(record), sample)
            same(there[place], sample)
    assert not torch.equal(mapper({**record, data.POSITION: 99})["image"], sample["image"])


def test_detectron2_loader_takes_the_mapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_miniature("ade20k", tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    cfg = build_config(ADE20K, [*SMALL, "SOLVER.IMS_PER_BATCH", 2])
    mapper = data.MaskFormerMapper(cfg, is_train=True)
    assert pickle.loads(pickle.dumps(mapper)).recipe == mapper.recipe  # workers may be spawned
    records = list(catalog.get_dataset("ade20k_sem_seg_train").records)
    loaded = []
    for _ in range(2):  # chance comes from NumPy's generator, and from nothing else
        np.random.seed(3)
        torch.manual_seed(3)
        loader = build_detection_train_loader(
            records, mapper=mapper, sampler=torch.utils.data.SequentialSampler(records), total_batch_size=2
        )
        loaded.append(next(iter(loader)))
    assert [sample["image"].shape for sample in loaded[0]] == [(3, 64, 64)] * 2
    for one, other in zip(*loaded, strict=True):
        same(one, other)
    np.random.seed(4)
    assert not torch.equal(mapper(records[0])["image"], loaded[0][0]["image"])


def test_detectron2_test_samples_hold_the_truth(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(make_miniature("ade20k_panoptic", tmp_path)))
    catalog.register_datasets()
    words = [*CPU, "DATASETS.TEST", "('ade20k_panoptic_val',)", "INPUT.MIN_SIZE_TEST", 48]
    loader = data.build_test_loader(build_config(ADE20K, words), "ade20k_panoptic_val")
    (sample,), *rest = list(loader)
    assert len(rest) == 1
    assert sample["image"].shape == (3, 48, 64)
    assert sample["sem_seg"].shape == sample["pan_seg"][0].shape == (96, 128)
    assert (sample["height"], sample["width"]) == (96, 128)


def test_detectron2_mapper_refuses_data_sets_that_mean_different_things() -> None:
    names = "('ade20k_sem_seg_train', 'cityscapes_fine_sem_seg_train')"
    cfg = build_config(ADE20K, [*CPU, "DATASETS.TRAIN", names])
    with pytest.raises(UserError, match="mean different things"):
        data.MaskFormerMapper(cfg, True)
    assert data.MaskFormerMapper(cfg, True, "cityscapes_fine_sem_seg_train").recipe.metadata.num_classes == 19
    with pytest.raises(UserError, match=r"DATASETS.TRAIN is empty"):
        data.MaskFormerMapper(build_config(ADE20K, [*CPU, "DATASETS.TRAIN", "()"]), True)

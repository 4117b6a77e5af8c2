"""On real images, where MASKFORMER_TEST_DATA names a folder that has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskformer.data import build_test_loader, build_train_loader, get_dataset, labels
from maskformer.data.recipes import TestRecipe

Make = Callable[..., Any]


def test_camvid(real_data: Path, make_cfg: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(real_data))
    counts = {split: len(get_dataset(f"camvid_sem_seg_{split}").records) for split in ("train", "val", "test")}
    assert counts == {"train": 367, "val": 101, "test": 233}
    cfg = make_cfg(
        DATASETS__TRAIN=("camvid_sem_seg_train",),
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=11,
        MODEL__SEM_SEG_HEAD__IGNORE_VALUE=11,
        INPUT__MIN_SIZE_TRAIN=(120,),
        INPUT__MIN_SIZE_TEST=120,
        SOLVER__IMS_PER_BATCH=8,
        TEST__IMS_PER_BATCH=8,
    )
    for batch in islice(build_train_loader(cfg), 3):
        assert {tuple(s["image"].shape) for s in batch} == {(3, 120, 160)}
        assert all(3 < len(s["segments"]) <= 11 for s in batch)
    pixels, total = np.zeros(12), 0
    for batch in build_test_loader(cfg, "camvid_sem_seg_val"):
        for sample in batch:
            pixels += np.bincount(sample["sem_seg"].flatten(), minlength=12)
            total += 1
    assert total == 101
    # Shares in percent that the source of the data states for this split.
    stated = [9.2, 26.0, 0.56, 29.0, 8.7, 16.3, 0.89, 3.08, 1.75, 0.65, 2.22, 1.70]
    assert np.allclose(100 * pixels / pixels.sum(), stated, atol=0.06)


def test_coco_instances(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "tiny_coco"
    (tmp_path / "dataset.yaml").write_text(
        f"images: {source}/{{split}}2017/*.jpg\ninstances: {source}/annotations/instances_{{split}}2017.json\n"
    )
    for split in ("train", "val"):
        dataset = get_dataset(f"folder:{tmp_path}:{split}")
        assert dataset.metadata.num_classes == 80
        assert dataset.metadata.dataset_ids[-1] == 90
        assert len(dataset.records) == 50
        found = 0
        for record in dataset.records:
            planes, classes, plane = labels.instance_planes(record, dataset.metadata)
            segments = labels.planes_to_segment_map(planes, classes, plane, keep_empty=True)
            stated = [a["area"] for a in record["annotations"] if not a["iscrowd"]]
            areas = segments.areas().numpy()
            # The JSON's area is that of the outline, ours counts pixels.
            assert np.allclose(areas, stated, rtol=0.1, atol=30)
            found += len(stated)
        crowds = sum(a["iscrowd"] for r in dataset.records for a in r["annotations"])
        stated_json = json.loads((source / f"annotations/instances_{split}2017.json").read_text())
        assert found + crowds == len(stated_json["annotations"])


def test_coco_panoptic(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "panoptic_sample"
    categories = json.loads((source / "panoptic_coco_categories.json").read_text())
    content = json.loads((source / "panoptic_examples.json").read_text()) | {"categories": categories}
    (tmp_path / "examples.json").write_text(json.dumps(content))
    (tmp_path / "dataset.yaml").write_text(
        f"panoptic: examples.json\nimages: {source}/input_images/*.jpg\nmasks: {source}/panoptic_examples/*.png\n"
    )
    dataset = get_dataset(f"folder:{tmp_path}:val")
    builtin = get_dataset("coco_2017_val_panoptic").metadata
    assert dataset.metadata.classes == builtin.classes
    assert dataset.metadata.things == builtin.things
    assert dataset.metadata.dataset_ids == builtin.dataset_ids
    assert len(dataset.records) == 2
    for record in dataset.records:
        sample = TestRecipe(dataset.metadata, "RGB", 320, 1000)(record)
        ids, segments = sample["pan_seg"]
        assert [s["area"] for s in segments] == [int((ids == s["id"]).sum()) for s in segments]
        planes, classes, _ = labels.panoptic_planes(record, dataset.metadata)
        kept = [s for s in segments if not s["iscrowd"]]
        assert classes.tolist() == [s["category_id"] for s in kept]
        assert np.bincount(planes[planes >= 0]).tolist() == [s["area"] for s in kept]
        assert sample["sem_seg"].shape == ids.shape


def test_ade20k_raw_labels(real_data: Path, make_folder: Make) -> None:
    """Three real images in the folder layout: the labels: table does what the preparation of ADE20K does."""
    from maskformer.data import get_metadata

    source = real_data / "layouts" / "ADEChallengeData2016"
    names = get_metadata("ade20k_sem_seg_val").classes
    table = "\n".join(f"  {i + 1}: {json.dumps(name)}" for i, name in enumerate(names))
    listed = "\n".join(f"- {json.dumps(name)}" for name in names)
    root = make_folder(
        [],
        yaml=f"classes:\n{listed}\nlabels:\n  0: null\n{table}\n"
        f"images: {source}/images/{{split}}/*.jpg\nmasks: {source}/annotations/{{split}}/*.png\n",
    )
    dataset = get_dataset(f"folder:{root}:validation")
    assert len(dataset.records) == 3
    for record in dataset.records:
        found = labels.read_semantic(record, dataset.metadata)
        from PIL import Image

        raw = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert np.array_equal(found, raw.astype(np.uint8) - np.uint8(1))

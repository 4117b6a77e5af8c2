"""Every published layout from the downloaded files to scores: preparation, loading, training, evaluation, predictions.

With drawn pictures always; with real ones where MASKFORMER_TEST_DATA names a folder that has them, completed by drawn
ones for what is not there.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer.config import get_cfg
from maskformer.data import dataset_names, get_dataset
from maskformer.data.datasets import shapes
from maskformer.data.datasets.tables import read_rows
from maskformer.data.recipes import TestRecipe
from maskformer.engine import main as train_net
from maskformer.evaluation import build_evaluators
from tests.miniatures import NAMES, family_of, make_miniature, prepare_miniature, write_miniature

RECIPES = {
    "ade20k": "configs/ade20k-150/maskformer_R50_bs16_160k.yaml",
    "ade20k_panoptic": "configs/ade20k-150-panoptic/maskformer_panoptic_R50_bs16_720k.yaml",
    "ade20k_full": "configs/ade20k-full-847/maskformer_R50_bs16_200k.yaml",
    "camvid": "configs/camvid/maskformer_R18_bs8_1500.yaml",
    "cityscapes": "configs/cityscapes-19/maskformer_R101_bs16_90k.yaml",
    "coco_panoptic": "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml",
    "coco_stuff": "configs/coco-stuff-10k-171/maskformer_R50_bs32_60k.yaml",
    "mapillary": "configs/mapillary-vistas-65/maskformer_R50_bs16_300k.yaml",
}
# The recipe with a narrow network and small pictures; names, classes, augmentation and what is measured stay.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 2,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "INPUT.MIN_SIZE_TRAIN": (64, 80),
    "INPUT.MAX_SIZE_TRAIN": 160,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.CROP.SIZE": (48, 64),
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 3,
    "DATALOADER.NUM_WORKERS": 0,
    "TEST.EVAL_PERIOD": 0,
    "LOG_PERIOD": 1,
    "SEED": 1,
}


def train(family: str, output: Path) -> dict[str, Any]:
    """Runs the family's recipe, small, for three iterations; returns the scores at the end."""
    cfg = get_cfg(RECIPES[family])
    changes = SMALL | {"DATASETS.TEST": (NAMES[family][1],)}  # as the recipe says, but for CamVid
    if cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS:
        changes["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"] = 1
    if cfg.INPUT.SIZE_DIVISIBILITY > 0:
        changes["INPUT.SIZE_DIVISIBILITY"] = 64
    words = [str(word) for pair in changes.items() for word in pair]
    assert train_net.main(["--config-file", RECIPES[family], *words, "OUTPUT_DIR", str(output)]) == 0
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    return lines[-1]


def check_run(family: str, output: Path, test_images: int) -> None:
    """Trains and looks at scores and prediction files."""
    scores = train(family, output)
    metadata = get_dataset(NAMES[family][1]).metadata
    for task, names in (("sem_seg", ("mIoU", "fwIoU", "mACC", "pACC")), ("panoptic_seg", ("PQ", "SQ", "RQ"))):
        for name in names if task in metadata.evaluators else ():
            assert 0 <= scores[f"{task}/{name}"] <= 100
    folder = output / "inference"
    names = [record["file_name"] for record in get_dataset(NAMES[family][1]).records]
    assert len(names) == test_images
    if "sem_seg" in metadata.evaluators:
        found = json.loads((folder / "sem_seg_predictions.json").read_text())
        assert {entry["file_name"] for entry in found} == set(names)
        assert {entry["category_id"] for entry in found} <= set(metadata.dataset_ids)
    if "panoptic_seg" in metadata.evaluators:
        content = json.loads((folder / "predictions.json").read_text())
        assert len(content["images"]) == len(content["annotations"]) == test_images
        used = {s["category_id"] for a in content["annotations"] for s in a["segments_info"]}
        assert used <= set(metadata.dataset_ids)
        assert len(list(folder.rglob("*.png"))) >= test_images


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all data sets."""
    folder = tmp_path / "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    return folder


@pytest.mark.parametrize("family", NAMES)
def test_drawn_pictures_from_download_to_scores(family: str, root: Path, tmp_path: Path) -> None:
    make_miniature(family, root)
    check_run(family, tmp_path / "out", test_images=2)


# ------------------------------------------------------------------ real pictures
def copy(source: Path, target: Path, pattern: str = "*") -> int:
    """Copies the files of a folder; the source may be read-only. Returns how many there were."""
    count = 0
    for path in sorted(source.glob(pattern)):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
            count += 1
    return count


def lay_out_ade20k(data: Path, root: Path) -> int:
    """Three real validation pictures, in each of which a thing class is one object; drawn training ones."""
    source, own = data / "layouts" / "ADEChallengeData2016", root / "ADEChallengeData2016"
    write_miniature("ade20k", root, train=4, val=0)
    count = copy(source, own, "images/validation/*")
    assert copy(source, own, "annotations/validation/*") == count
    kinds = np.cumsum([0] + [row["isthing"] for row in read_rows("ade20k_150.json")])
    things = np.array([0] + [row["isthing"] for row in read_rows("ade20k_150.json")])
    for path in (own / "annotations" / "validation").iterdir():
        raw = np.asarray(Image.open(path))
        packed = np.stack([kinds[raw] * things[raw], raw * things[raw], np.zeros_like(raw)], axis=-1)
        target = own / "annotations_instance" / "validation" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(packed.astype(np.uint8)).save(target)
    return count


def lay_out_ade20k_full(data: Path, root: Path) -> int:
    """Three real training pictures, which the index must list; drawn validation ones."""
    write_miniature("ade20k_full", root, train=0, val=2)
    own = root / "ADE20K_2021_17_01"
    copy(data / "layouts" / "ADE20K_2021_17_01", own, "images/ADE/training/urban/street/*")
    index = pickle.loads((own / "index_ade20k.pkl").read_bytes())
    for path in sorted((own / "images/ADE/training/urban/street").glob("*.jpg")):
        index["folder"].append("ADE20K_2021_17_01/images/ADE/training/urban/street")
        index["filename"].append(path.name)
    (own / "index_ade20k.pkl").write_bytes(pickle.dumps(index))
    return 2


def lay_out_cityscapes(data: Path, root: Path) -> int:
    """Four real training pictures and one for validation, without the train ids."""
    for pattern in ("leftImg8bit/*/*/*", "gtFine/*/*/*_gtFine_labelIds.png"):
        assert copy(data / "layouts" / "cityscapes", root / "cityscapes", pattern) == 5
    return 1


def lay_out_coco_stuff(data: Path, root: Path) -> int:
    """21 real pictures, 12 of them for training."""
    for pattern in ("images/*", "annotations/*", "imageLists/*"):
        copy(data / "layouts" / "cocostuff10k_v1.0_converted", root / "coco" / "coco_stuff_10k", pattern)
    return 9


def lay_out_coco_panoptic(data: Path, root: Path) -> int:
    """Two real pictures, for validation; drawn training ones."""
    write_miniature("coco_panoptic", root, train=4, val=0)
    source, own = data / "panoptic_sample", root / "coco"
    assert copy(source / "input_images", own / "val2017") == 2
    assert copy(source / "panoptic_examples", own / "panoptic_val2017") == 2
    shutil.copyfile(source / "panoptic_examples.json", own / "annotations" / "panoptic_val2017.json")
    return 2


def lay_out_mapillary(data: Path, root: Path) -> int:
    """One picture for training and two for validation, of a few pixels each."""
    source = data / "layouts" / "datumaro_synthetic" / "mapillary_vistas_dataset"
    for split, folder in (("train", "training"), ("val", "validation")):
        copy(source / split / "images", root / "mapillary_vistas" / folder / "images")
        copy(source / split / "v1.2" / "labels", root / "mapillary_vistas" / folder / "labels")
    return 2


LAYOUTS: dict[str, Callable[[Path, Path], int]] = {
    "ade20k": lay_out_ade20k,
    "ade20k_panoptic": lay_out_ade20k,
    "ade20k_full": lay_out_ade20k_full,
    "cityscapes": lay_out_cityscapes,
    "coco_panoptic": lay_out_coco_panoptic,
    "coco_stuff": lay_out_coco_stuff,
    "mapillary": lay_out_mapillary,
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_real_pictures_from_download_to_scores(family: str, root: Path, tmp_path: Path) -> None:
    data = os.environ.get("MASKFORMER_TEST_DATA")
    if not data:
        pytest.skip("MASKFORMER_TEST_DATA does not name a folder with real images")
    test_images = LAYOUTS[family](Path(data), root)
    prepare_miniature(family, root)
    check_run(family, tmp_path / "out", test_images)


# ------------------------------------------------------------------ truth as prediction
def truths(name: str) -> Iterator[dict[str, Any]]:
    """Test samples of a data set."""
    dataset = get_dataset(name)
    recipe = TestRecipe(dataset.metadata, "RGB", 0, 0)
    for index in range(len(dataset.records)):
        yield recipe(dataset.records[index])


def as_result(sample: dict[str, Any], metadata: Any) -> dict[str, Any]:
    """What a model would return that knows the truth; where the truth says nothing it says something."""
    result: dict[str, Any] = {}
    if "sem_seg" in sample:
        labels = sample["sem_seg"]
        result["sem_seg_labels"] = torch.where(labels == metadata.ignore_label, 0, labels)
    masks: list[Any] = []
    classes: list[int] = []
    if "pan_seg" in sample:
        ids, segments = sample["pan_seg"]
        kept = [s for s in segments if not s["iscrowd"]]
        shown = torch.isin(ids, torch.tensor([s["id"] for s in kept], dtype=ids.dtype))
        found = [{**s, "isthing": metadata.things[s["category_id"]], "score": 1.0} for s in kept]
        result["panoptic_seg"] = torch.where(shown, ids, 0), found
        objects = [s for s in kept if metadata.things[s["category_id"]]]
        masks, classes = [ids == s["id"] for s in objects], [s["category_id"] for s in objects]
    elif "annotations" in sample:
        from maskformer.data.image_io import decode_segmentation

        size = sample["height"], sample["width"]
        objects = [a for a in sample["annotations"] if not a["iscrowd"]]
        masks = [torch.from_numpy(decode_segmentation(a["segmentation"], *size, "here")) for a in objects]
        classes = [a["category_id"] for a in objects]
    stacked = torch.stack(masks) if masks else torch.zeros((0, sample["height"], sample["width"]), dtype=torch.bool)
    scores = torch.linspace(1.0, 0.5, len(classes))
    result["instances"] = {"masks": stacked, "labels": torch.tensor(classes, dtype=torch.int64), "scores": scores}
    return result


def corrupted(result: dict[str, Any]) -> dict[str, Any]:
    """The same, moved by a few pixels."""
    moved = dict(result)
    if "sem_seg_labels" in moved:
        moved["sem_seg_labels"] = moved["sem_seg_labels"].roll((4, 4), (0, 1))
    if "panoptic_seg" in moved:
        moved["panoptic_seg"] = moved["panoptic_seg"][0].roll((4, 4), (0, 1)), moved["panoptic_seg"][1]
    moved["instances"] = {**moved["instances"], "masks": moved["instances"]["masks"].roll((4, 4), (1, 2))}
    return moved


def score(name: str, change: Callable[[dict[str, Any]], dict[str, Any]], output: Path) -> dict[str, float]:
    """What the evaluators of a data set say of its truth."""
    metadata = get_dataset(name).metadata
    switches = [f"MODEL.MASK_FORMER.TEST.{task}_ON" for task in ("SEMANTIC", "PANOPTIC", "INSTANCE")]
    cfg = get_cfg(None, [word for switch in switches for word in (switch, "True")])
    scores = {}
    evaluators = [e for e in build_evaluators(cfg, metadata, output) if e.name]
    samples = list(truths(name))
    for evaluator in evaluators:
        evaluator.reset([sample["image_id"] for sample in samples], [sample["file_name"] for sample in samples])
        for sample in samples:
            evaluator.process([sample], [change(as_result(sample, metadata))])
        scores |= {f"{evaluator.name}/{key}": value for key, value in evaluator.evaluate().items()}
    return scores


MEASURED = {
    "sem_seg": ("mIoU", "fwIoU", "mACC", "pACC", "PQ_st"),
    "panoptic_seg": ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"),
    "segm": ("AP", "AP50", "AP75"),
}
TESTED = sorted({name for name in dataset_names() if "_train" not in name or not name.startswith("shapes")})


@pytest.mark.parametrize("name", TESTED)
def test_truth_as_prediction_scores_100_and_a_moved_copy_does_not(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.COUNTS, "val", 2)
    if not name.startswith("shapes"):
        make_miniature(family_of(name.replace("camvid_sem_seg_test", "camvid_sem_seg_val")), root)
    exact, moved = (score(name, change, tmp_path / "out") for change in (dict, corrupted))
    metadata = get_dataset(name).metadata
    tasks = {"instances": "segm"}
    expected = {tasks.get(task, task) for task in metadata.evaluators} | (
        {"segm"} if "pan_seg" in metadata.truth else set()
    )
    assert {key.split("/")[0] for key in exact} == expected
    for task in expected:
        for metric in MEASURED[task]:
            key = f"{task}/{metric}"
            assert exact[key] == pytest.approx(100, abs=1e-9), key
            if metric not in ("RQ", "AP50"):  # which small moves need not change
                assert moved[key] < 99, key

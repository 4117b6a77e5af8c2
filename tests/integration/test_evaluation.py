"""Evaluations in and after real runs: they change nothing, read data once, and need no training data."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

from maskformer.data.datasets import coco, shapes
from tests.integration.test_training import TINY, Stopped, assert_same, checkpoint, run, stop_after

AUGMENTED = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "[48, 64]", "TEST.AUG.MAX_SIZE", 96]
SQUARE = [20, 20, 60, 20, 60, 60, 20, 60]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny run; the drawn test sets have 2 scenes."""
    monkeypatch.setitem(shapes.COUNTS, "val", 2)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """The points that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_evaluations_between_stop_and_resume_change_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2, "LOG_PERIOD", 1]
    keys = [*lengths, "DATASETS.TEST", "('shapes_panoptic_val',)"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config, whole, *keys) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # a step beyond the checkpoint and an evaluation; the step is lost
        with pytest.raises(Stopped):
            run(config, parts, *keys)
    kept = (parts / "config.yaml").read_text()
    assert run(config, parts, *keys, "--eval-only", "--resume", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False) == 0
    assert (parts / "config.yaml").read_text() == kept
    written = yaml.safe_load((parts / "config_eval.yaml").read_text())
    assert not written["MODEL"]["MASK_FORMER"]["TEST"]["PANOPTIC_ON"]
    assert run(config, parts, *keys, "--resume") == 0

    one, other = (checkpoint(folder / "model_final.pth") for folder in (whole, parts))
    for part in ("model", "optimizer", "rng", "position", "iteration", "metadata"):
        assert_same(one[part], other[part])
    scores = [json.loads((folder / "metrics.json").read_text().splitlines()[-1]) for folder in (whole, parts)]
    assert "panoptic_seg/PQ" in scores[0]
    assert scores[0] == scores[1]
    # The step that was lost and done again is shown once.
    assert [step for step, _ in curve(parts, "total_loss")] == [0, 1, 2, 3]
    assert curve(parts, "total_loss") == curve(whole, "total_loss")


def test_scales_and_mirrors_come_at_the_end_beside_the_single_scale(config: Path, tmp_path: Path) -> None:
    lengths = [
        "SOLVER.MAX_ITER",
        4,
        "TEST.EVAL_PERIOD",
        2,
        "SOLVER.EMA.ENABLED",
        True,
        "TEST.PQ_STUFF",
        False,
        "SEED",
        5,
    ]
    keys = [*lengths, *AUGMENTED, "DATASETS.TEST", "('shapes_panoptic_val',)"]
    output = tmp_path / "out"
    assert run(config, output, *keys) == 0
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    halfway, final = (r for r in records if "sem_seg/mIoU" in r)
    names = {"TTA/sem_seg/mIoU", "ema/TTA/sem_seg/mIoU"}
    assert names <= final.keys()
    assert not names & halfway.keys()
    assert final["TTA/sem_seg/pACC"] != final["sem_seg/pACC"]
    assert not any(name.endswith("sem_seg/PQ_st") or name.startswith("TTA/panoptic_seg") for name in final)
    assert {"sem_seg_predictions.json", "pictures"} == {path.name for path in (output / "inference_TTA").iterdir()}

    alone, weights = tmp_path / "alone", ["MODEL.WEIGHTS", output / "model_final.pth"]
    assert run(config, alone, *keys, "SOLVER.EMA.ENABLED", False, "--eval-only", *weights) == 0
    scores = json.loads((alone / "inference" / "results.json").read_text())["scores"]
    for name in ("TTA/sem_seg/pACC", "sem_seg/pACC"):
        assert scores[name] == pytest.approx(final[name])
    # One sentence where it would measure nothing.
    assert run(config, alone, *keys, "--eval-only", *weights, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False) == 2


def instance_folder(root: Path) -> str:
    """A COCO-instances data set with the classes of shapes: a polygon, an uncompressed RLE, a crowd."""
    (root / "images" / "val").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(root / "images" / "val" / name)
    rle = {"size": [80, 96], "counts": [1600, 800, 80 * 96 - 2400]}
    segmentations: list[Any] = [(1, [SQUARE], 0), (1, rle, 0), (2, rle, 1), (2, [SQUARE], 0)]
    content = {
        "images": [{"id": i, "file_name": f"{n}.png", "height": 80, "width": 96} for i, n in ((1, "a"), (2, "b"))],
        "categories": [{"id": 10 * i, "name": name} for i, name in enumerate(shapes.THINGS, start=1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 10 * (1 + i % 3), "segmentation": mask, "iscrowd": crowd}
            for i, (image, mask, crowd) in enumerate(segmentations, start=1)
        ],
    }
    (root / "val.json").write_text(json.dumps(content))
    (root / "dataset.yaml").write_text("instances: '{split}.json'\n")
    return f"folder:{root}:val"


def test_two_test_sets_with_pictures_and_files(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: Counter[str] = Counter()
    real = coco.instance_records

    def counting(metadata: Any, *arguments: Any) -> Any:
        listed[metadata.name] += 1
        return real(metadata, *arguments)

    monkeypatch.setattr(coco, "instance_records", counting)
    folder, drawn, output = instance_folder(tmp_path / "set"), "shapes_instance_val", tmp_path / "out"
    keys = {
        "INPUT.DATASET_MAPPER_NAME": "mask_former_instance",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
        "DATASETS.TRAIN": "('shapes_instance_train',)",
        "DATASETS.TEST": (drawn, folder),
        "SOLVER.MAX_ITER": 2,
        "TEST.EVAL_PERIOD": 1,
        "TEST.PICTURES": 4,
    }
    assert run(config, output, *(word for pair in keys.items() for word in pair)) == 0
    assert listed == {folder: 1}  # though checked once and evaluated twice

    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert {f"{drawn}/segm/AP", f"{folder}/segm/AP"} <= lines[-1].keys()
    folders = sorted(path for path in (output / "inference").iterdir() if path.is_dir())
    assert len(folders) == 2
    for one in folders:
        assert isinstance(json.loads((one / "coco_instances_results.json").read_text()), list)
        assert len(list((one / "pictures").glob("*_instance.png"))) == 2


def semantic_folder(root: Path, classes: str) -> None:
    rng = np.random.default_rng(0)
    (root / "dataset.yaml").parent.mkdir(exist_ok=True)
    (root / "dataset.yaml").write_text(f"classes: [{classes}]\n")
    for split in ("train", "val"):
        for kind, shape, high in (("images", (64, 64, 3), 256), ("masks", (64, 64), 3)):
            (root / kind / split).mkdir(parents=True)
            Image.fromarray(rng.integers(0, high, shape).astype(np.uint8)).save(root / kind / split / "a.png")


def test_a_model_file_is_evaluated_without_its_training_data(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create = timm.create_model

    def offline(*arguments: Any, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no connection")
        return create(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    semantic_folder(tmp_path / "set", "sky, road, car")
    semantic_folder(tmp_path / "same", "sky, road, car")
    semantic_folder(tmp_path / "other", "sky, car, road")
    keys = {
        "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
        "DATASETS.TRAIN": f"('folder:{tmp_path / 'set'}:train',)",
        "MODEL.BACKBONE.NAME": "timm",
        "MODEL.TIMM.NAME": "resnet18",
        "SOLVER.MAX_ITER": 1,
    }
    words = [word for pair in keys.items() for word in pair]
    assert run(config, tmp_path / "out", *words, "MODEL.TIMM.PRETRAINED", False) == 0
    # Pretrained weights are not fetched only to be overwritten.
    pretrained = ["MODEL.TIMM.PRETRAINED", True]
    assert run(config, tmp_path / "out", *words, *pretrained, "SOLVER.MAX_ITER", 2, "--resume") == 0
    shutil.rmtree(tmp_path / "set")

    weights = ["--eval-only", "MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth"]
    alone = [*words, *pretrained, *weights, "DATASETS.TEST"]
    output = tmp_path / "eval"
    assert run(config, output, *alone, f"('folder:{tmp_path / 'same'}:val',)") == 0
    assert yaml.safe_load((output / "config.yaml").read_text())["MODEL"]["TIMM"]["PRETRAINED"]
    assert not (output / "config_eval.yaml").exists()
    capsys.readouterr()
    assert run(config, output, *alone, f"('folder:{tmp_path / 'other'}:val',)") == 2
    error = capsys.readouterr().err
    assert "different names for class 1 ('road' and 'car')" in error
    assert "set:train" in error
    assert "other:val" in error

"""The loop over a data set, what is chosen to be measured, tables and pictures."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from maskformer import distributed
from maskformer.config import get_cfg
from maskformer.errors import UserError
from maskformer.evaluation import (
    InstanceEvaluator,
    PanopticEvaluator,
    PictureSaver,
    SemSegEvaluator,
    build_evaluators,
    flatten_results,
    format_results,
    inference_on_dataset,
)
from maskformer.evaluation.loop import Clock
from maskformer.evaluation.predictions import encode_masks


class Oracle(nn.Module):
    """Says what `predict` says."""

    def __init__(self, predict: Any) -> None:
        super().__init__()
        self.predict = predict
        self.dropout = nn.Dropout()
        self.frozen = nn.BatchNorm2d(2).eval()
        self.seen: list[Any] = []

    def infer(self, samples: Any, semantic: str) -> list[dict[str, Any]]:
        assert semantic == "labels"
        assert not self.training
        assert not self.dropout.training
        assert torch.is_inference_mode_enabled()
        self.seen += [sample["image_id"] for sample in samples]
        return [self.predict(sample) for sample in samples]


class Loader:
    """Batches of two, with the records of its data set."""

    def __init__(self, samples: list[Any], listed: list[Any] | None = None) -> None:
        self.samples = samples
        listed = [sample["image_id"] for sample in samples] if listed is None else listed
        self.dataset = SimpleNamespace(records=[{"image_id": i} for i in listed])

    def __len__(self) -> int:
        return -(-len(self.samples) // 2)

    def __iter__(self) -> Iterator[list[Any]]:
        return (self.samples[i : i + 2] for i in range(0, len(self.samples), 2))


def config(pictures: int = 0, test: tuple[str, ...] = ("little",), **switches: bool) -> Any:
    cfg = get_cfg()
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = True
    cfg.MODEL.MASK_FORMER.TEST.update(switches)
    cfg.TEST.PICTURES = pictures
    cfg.DATASETS.TEST = test
    return cfg


def test_results_and_modes(metadata: Any, samples: Any, truth: Any, tmp_path: Path) -> None:
    model = Oracle(truth).train()
    model.frozen.eval()
    evaluators = build_evaluators(config(pictures=2), metadata, tmp_path)
    results = inference_on_dataset(model, Loader(samples), evaluators)
    assert list(results) == ["sem_seg", "panoptic_seg"]
    assert results["sem_seg"]["mIoU"] == pytest.approx(100.0)
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100.0)
    assert model.seen == [0, 1, 2, 3]
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert "inference/sem_seg_predictions.json" in files
    assert "inference/predictions.json" in files
    assert "inference/predictions/scene_3.png" in files
    assert "inference/pictures/01_scene_3_panoptic.png" in files


def test_missing_and_repeated_images(metadata: Any, samples: Any, truth: Any, tmp_path: Path) -> None:
    evaluators = build_evaluators(config(), metadata, tmp_path)
    with pytest.raises(UserError, match="1 of 5 images were not evaluated"):
        inference_on_dataset(Oracle(truth), Loader(samples, [0, 1, 2, 3, 9]), evaluators)
    with pytest.raises(UserError, match="more than once"):
        inference_on_dataset(Oracle(truth), Loader([*samples, samples[0]]), evaluators, expected_ids=range(4))
    assert list(tmp_path.rglob("*.partial")) == []
    assert list(tmp_path.rglob("*.json")) == []


def test_an_error_restores_modes_and_leaves_no_files(metadata: Any, samples: Any, truth: Any, tmp_path: Path) -> None:
    def fails_later(sample: Any) -> Any:
        if sample["image_id"] == 2:
            raise UserError("broken")
        return truth(sample)

    model = Oracle(fails_later).train()
    with pytest.raises(UserError, match="broken"):
        inference_on_dataset(model, Loader(samples), build_evaluators(config(), metadata, tmp_path))
    assert model.training
    assert [p for p in tmp_path.rglob("*") if "partial" in p.name or p.suffix == ".json"] == []


def test_progress_lines_with_time_left(
    metadata: Any, samples: Any, truth: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskformer.evaluation.loop.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, "maskformer"):
        inference_on_dataset(Oracle(truth), Loader(samples), build_evaluators(config(), metadata, None))
    lines = [record.getMessage() for record in caplog.records]
    number = r"\d+\.\d{4} s/iter\. "
    pattern = rf"Inference done 2/2\. Dataloading: {number}Inference: {number}Eval: {number}Total: {number}ETA=0:00:00"
    assert any(re.fullmatch(pattern, line) for line in lines), lines
    assert lines[-1].startswith("Predicted 4 images in")


def test_only_the_main_process_speaks_and_at_the_end_of_all_images(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskformer.evaluation.loop.SECONDS_BETWEEN_LINES", 0.0)
    batches, other = [[{}, {}], [{}]], (4, {"data": 0.5, "inference": 6.0, "evaluation": 1.0})
    for main, expected in ((True, 3), (False, 0)):
        monkeypatch.setattr(distributed, "is_main", lambda main=main: main)
        monkeypatch.setattr(distributed, "gather_to_main", lambda own, main=main: [own, other] if main else [])
        caplog.clear()
        with caplog.at_level(logging.INFO, "maskformer"), Clock(batches, torch.device("cpu")) as clock:
            assert list(clock.fetch()) == batches
        assert len(caplog.records) == expected
        if main:
            number = r"\d+\.\d{4}"
            pattern = rf"Predicted 7 images in .*: 2 processes, each data {number}, inference 0\.8571, evaluation .*"
            assert re.fullmatch(pattern, caplog.records[-1].getMessage())


def test_cuda_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    now = iter([1.0, 2.0, 10.0, 30.0])
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name, expected in (("cpu", []), ("cuda:1", [torch.device("cuda:1")])):
        clock = Clock([], torch.device(name))
        monkeypatch.setattr("maskformer.evaluation.loop.time", SimpleNamespace(perf_counter=lambda: next(now)))
        with clock.timing("inference"):
            assert not waited
        assert waited == expected
    assert clock.seconds["inference"] == 20.0


def test_progress_bar_on_a_terminal(
    metadata: Any, samples: Any, truth: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    results = inference_on_dataset(Oracle(truth), Loader(samples), build_evaluators(config(), metadata, None))
    assert results["sem_seg"]["mIoU"] == pytest.approx(100.0)


# ---------------------------------------------------------------- what is measured
def kinds(evaluators: Any) -> list[type]:
    return [type(evaluator) for evaluator in evaluators]


def test_what_is_measured(metadata: Any, tmp_path: Path) -> None:
    assert kinds(build_evaluators(config(), metadata, None)) == [SemSegEvaluator, PanopticEvaluator]
    assert kinds(build_evaluators(config(PANOPTIC_ON=False), metadata, None)) == [SemSegEvaluator]
    assert kinds(build_evaluators(config(SEMANTIC_ON=False), metadata, None)) == [PanopticEvaluator]
    everything = [SemSegEvaluator, PanopticEvaluator, InstanceEvaluator]
    assert kinds(build_evaluators(config(INSTANCE_ON=True), metadata, None)) == everything
    assert kinds(build_evaluators(config(pictures=3, SEMANTIC_ON=False), metadata, tmp_path)) == [
        PanopticEvaluator,
        PictureSaver,
    ]
    with pytest.raises(UserError, match=r"nothing can be measured on little .*SEMANTIC_ON or .*PANOPTIC_ON"):
        build_evaluators(config(SEMANTIC_ON=False, PANOPTIC_ON=False), metadata, None)


def test_several_test_sets_have_a_folder_each(metadata: Any, tmp_path: Path) -> None:
    evaluators = build_evaluators(config(test=("little", "other")), metadata, tmp_path)
    assert evaluators[0].output_dir == tmp_path / "inference" / "little"
    averaged = build_evaluators(config(), metadata, tmp_path, folder_name="inference_ema")
    assert averaged[0].output_dir == tmp_path / "inference_ema"


# ---------------------------------------------------------------- tables
def test_tables() -> None:
    results = {
        "sem_seg": {"mIoU": 41.236, "fwIoU": 50.0, "IoU-sky": 80.0, "ACC-sky": 81.5, "IoU-ice-cream": math.nan},
        "panoptic_seg": {m + s: 30.0 for s in ("", "_th", "_st") for m in ("PQ", "SQ", "RQ")} | {"PQ-sky": 12.345},
    }
    assert format_results(results, SimpleNamespace(name="little")) == "\n".join(
        [
            "Semantic segmentation on little:",
            "|  mIoU | fwIoU |",
            "|------:|------:|",
            "| 41.24 | 50.00 |",
            "",
            "| class     |   IoU |   ACC |",
            "|-----------|------:|------:|",
            "| sky       | 80.00 | 81.50 |",
            "| ice-cream |     - |     - |",
            "",
            "Panoptic segmentation on little:",
            "|        |    PQ |    SQ |    RQ |",
            "|--------|------:|------:|------:|",
            "| All    | 30.00 | 30.00 | 30.00 |",
            "| Things | 30.00 | 30.00 | 30.00 |",
            "| Stuff  | 30.00 | 30.00 | 30.00 |",
            "",
            "| class |    PQ |",
            "|-------|------:|",
            "| sky   | 12.35 |",
        ]
    )


def test_many_classes_stand_in_columns() -> None:
    metrics = {f"{m}-class{i:03d}": float(i) for m in ("IoU", "ACC") for i in range(150)}
    table = format_results({"sem_seg": {"mIoU": 1.0, **metrics}}).split("\n\n")[1].splitlines()
    assert len(table) == 2 + 38
    assert len({len(line) for line in table}) == 1
    assert len(table[0]) <= 120
    assert all(f"class{i:03d}" in "\n".join(table) for i in range(150))


def test_flat_names() -> None:
    assert flatten_results({"sem_seg": {"mIoU": 1}, "segm": {"AP": 2.5}}) == {"sem_seg/mIoU": 1.0, "segm/AP": 2.5}


# ---------------------------------------------------------------- pictures
def saved(saver: PictureSaver, samples: Any, predict: Any, ids: Any) -> list[str]:
    saver.reset(ids)
    for sample in samples:
        saver.process([sample], [predict(sample)])
    assert saver.evaluate() == {}
    return sorted(path.name for path in saver.pictures.values())


def test_pictures_spread_over_the_data_set(metadata: Any, samples: Any, spoiled: Any, tmp_path: Path) -> None:
    saver = PictureSaver(tmp_path, 2, metadata)
    tasks = ("instance", "panoptic", "semantic")
    names = [f"{n:02d}_scene_{i}_{task}.png" for n, i in enumerate((0, 3)) for task in tasks]
    assert saved(saver, samples, spoiled, [0, 1, 2, 3]) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert next(iter(saver.pictures)) == "semantic/00_scene_0"
    # Without knowing the data set: the first ones.
    assert saved(saver, samples, spoiled, None)[-1] == "01_scene_1_semantic.png"
    # More pictures than images: each once.
    assert len(saved(PictureSaver(tmp_path, 9, metadata), samples, spoiled, [0, 1, 2, 3])) == 12


def test_pictures_show_image_truth_and_prediction(metadata: Any, samples: Any, truth: Any, tmp_path: Path) -> None:
    saver = PictureSaver(tmp_path, 1, metadata, "BGR")
    red = torch.zeros(3, 24, 32, dtype=torch.uint8)
    red[2] = 255  # BGR, half the size of the truth
    samples[0]["image"] = red
    saved(saver, samples[:1], truth, [0])
    picture = np.asarray(Image.open(saver.pictures["semantic/00_scene_0"]))
    height, width = picture.shape[:2]
    assert width > 3 * 640
    assert (picture[height // 2, 100] == (255, 0, 0)).all()
    title = height - height // 2  # truth and prediction show the same: compare a patch below the middle
    left, right = picture[title : title + 40, 700:900], picture[title : title + 40, 700 + 647 : 900 + 647]
    assert any((picture[title : title + 40, 700 + d : 900 + d] == left).all() for d in range(640, 670)), right.shape


def test_pictures_of_true_instances_of_every_kind(metadata: Any, tmp_path: Path) -> None:
    """Polygons, RLE and compressed RLE of the same square give the same picture; crowd is left out."""
    square = np.zeros((6, 8), dtype=bool)
    square[1:4, 2:5] = True
    result = {
        "instances": {"masks": torch.from_numpy(square[None]), "labels": torch.tensor([2]), "scores": torch.ones(1)}
    }
    pictures = []
    for number, segmentation in enumerate(
        (
            encode_masks(square[None])[0],
            [[2, 1, 5, 1, 5, 4, 2, 4]],
            {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 20]},
        )
    ):
        crowd = {"category_id": 3, "iscrowd": 1, "segmentation": {"size": [6, 8], "counts": [0, 48]}}
        sample = {
            "image": torch.zeros(3, 6, 8, dtype=torch.uint8),
            "height": 6,
            "width": 8,
            "file_name": "a.jpg",
            "image_id": 0,
            "annotations": [{"category_id": 2, "segmentation": segmentation}, crowd],
        }
        saver = PictureSaver(tmp_path / str(number), 1, metadata)
        saver.process([sample], [result])
        with Image.open(saver.pictures["instance/00_a"]) as picture:
            pictures.append(np.asarray(picture))
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_large_images_are_shrunk(metadata: Any, tmp_path: Path) -> None:
    sample = {
        "image": torch.zeros(3, 50, 100, dtype=torch.uint8),
        "height": 2000,
        "width": 4000,
        "file_name": "big.jpg",
        "image_id": 0,
        "sem_seg": torch.zeros(2000, 4000, dtype=torch.int32),
    }
    saver = PictureSaver(tmp_path, 1, metadata)
    saver.process([sample], [{"sem_seg_labels": torch.ones(2000, 4000, dtype=torch.int64)}])
    with Image.open(saver.pictures["semantic/00_big"]) as picture:
        assert 3 * 1024 <= picture.width <= 3 * 1024 + 100

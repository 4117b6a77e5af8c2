"""Our evaluators and Detectron2's own measure the same, on predictions that are neither right nor wrong throughout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.structures import Instances

from maskformer.errors import UserError
from maskformer.integrations.detectron2 import catalog, data, evaluation
from maskformer.integrations.detectron2.command import build_config
from tests.miniatures import NAMES, make_miniature

ADE20K = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"
COCO = "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"
ROOT = Path(__file__).parents[2]
CPU = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0]


class Shifted(nn.Module):
    """Predicts the truth, moved to the right, with some of the segments taken for another class.

    Args:
        things: K flags.
    """

    def __init__(self, things: Sequence[bool]) -> None:
        super().__init__()
        self.things = things

    def forward(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self.result(sample) for sample in samples]

    def result(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if "sem_seg" in sample:
            labels = torch.roll(sample["sem_seg"].long(), 5, dims=1)
            labels[labels >= len(self.things)] = 3
            labels[:20] = 7
            result["sem_seg"] = nn.functional.one_hot(labels, len(self.things)).permute(2, 0, 1).float()
        if "pan_seg" in sample:
            result["panoptic_seg"] = self.panoptic(*sample["pan_seg"])
        return result

    def panoptic(self, true_ids: torch.Tensor, true: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, Any]:
        ids, segments = torch.zeros_like(true_ids), []
        for number, segment in enumerate(true, start=1):
            label = segment["category_id"] if number != 2 else (segment["category_id"] + 1) % len(self.things)
            mask = torch.roll(true_ids == segment["id"], 2 + number, dims=1)
            ids[mask] = number
            segments.append(
                {"id": number, "category_id": label, "isthing": bool(self.things[label]), "score": 0.9, "area": 1}
            )
        present = set(ids.unique().tolist())
        return ids, [segment for segment in segments if segment["id"] in present]


@pytest.fixture
def prepared(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes a family's miniature, and both catalogs as if Detectron2 had none of its names; gives its test set."""
    before = [dict(each) for each in (DatasetCatalog, MetadataCatalog)]
    ours = dict(catalog._OURS)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(make_miniature(request.param, tmp_path, val=3)))
    for name in NAMES[request.param]:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    catalog.register_datasets()
    yield NAMES[request.param][1]
    for each, content in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        each.clear()
        each.update(content)
    catalog._OURS.clear()
    catalog._OURS.update(ours)


def measure(config_file: str, name: str, output: Path, *words: Any) -> list[dict[str, Any]]:
    """Metrics of our evaluators and of Detectron2's, which see the same results one after the other."""
    metadata = catalog.get_metadata(name)
    keys = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
    keys += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", metadata.num_classes]
    keys += ["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", metadata.ignore_label]
    cfg = build_config(config_file, [*CPU, "OUTPUT_DIR", str(output), *keys, *words])
    model = Shifted(metadata.things)
    theirs = evaluation.build_detectron2_evaluator(cfg, name, output / "theirs")
    ours = evaluation.build_evaluator(cfg, name)
    results: list[dict[str, Any]] = []

    class Both(DatasetEvaluators):  # ours first: Detectron2's panoptic one writes into what it is given
        def evaluate(self) -> dict[str, Any]:
            results.extend(dict(evaluator.evaluate()) for evaluator in self._evaluators)
            return results[0]

    inference_on_dataset(model, data.build_test_loader(cfg, name), Both([ours, theirs]))
    return results


def assert_equal(ours: Mapping[str, float], theirs: Mapping[str, float], metrics: Sequence[str]) -> None:
    for metric in metrics:
        np.testing.assert_allclose(ours[metric], theirs[metric], rtol=0, atol=1e-9, err_msg=metric)


@pytest.mark.parametrize("prepared", ["ade20k", "camvid", "coco_stuff", "mapillary", "ade20k_full"], indirect=True)
def test_detectron2_semantic_metrics_are_ours(prepared: str, tmp_path: Path) -> None:
    ours, theirs = (found["sem_seg"] for found in measure(ADE20K, prepared, tmp_path / "out"))
    assert 5 < ours["mIoU"] < 95
    classes = catalog.get_metadata(prepared).classes
    assert_equal(ours, theirs, ["mIoU", "fwIoU", "mACC", "pACC", *(f"IoU-{name}" for name in classes)])
    assert (tmp_path / "out" / "inference" / "sem_seg_predictions.json").is_file()
    assert (tmp_path / "out" / "theirs" / "sem_seg_predictions.json").is_file()


@pytest.mark.parametrize("family", ["ade20k", "cityscapes"])
def test_detectron2_evaluation_reads_what_training_reads_of_the_sets_it_knows(family: str, tmp_path: Path) -> None:
    """In a process of its own: Detectron2 fixes its root of data sets when it is imported.

    Its listing of Cityscapes asks for files that neither training nor evaluating needs, and that are not there.
    """
    root = make_miniature(family, tmp_path / "data", val=3)
    script = str(ROOT / "tests" / "integration" / "detectron2_registered.py")
    line = [sys.executable, script, NAMES[family][1], str(tmp_path / "out")]
    environment = os.environ | {"DETECTRON2_DATASETS": str(root), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("prepared", ["coco_panoptic", "ade20k_panoptic"], indirect=True)
def test_detectron2_panoptic_metrics_are_ours(prepared: str, tmp_path: Path) -> None:
    pytest.importorskip("panopticapi", reason="panopticapi, which Detectron2 measures PQ with, is not installed")
    ours, theirs = measure(COCO, prepared, tmp_path / "out")
    assert 20 < ours["panoptic_seg"]["PQ"] < 90
    metrics = [f"{metric}{part}" for metric in ("PQ", "SQ", "RQ") for part in ("", "_th", "_st")]
    assert_equal(ours["panoptic_seg"], theirs["panoptic_seg"], metrics)
    if prepared.startswith("ade20k"):  # which measures both
        assert_equal(ours["sem_seg"], theirs["sem_seg"], ["mIoU", "fwIoU", "mACC", "pACC"])


def test_detectron2_evaluators_of_drawn_scenes_can_only_be_ours(tmp_path: Path) -> None:
    words = ["DATASETS.TEST", "('shapes_panoptic_val',)", "OUTPUT_DIR", str(tmp_path)]
    cfg = build_config("configs/quickstart/shapes_panoptic.yaml", [*CPU, *words])
    with pytest.raises(UserError, match="on disk"):
        evaluation.build_detectron2_evaluator(cfg, "shapes_panoptic_val")
    names = [own.name for own in evaluation.build_evaluator(cfg, "shapes_panoptic_val").evaluators]
    assert names[:2] == ["sem_seg", "panoptic_seg"]


def test_detectron2_results_in_our_types() -> None:
    instances = Instances((2, 3))
    instances.pred_masks = torch.zeros(1, 2, 3, dtype=torch.bool)
    instances.pred_classes, instances.scores = torch.tensor([4]), torch.tensor([0.5])
    segments = [{"id": 1, "category_id": 2, "isthing": True}]
    scores = torch.tensor([[[0.1, 0.9]], [[0.2, 0.8]]])
    output = {"instances": instances, "panoptic_seg": (torch.ones(2, 3), segments), "sem_seg": scores}
    found = evaluation.own_result(output)
    assert found["sem_seg_labels"].tolist() == [[1, 0]]
    assert found["instances"]["labels"].tolist() == [4]
    assert found["instances"]["masks"].shape == (1, 2, 3)
    segments[0].pop("isthing")  # as Detectron2's evaluator does
    assert found["panoptic_seg"][1] == [{"id": 1, "category_id": 2, "isthing": True}]
    assert "sem_seg" in output


@pytest.mark.parametrize("prepared", ["ade20k"], indirect=True)
def test_detectron2_evaluation_misses_no_image(prepared: str, tmp_path: Path) -> None:
    cfg = build_config(ADE20K, [*CPU, "OUTPUT_DIR", str(tmp_path / "out")])
    evaluator = evaluation.build_evaluator(cfg, prepared)
    samples = [sample for (sample,) in data.build_test_loader(cfg, prepared)]
    model = Shifted([False] * 150)
    evaluator.reset()
    evaluator.process(samples[:2], model(samples[:2]))
    with pytest.raises(UserError, match="1 of 3 images were not evaluated"):
        evaluator.evaluate()

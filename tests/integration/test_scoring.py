"""From a data set on disk to scores of its truth and of a spoiled copy, by evaluation and from the files it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskformer.config import get_cfg
from maskformer.data import get_dataset
from maskformer.data.image_io import decode_segmentation
from maskformer.data.recipes import TestRecipe
from maskformer.evaluation import build_evaluators, inference_on_dataset
from maskformer.score import main
from tests.miniatures import make_miniature

WHAT = {"sem_seg": "mIoU", "panoptic_seg": "PQ", "segm": "AP"}
FILES = {
    "sem_seg": ("sem_seg", "sem_seg_predictions.json"),
    "panoptic_seg": ("panoptic_seg", "predictions.json"),
    "segm": ("instances", "coco_instances_results.json"),
}


class Oracle(nn.Module):
    """Answers with the truth, moved by some pixels."""

    def __init__(self, things: Sequence[bool], ignore_label: int, move: int) -> None:
        super().__init__()
        self.things = things
        self.ignore_label = ignore_label
        self.move = move

    def infer(self, samples: Sequence[Any], semantic: str) -> list[dict[str, Any]]:
        return [self.answer(sample) for sample in samples]

    def answer(self, sample: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if "sem_seg" in sample:
            labels = torch.as_tensor(sample["sem_seg"]).long()
            labels[labels == self.ignore_label] = 0
            result["sem_seg_labels"] = torch.roll(labels, self.move, 1)
        if "annotations" in sample:
            size = sample["height"], sample["width"]
            things = [a for a in sample["annotations"] if not a["iscrowd"]]
            masks = [torch.from_numpy(decode_segmentation(a["segmentation"], *size, "")) for a in things]
        else:
            ids, listed = torch.as_tensor(sample["pan_seg"][0]), sample["pan_seg"][1]
            kept = [s for s in listed if not s["iscrowd"]]  # where a crowd is, nothing is predicted
            known = torch.tensor([0, *(s["id"] for s in kept)])
            moved = torch.roll(torch.where(torch.isin(ids, known), ids, 0), self.move, 1)
            result["panoptic_seg"] = moved, [{**s, "score": 0.5} for s in kept]
            things = [s for s in kept if self.things[s["category_id"]]]
            masks = [ids == s["id"] for s in things]
        result["instances"] = {
            "masks": torch.roll(torch.stack(masks), self.move, 2),
            "labels": torch.tensor([a["category_id"] for a in things]),
            "scores": torch.rand(len(masks), generator=torch.Generator().manual_seed(len(masks))),
        }
        return result


class Loader:
    """Samples of a data set, one a batch."""

    def __init__(self, name: str) -> None:
        self.dataset = get_dataset(name)
        self.recipe = TestRecipe(self.dataset.metadata, "RGB", 0, 1000)

    def __iter__(self) -> Iterator[list[Any]]:
        return ([self.recipe(record)] for record in self.dataset.records)


def evaluate(name: str, move: int, output: Path) -> dict[str, dict[str, float]]:
    test = "MODEL.MASK_FORMER.TEST."
    cfg = get_cfg(None, [f"{test}PANOPTIC_ON", "True", f"{test}INSTANCE_ON", "True", "TEST.PICTURES", "0"])
    loader = Loader(name)
    metadata = loader.dataset.metadata
    evaluators = build_evaluators(cfg, metadata, output)
    return inference_on_dataset(Oracle(metadata.things, metadata.ignore_label, move), loader, evaluators)


@pytest.mark.parametrize(
    ("family", "name", "tasks"),
    [
        ("ade20k_panoptic", "ade20k_panoptic_val", ["sem_seg", "panoptic_seg", "segm"]),
        ("coco_panoptic", "coco_2017_val_panoptic", ["panoptic_seg", "segm"]),
        (None, "shapes_instance_val", ["segm"]),
    ],
)
def test_truth_scores_100_and_files_score_as_evaluation_does(
    family: str | None,
    name: str,
    tasks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    if family is not None:
        make_miniature(family, tmp_path / "data", train=2, val=3)
    perfect, spoiled = evaluate(name, 0, tmp_path / "true"), evaluate(name, 7, tmp_path / "moved")
    assert list(perfect) == list(spoiled) == tasks
    for task in tasks:
        values = {key: value for key, value in perfect[task].items() if not math.isnan(value)}
        assert values == pytest.approx(dict.fromkeys(values, 100.0))
        assert spoiled[task][WHAT[task]] < 95
        kind, file_name = FILES[task]
        words = ["--task", kind, "--predictions", str(tmp_path / "moved" / "inference" / file_name), "--dataset", name]
        assert main([*words, "--workers", "2", "--json", str(tmp_path / "scores.json")]) == 0
        written = json.loads((tmp_path / "scores.json").read_text())["scores"]
        assert written == {f"{task}/{k}": None if math.isnan(v) else v for k, v in spoiled[task].items()}
    capsys.readouterr()

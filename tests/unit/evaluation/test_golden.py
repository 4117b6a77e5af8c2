"""Metrics against values measured once on the published evaluation code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskformer.evaluation import PanopticQuality, SemanticQuality, SemSegEvaluator, semantic_segments

PARITY = Path(__file__).parents[2] / "data" / "parity"


@pytest.fixture(scope="module")
def semantic() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((PARITY / "semantic_quality.json").read_text()), dict(np.load(PARITY / "semantic_quality.npz"))


@pytest.fixture(scope="module")
def panoptic() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((PARITY / "panoptic_quality.json").read_text()), dict(np.load(PARITY / "panoptic_quality.npz"))


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def test_semantic_quality(semantic: Any) -> None:
    info, maps = semantic
    names = [f"c{i}" for i in range(info["num_classes"])]
    quality = SemanticQuality(info["num_classes"], info["ignore_label"], names)
    for i in range(len(maps) // 2):
        quality.update(maps[f"pred_{i}"], maps[f"gt_{i}"])
    result, expected = quality.compute(), info["expected"]
    for metric in ("mIoU", "fwIoU", "mACC", "pACC"):
        assert result[metric] == exactly(expected[metric])
    assert [result[f"IoU-{name}"] for name in names] == exactly(expected["IoU_per_class"])


def test_quality_of_stuff_of_a_semantic_model(semantic: Any) -> None:
    info, maps = semantic
    quality = PanopticQuality(dict.fromkeys(range(info["num_classes"]), False))
    for i in range(len(maps) // 2):
        predicted = semantic_segments(maps[f"pred_{i}"], info["ignore_label"])
        quality.update(*predicted, *semantic_segments(maps[f"gt_{i}"], info["ignore_label"]))
    result, expected = quality.compute(), info["expected"]
    for metric in ("PQ", "SQ", "RQ"):
        assert result[metric] == result[f"{metric}_st"] == exactly(100 * expected["PQ_stuff"][metric.lower()])
        for label, values in quality.per_class().items():
            assert values[metric] == exactly(expected["PQ_per_class"][str(label)][metric.lower()])


def test_quality_of_stuff_from_the_counts_of_each_image(semantic: Any) -> None:
    info, maps = semantic
    classes, ignore = info["num_classes"], info["ignore_label"]
    evaluator = SemSegEvaluator([f"c{i}" for i in range(classes)], ignore)
    for i in range(len(maps) // 2):
        evaluator.count(maps[f"pred_{i}"], maps[f"gt_{i}"])
    result = evaluator.finish([evaluator.partial()])
    assert result["PQ_st"] == exactly(100 * info["expected"]["PQ_stuff"]["pq"])
    assert result["mIoU"] == exactly(info["expected"]["mIoU"])
    assert "PQ_st" not in SemSegEvaluator(["a"], 255, pq_stuff=False).metric_names()


def panoptic_quality_of(info: dict[str, Any], maps: dict[str, np.ndarray], chosen: range) -> PanopticQuality:
    quality = PanopticQuality({c["id"]: c["isthing"] for c in info["categories"]})
    for i in chosen:
        true, predicted = info["ground_truth"][i], info["predictions"][i]
        assert true["image_id"] == predicted["image_id"] == i
        quality.update(maps[f"pred_{i}"], predicted["segments_info"], maps[f"gt_{i}"], true["segments_info"])
    return quality


def test_panoptic_quality(panoptic: Any) -> None:
    info, maps = panoptic
    quality = panoptic_quality_of(info, maps, range(len(info["predictions"])))
    result = quality.compute()
    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for metric in ("PQ", "SQ", "RQ"):
            assert result[metric + suffix] == exactly(100 * info["expected"][group][metric.lower()])
    for category, values in quality.per_class().items():
        for metric in ("PQ", "SQ", "RQ"):
            assert values[metric] == exactly(info["expected_per_class"][str(category)][metric.lower()])


def test_parts_merge_to_the_whole(panoptic: Any, semantic: Any) -> None:
    info, maps = panoptic
    count = len(info["predictions"])
    merged = panoptic_quality_of(info, maps, range(3)).merge(panoptic_quality_of(info, maps, range(3, count)))
    assert merged.compute() == exactly(panoptic_quality_of(info, maps, range(count)).compute())

    info, maps = semantic
    parts = []
    for chosen in (range(2), range(2, 5), range(5)):
        parts.append(SemanticQuality(info["num_classes"], info["ignore_label"]))
        for i in chosen:
            parts[-1].update(maps[f"pred_{i}"], maps[f"gt_{i}"])
    assert parts[0].merge(parts[1]).compute() == parts[2].compute()

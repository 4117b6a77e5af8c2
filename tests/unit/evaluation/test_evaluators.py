"""Evaluators: right scores, every image once, files that decode back to what was predicted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskformer.errors import UserError
from maskformer.evaluation import (
    InstanceEvaluator,
    PanopticEvaluator,
    PanopticQuality,
    SemanticQuality,
    SemSegEvaluator,
)
from maskformer.evaluation.predictions import JsonStream, decode_mask, encode_label_map, encode_masks, read_panoptic_png


def all_evaluators(metadata: Any, folder: Path | None = None) -> list[Any]:
    return [
        SemSegEvaluator(metadata.classes, metadata.ignore_label, metadata.dataset_ids, folder),
        PanopticEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, folder),
        InstanceEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, folder),
    ]


def scores(evaluator: Any, samples: Any, predict: Any) -> dict[str, float]:
    evaluator.reset([sample["image_id"] for sample in samples])
    evaluator.process(samples[:3], [predict(sample) for sample in samples[:3]])
    evaluator.process(samples[3:], [predict(sample) for sample in samples[3:]])
    return evaluator.evaluate()


MAIN = {"sem_seg": "mIoU", "panoptic_seg": "PQ", "segm": "AP"}


def test_truth_as_prediction_scores_100_and_a_spoiled_copy_does_not(
    metadata: Any, samples: Any, truth: Any, spoiled: Any
) -> None:
    for evaluator in all_evaluators(metadata):
        perfect = scores(evaluator, samples, truth)
        values = [value for value in perfect.values() if not math.isnan(value)]
        assert values == pytest.approx([100.0] * len(values))
        assert len(values) >= 6
        worse = scores(evaluator, samples, spoiled)  # reset forgets the first round
        assert 5 < worse[MAIN[evaluator.name]] < 95
        assert list(worse) == list(perfect)


def test_every_image_is_counted_once(metadata: Any, samples: Any, truth: Any) -> None:
    for evaluator in all_evaluators(metadata):
        evaluator.reset()
        evaluator.process(samples, [truth(sample) for sample in samples])
        evaluator.process(samples[2:3], [truth(samples[2])])
        with pytest.raises(UserError, match=r"1 images were evaluated more than once \(image_id 2\)"):
            evaluator.evaluate()
        evaluator.reset(range(6))
        evaluator.process(samples, [truth(sample) for sample in samples])
        with pytest.raises(UserError, match=r"2 of 6 images were not evaluated \(image_id 4, 5\)"):
            evaluator.evaluate()
        evaluator.reset([0, 1, 2, 3, 3])
        evaluator.process(samples, [truth(sample) for sample in samples])
        with pytest.raises(UserError, match="1 image ids occur more than once"):
            evaluator.evaluate()
        evaluator.reset()
        with pytest.raises(UserError, match="no image was evaluated"):
            evaluator.evaluate()


def test_another_size_than_the_truth_names_the_file(metadata: Any, samples: Any, truth: Any) -> None:
    result = truth(samples[0])
    ids, segments = result["panoptic_seg"]
    small = {
        "sem_seg_labels": result["sem_seg_labels"][:24],
        "panoptic_seg": (ids[:24], segments),
        "instances": {**result["instances"], "masks": result["instances"]["masks"][:, :24]},
    }
    for evaluator in all_evaluators(metadata):
        with pytest.raises(UserError, match=r"scene_0.jpg: the prediction is 24x64 but the truth 48x64"):
            evaluator.process(samples[:1], [small])


def test_truth_or_result_that_is_not_there(metadata: Any, samples: Any, truth: Any) -> None:
    bare = {key: samples[0][key] for key in ("image", "height", "width", "file_name", "image_id")}
    for evaluator, keys in zip(all_evaluators(metadata), ("'sem_seg'", "'pan_seg'", "'annotations'"), strict=True):
        with pytest.raises(UserError, match=f"scene_0.jpg: the data set has .*{keys}"):
            evaluator.process([bare], [truth(samples[0])])
        evaluator.reset()
        with pytest.raises(UserError, match=r"scene_0.jpg: the model gives no"):
            evaluator.process(samples[:1], [{}])


def test_wrong_label_in_the_truth_names_the_file(metadata: Any, samples: Any, truth: Any) -> None:
    result = truth(samples[1])
    samples[1]["sem_seg"][5, 5] = 77
    with pytest.raises(UserError, match=r"scene_1.jpg: the truth has label 77"):
        all_evaluators(metadata)[0].process(samples[1:2], [result])


def test_scores_are_taken_if_there_are_no_labels(metadata: Any, samples: Any, truth: Any) -> None:
    labels = truth(samples[0])["sem_seg_labels"]
    one_hot = torch.nn.functional.one_hot(labels, 4).permute(2, 0, 1).float()
    evaluator = all_evaluators(metadata)[0]
    evaluator.process(samples[:1], [{"sem_seg": one_hot}])
    assert evaluator.evaluate()["mIoU"] == 100.0


# ---------------------------------------------------------------- files
def test_semantic_predictions_decode_to_the_same_score(
    metadata: Any, samples: Any, spoiled: Any, tmp_path: Path
) -> None:
    result = scores(all_evaluators(metadata, tmp_path)[0], samples, spoiled)
    written = json.loads((tmp_path / "sem_seg_predictions.json").read_text())
    quality = SemanticQuality(4, metadata.ignore_label)
    for sample in samples:
        label_map = np.full((48, 64), metadata.ignore_label)
        for item in written:
            assert set(item) == {"file_name", "category_id", "segmentation"}
            if item["file_name"] == sample["file_name"]:
                label_map[decode_mask(item["segmentation"])] = metadata.dataset_ids.index(item["category_id"])
        assert (label_map == spoiled(sample)["sem_seg_labels"].numpy()).all()
        quality.update(label_map, sample["sem_seg"])
    assert quality.compute()["mIoU"] == result["mIoU"]


def test_panoptic_predictions_decode_to_the_same_score(
    metadata: Any, samples: Any, spoiled: Any, tmp_path: Path
) -> None:
    result = scores(all_evaluators(metadata, tmp_path)[1], samples, spoiled)
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert written["images"][0] == {"id": 0, "file_name": "scene_0.jpg", "height": 48, "width": 64}
    assert written["categories"][2] == {"id": 17, "name": "cat", "isthing": 1}
    quality = PanopticQuality({c["id"]: c["isthing"] for c in written["categories"]})
    for sample, annotation in zip(samples, written["annotations"], strict=True):
        assert annotation["image_id"] == sample["image_id"]
        ids = read_panoptic_png(tmp_path / "predictions" / annotation["file_name"])
        assert (ids == spoiled(sample)["panoptic_seg"][0].numpy()).all()
        assert all((ids == s["id"]).sum() == s["area"] for s in annotation["segments_info"])
        true_segments = [{**s, "category_id": metadata.dataset_ids[s["category_id"]]} for s in sample["pan_seg"][1]]
        quality.update(ids, annotation["segments_info"], sample["pan_seg"][0], true_segments)
    assert quality.compute() == {k: v for k, v in result.items() if "-" not in k}


def test_panoptic_file_copies_images_and_categories_of_the_truth(
    metadata: Any, samples: Any, truth: Any, tmp_path: Path
) -> None:
    tables = {"images": [{"id": 0, "license": 3}], "categories": [{"id": 17, "supercategory": "animal"}]}
    (tmp_path / "truth.json").write_text(json.dumps({**tables, "annotations": []}))
    evaluator = PanopticEvaluator(
        metadata.classes, metadata.things, metadata.dataset_ids, tmp_path, tmp_path / "truth.json"
    )
    scores(evaluator, samples, truth)
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert {key: written[key] for key in tables} == tables
    assert len(written["annotations"]) == 4


def test_images_of_the_same_stem_do_not_overwrite_each_other(
    metadata: Any, samples: Any, truth: Any, tmp_path: Path
) -> None:
    for sample, folder in zip(samples, "abcd", strict=True):
        sample.update(file_name=f"{folder}/0001.jpg", image_id=f"{folder}/0001")
    scores(all_evaluators(metadata, tmp_path)[1], samples, truth)
    names = [a["file_name"] for a in json.loads((tmp_path / "predictions.json").read_text())["annotations"]]
    assert names == ["0001.png", "b_0001.png", "c_0001.png", "d_0001.png"]
    assert sorted(p.name for p in (tmp_path / "predictions").iterdir()) == sorted(names)


def test_an_evaluation_that_stops_leaves_no_half_file_and_keeps_the_old_one(
    metadata: Any, samples: Any, truth: Any, tmp_path: Path
) -> None:
    for evaluator in all_evaluators(metadata, tmp_path):
        scores(evaluator, samples, truth)
        before = {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
        evaluator.reset()
        evaluator.process(samples[:2], [truth(sample) for sample in samples[:2]])
        assert {p.name: p.read_bytes() for p in tmp_path.glob("*.json")} == before
        evaluator.close()
        assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_evaluating_twice_gives_the_same(metadata: Any, samples: Any, spoiled: Any, tmp_path: Path) -> None:
    for evaluator in all_evaluators(metadata, tmp_path):
        first = scores(evaluator, samples, spoiled)
        before = {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
        assert evaluator.evaluate() == pytest.approx(first, nan_ok=True)
        assert {p.name: p.read_bytes() for p in tmp_path.glob("*.json")} == before


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        JsonStream(tmp_path / "file" / "x.json").write({})


def test_empty_list_is_valid_json(tmp_path: Path) -> None:
    assert json.loads(JsonStream(tmp_path / "a.json").commit().read_text()) == []
    written = JsonStream(tmp_path / "b.json", "annotations").commit({"images": [1]}).read_text()
    assert json.loads(written) == {"annotations": [], "images": [1]}


def test_rle_round_trip() -> None:
    masks = np.random.default_rng(0).random((5, 17, 23)) < 0.5
    masks[3] = False
    assert (np.stack([decode_mask(run) for run in encode_masks(masks)]) == masks).all()
    assert encode_masks(masks[:0]) == []


def test_rle_of_a_label_map_is_that_of_its_masks() -> None:
    label_map = np.random.default_rng(0).integers(0, 4, (17, 23))
    label_map[:, 5:9] = 7
    for one in (label_map, np.full((3, 5), 2)):
        labels = np.unique(one)
        masks = one[None] == labels[:, None, None]
        assert list(encode_label_map(one)) == list(zip(labels.tolist(), encode_masks(masks), strict=True))


# ---------------------------------------------------------------- instances
def test_instances_by_hand(tmp_path: Path) -> None:
    """Two cats, one found; a false alarm that is less sure: AP is the precision 1 over one half of the recall."""
    masks = np.zeros((3, 40, 40), dtype=bool)
    masks[0, 2:12, 2:12], masks[1, 20:30, 20:30], masks[2, 2:12, 25:35] = True, True, True
    sample = {
        "file_name": "a.jpg",
        "image_id": "a",
        "height": 40,
        "width": 40,
        "annotations": [
            {"category_id": 0, "segmentation": encode_masks(masks[:1])[0], "iscrowd": 0},
            {"category_id": 0, "segmentation": [[20, 20, 30, 20, 30, 30, 20, 30]]},
        ],
    }
    found = {
        "masks": torch.from_numpy(masks[[0, 2]]),
        "labels": torch.tensor([0, 0]),
        "scores": torch.tensor([0.9, 0.4]),
    }
    evaluator = InstanceEvaluator(["cat", "dog"], [True, True], [5, 6], tmp_path)
    evaluator.process([sample], [{"instances": found}])
    result = evaluator.evaluate()
    assert result["AP"] == result["AP50"] == result["AP-cat"] == pytest.approx(100 * 51 / 101)
    assert math.isnan(result["AP-dog"])
    assert math.isnan(result["APl"])
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [(item["image_id"], item["category_id"], item["score"]) for item in written] == [
        ("a", 5, 0.9),
        ("a", 5, 0.4),
    ]
    assert (decode_mask(written[0]["segmentation"]) == masks[0]).all()


def test_a_segmentation_that_means_nothing_is_named() -> None:
    sample = {"file_name": "a.jpg", "image_id": "a", "height": 8, "width": 8}
    result = {"instances": {"masks": torch.zeros(0, 8, 8), "labels": torch.zeros(0), "scores": torch.zeros(0)}}
    for segmentation, words in (([["x"]], "neither polygons nor RLE"), ({"size": [9, 8], "counts": [72]}, "size")):
        annotations = [{"category_id": 0, "segmentation": segmentation}]
        evaluator = InstanceEvaluator(["cat"], [True])
        with pytest.raises(UserError, match=rf"annotation of image 'a\.jpg' .*{words}"):
            evaluator.process([{**sample, "annotations": annotations}], [result])


def test_instances_crowd_is_no_false_alarm() -> None:
    masks = np.zeros((2, 20, 20), dtype=bool)
    masks[0, :5, :5], masks[1, 10:, 10:] = True, True
    runs = encode_masks(masks)
    annotations = [
        {"category_id": 0, "segmentation": runs[0], "iscrowd": 0},
        {"category_id": 0, "segmentation": runs[1], "iscrowd": 1},
    ]
    sample = {"file_name": "a.jpg", "image_id": 1, "height": 20, "width": 20, "annotations": annotations}
    found = {"masks": torch.from_numpy(masks), "labels": torch.tensor([0, 0]), "scores": torch.tensor([0.5, 0.9])}
    evaluator = InstanceEvaluator(["cat"], [True])
    evaluator.process([sample], [{"instances": found}])
    assert evaluator.evaluate()["AP"] == pytest.approx(100.0)


def test_instances_from_panoptic_truth(metadata: Any, samples: Any, truth: Any) -> None:
    results = [truth(sample) for sample in samples]
    for sample in samples:
        del sample["annotations"]
    evaluator = all_evaluators(metadata)[2]
    evaluator.process(samples, results)
    assert evaluator.evaluate()["AP"] == pytest.approx(100.0)


def test_no_instance_at_all() -> None:
    sample = {"file_name": "a.jpg", "image_id": 1, "height": 8, "width": 8, "annotations": []}
    nothing = {
        "masks": torch.zeros(0, 8, 8, dtype=torch.bool),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    evaluator = InstanceEvaluator(["cat"], [True])
    evaluator.process([sample], [{"instances": nothing}])
    assert all(math.isnan(value) for value in evaluator.evaluate().values())

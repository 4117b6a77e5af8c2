"""Prediction and truth files that are refused, each with one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from maskformer.data.catalog import Dataset
from maskformer.errors import UserError
from maskformer.evaluation.predictions import write_panoptic_png
from maskformer.evaluation.scoring import score_instances, score_panoptic, score_semantic
from maskformer.evaluation.truth import (
    instance_truth_of,
    panoptic_truth_of,
    read_instance_truth,
    read_panoptic_truth,
)

from .scored import Case, case, coco_truth, same

__all__ = ["case"]


def with_counts(item: dict[str, Any], counts: Any) -> dict[str, Any]:
    """A prediction with other run lengths."""
    return {**item, "segmentation": {**item["segmentation"], "counts": counts}}


def panoptic_message(case: Case) -> str:
    with pytest.raises(UserError) as caught:
        score_panoptic(case.out / "predictions.json", case.out / "predictions", panoptic_truth_of(case.dataset))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].pop(0), "lacks 1 of the 4 images of the truth, the first is 0"),
        (
            lambda c: c["annotations"].append(c["annotations"][2]),
            "has 1 images more than once, the first with image_id 2",
        ),
        (
            lambda c: c["annotations"].append({**c["annotations"][2], "image_id": 77, "file_name": "77.png"}),
            "has 1 images that the truth does not",
        ),
        (
            lambda c: c["annotations"][1]["segments_info"][0].update(category_id=5),
            "scene_1.png: segment 1 of the prediction",
        ),
        (lambda c: c["annotations"][1]["segments_info"].pop(0), "pixels of segment 1, which its segments do not list"),
        (lambda c: c["annotations"][1]["segments_info"][0].pop("category_id"), "is no PNG with complete segments_info"),
        (lambda c: c["annotations"], "is no COCO panoptic prediction file"),
        (lambda c: c["annotations"][3].update(file_name="gone.png"), "gone.png' does not exist"),
        (
            lambda c: c["annotations"][3].update(file_name="scene_1.png"),
            "scene_1.png' for image_id 1 and 3; each image has its own",
        ),
        (
            lambda c: c["annotations"][3].update(file_name="./scene_1.png"),
            "scene_1.png' for image_id 1 and 3; each image has its own",
        ),
        (
            lambda c: c["annotations"][3].update(file_name="../../truth/3.png"),
            "predictions.json has the file_name '../../truth/3.png', which leaves the folder",
        ),
        (
            lambda c: c["annotations"][3].update(file_name="/somewhere/3.png"),
            "predictions.json has the file_name '/somewhere/3.png', which leaves the folder",
        ),
        (lambda c: c["annotations"][3].update(file_name=3), "is no COCO panoptic prediction file"),
        (
            lambda c: c["annotations"][1]["segments_info"][0].update(category_id=11.9),
            "segment 1 of the prediction has category_id 11.9, which is no category",
        ),
        (
            lambda c: c["annotations"][1]["segments_info"][0].update(id=10**30),
            "scene_1.png: a segment of the prediction has the id 1000000",
        ),
    ],
)
def test_panoptic_predictions_that_are_refused(case: Case, change: Any, message: str) -> None:
    returned = change(json.loads((case.out / "predictions.json").read_text()))
    if isinstance(returned, list):
        case.edit("predictions.json", change)
    else:
        case.edit("predictions.json", lambda content: change(content) and None)
    assert message in panoptic_message(case)


def test_panoptic_files_that_are_refused(case: Case) -> None:
    png = case.out / "predictions" / "scene_2.png"
    whole = png.read_bytes()
    write_panoptic_png(np.zeros((48, 60), np.int32), png)
    assert "scene_2.png: the prediction is 48x60 but the truth 48x64" in panoptic_message(case)
    png.write_bytes(whole[:-60])
    assert "scene_2.png' cannot be read" in panoptic_message(case)
    png.write_bytes(whole)
    ids = np.full((48, 64), 99, np.int32)
    write_panoptic_png(ids, case.folder / "truth" / "1.png")
    assert "the truth has pixels of segment 99, which its segments do not list" in panoptic_message(case)
    (case.out / "predictions.json").write_text('{"annotations": [')
    assert "is no readable JSON" in panoptic_message(case)
    (case.out / "predictions.json").unlink()
    assert "predictions.json does not exist" in panoptic_message(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [e for e in c if "scene_3" not in e["file_name"]], "lacks 1 of the 4 images of the truth"),
        (lambda c: [*c, {**c[0], "file_name": "other.jpg"}], "has 1 images that the truth does not have"),
        (lambda c: [*c, c[0]], "has category_id 11 twice for 'images/scene_0.jpg'"),
        (lambda c: [{**c[0], "category_id": 3}, *c[1:]], "has category_id 3 for 'images/scene_0.jpg'"),
        (lambda c: [c[0], {**c[1], "segmentation": c[0]["segmentation"]}, *c[2:]], "has pixels in two classes"),
        (lambda c: [{**c[0], "segmentation": {"size": [4, 4], "counts": [16]}}, *c[1:]], "size [4, 4]"),
        (lambda c: [{k: v for k, v in e.items() if k != "segmentation"} for e in c], "has an entry without"),
        (lambda c: {"annotations": c}, "is no list of semantic predictions"),
        (lambda c: [{**c[0], "category_id": 11.9}, *c[1:]], "has category_id 11.9 for 'images/scene_0.jpg'"),
        (lambda c: [with_counts(c[0], "zzzz"), *c[1:]], "sem_seg_predictions.json: the prediction of 'images/scene_0."),
        (lambda c: [with_counts(c[0], c[0]["segmentation"]["counts"][:-1]), *c[1:]], "neither polygons nor RLE"),
        (lambda c: [with_counts(c[0], [10**9]), *c[1:]], "a run of 1000000000 pixels"),
        (lambda c: [with_counts(c[0], [0, 10**9]), *c[1:]], "a run of 1000000000 pixels"),
        (lambda c: [with_counts(c[0], [-5, 10]), *c[1:]], "a run of -5 pixels"),
        (lambda c: [{**c[0], "segmentation": [[1, 2]]}, *c[1:]], "a polygon of 2 numbers"),
    ],
)
def test_semantic_predictions_that_are_refused(case: Case, change: Any, message: str) -> None:
    path = case.edit("sem_seg_predictions.json", change)
    with pytest.raises(UserError) as caught:
        score_semantic(path, case.dataset)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [{**c[0], "image_id": 9}, *c], "has 1 images that the truth does not have, the first is 9"),
        (lambda c: [{**c[0], "category_id": 11}, *c], "has category_id 11, which is none of the 2 countable classes"),
        (lambda c: [{**c[0], "score": None}, *c], "has score None for image_id 0; scores are finite numbers"),
        (lambda c: [{**c[0], "score": float("nan")}, *c], "has score nan for image_id 0"),
        (lambda c: [{**c[0], "score": float("-inf")}, *c], "has score -inf for image_id 0"),
        (lambda c: [{**c[0], "score": 10**400}, *c], "has score 1000000"),
        (lambda c: [{**c[0], "category_id": 17.9}, *c], "has category_id 17.9, which is none of the 2 countable"),
        (lambda c: [{"image_id": 0}], "is no COCO results file"),
        (lambda c: [with_counts(c[0], "zzzz")], "coco_instances_results.json: the prediction of image 0 has a segm"),
        (lambda c: [{**c[0], "segmentation": [[1, 2]]}], "a polygon of 2 numbers"),
        (
            lambda c: [{"image_id": 0, "category_id": 17, "score": 1, "bbox": [0, 0, 1, 1]}],
            "AP of boxes is not measured",
        ),
    ],
)
def test_instances_that_are_refused(case: Case, change: Any, message: str) -> None:
    path = case.edit("coco_instances_results.json", change)
    with pytest.raises(UserError) as caught:
        score_instances(path, instance_truth_of(case.dataset))
    assert message in str(caught.value)


def test_numbers_that_are_whole_are_taken_however_they_are_written(case: Case) -> None:
    def floats(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**item, "category_id": float(item["category_id"])} for item in content]

    semantic = score_semantic(case.edit("sem_seg_predictions.json", floats), case.dataset)
    instances = score_instances(case.edit("coco_instances_results.json", floats), instance_truth_of(case.dataset))
    assert same({**semantic, **instances}, {key: case.results[key] for key in ("sem_seg", "segm")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(file_name="../out/predictions/scene_1.png"), "which leaves the folder"),
        (lambda c: c["annotations"][1].update(file_name="2.png"), "2.png' for image_id 1 and 2"),
        (lambda c: c["categories"][0].update(id=11.9), "has the category id 11.9, which is no whole number"),
        (lambda c: c["categories"][0].update(id=float("inf")), "has the category id inf"),
    ],
)
def test_panoptic_truth_that_is_refused(case: Case, change: Any, message: str) -> None:
    path, _ = coco_truth(case)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"truth\.json") as caught:
        read_panoptic_truth(path, case.folder / "truth")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(segmentation={"size": [48, 64], "counts": [-5, 10]}), "a run of -5 pix"),
        (lambda c: c["annotations"][0].update(area="much"), "is no truth with complete annotations"),
        (lambda c: c["categories"][0].update(id=17.5), "has the category id 17.5"),
        (lambda c: c["images"][0].update(height=48.5), "has the image height 48.5"),
    ],
)
def test_true_objects_that_are_refused(case: Case, change: Any, message: str) -> None:
    _, path = coco_truth(case)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"objects\.json") as caught:
        score_instances(case.out / "coco_instances_results.json", read_instance_truth(path))
    assert message in str(caught.value)


def test_objects_without_an_area_have_that_of_their_mask(case: Case) -> None:
    _, path = coco_truth(case)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["area"] = None
    path.write_text(json.dumps(content))
    found = score_instances(case.out / "coco_instances_results.json", read_instance_truth(path))
    assert same(found["segm"], case.results["segm"])


def test_a_data_set_without_the_truth_of_the_task(case: Case) -> None:
    dataset = Dataset(replace(case.dataset.metadata, truth=("sem_seg",)), lambda: case.dataset.records)
    with pytest.raises(UserError, match=r"'little' has only sem_seg truth, so --task panoptic_seg"):
        panoptic_truth_of(dataset)

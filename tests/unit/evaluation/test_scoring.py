"""Scores of prediction files: those of the evaluation that wrote them, those of panopticapi, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from maskformer.data.catalog import Dataset
from maskformer.errors import UserError
from maskformer.evaluation import InstanceEvaluator, PanopticEvaluator, SemSegEvaluator
from maskformer.evaluation.predictions import encode_label_map, write_panoptic_png
from maskformer.evaluation.scoring import score_instances, score_panoptic, score_semantic
from maskformer.evaluation.truth import (
    instance_truth_of,
    panoptic_truth_of,
    read_instance_truth,
    read_panoptic_truth,
)
from maskformer.score import main


class Case(NamedTuple):
    """A data set on disk, and predictions of it that an evaluation has written."""

    folder: Path
    dataset: Dataset
    results: dict[str, dict[str, float]]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def edit(self, name: str, change: Callable[[Any], Any]) -> Path:
        """Change a prediction file, in place or to what `change` returns."""
        path = self.out / name
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))
        return path


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, NaN included."""
    return json.dumps(one) == json.dumps(other)


def records_of(samples: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The truth of samples as files."""
    records = []
    for sample in samples:
        name = f"{sample['image_id']}.png"
        ids, segments = sample["pan_seg"]
        write_panoptic_png(ids.numpy(), folder / "truth" / name)
        (folder / "labels").mkdir(exist_ok=True)
        Image.fromarray(sample["sem_seg"].numpy().astype(np.uint8)).save(folder / "labels" / name)
        common = {key: sample[key] for key in ("file_name", "image_id", "height", "width", "annotations")}
        pan_seg = {"pan_seg_file_name": str(folder / "truth" / name), "segments_info": segments}
        records.append({**common, **pan_seg, "sem_seg_file_name": str(folder / "labels" / name)})
    return records


@pytest.fixture
def case(metadata: Any, samples: Any, spoiled: Any, tmp_path: Path) -> Case:
    metadata = replace(metadata, truth=("sem_seg", "pan_seg", "annotations"))
    records = records_of(samples, tmp_path)
    out = tmp_path / "out"
    evaluators: list[Any] = [
        SemSegEvaluator(metadata.classes, metadata.ignore_label, metadata.dataset_ids, out),
        PanopticEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, out),
        InstanceEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, out),
    ]
    results = {}
    for evaluator in evaluators:
        evaluator.reset([sample["image_id"] for sample in samples])
        evaluator.process(samples, [spoiled(sample) for sample in samples])
        results[evaluator.name] = evaluator.evaluate()
    return Case(tmp_path, Dataset(metadata, lambda: records), results)


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_those_of_the_evaluation_that_wrote_the_files(case: Case, workers: int) -> None:
    semantic = score_semantic(case.out / "sem_seg_predictions.json", case.dataset, workers)
    panoptic = score_panoptic(
        case.out / "predictions.json", case.out / "predictions", panoptic_truth_of(case.dataset), workers
    )
    instances = score_instances(case.out / "coco_instances_results.json", instance_truth_of(case.dataset), workers)
    assert same({**semantic, **panoptic, **instances}, case.results)
    assert 5 < panoptic["panoptic_seg"]["PQ"] < 95


def test_things_of_panoptic_truth_are_instances(case: Case) -> None:
    records = [{k: v for k, v in record.items() if k != "annotations"} for record in case.dataset.records]
    dataset = Dataset(replace(case.dataset.metadata, truth=("pan_seg",)), lambda: records)
    found = score_instances(case.out / "coco_instances_results.json", instance_truth_of(dataset))
    assert same(found["segm"], case.results["segm"])


def coco_truth(case: Case) -> tuple[Path, Path]:
    """The truth as COCO's panoptic and instances JSON."""
    metadata, records = case.dataset.metadata, case.dataset.records
    columns = zip(metadata.dataset_ids, metadata.classes, metadata.things, strict=True)
    categories = [{"id": i, "name": name, "isthing": int(thing)} for i, name, thing in columns]
    images = [{"id": r["image_id"], "file_name": r["file_name"], "height": 48, "width": 64} for r in records]

    def own(items: Any, image_id: int) -> list[dict[str, Any]]:
        return [{**i, "category_id": metadata.dataset_ids[i["category_id"]], "image_id": image_id} for i in items]

    panoptic = [
        {
            "image_id": r["image_id"],
            "file_name": Path(r["pan_seg_file_name"]).name,
            "segments_info": own(r["segments_info"], r["image_id"]),
        }
        for r in records
    ]
    instances = [a for r in records for a in own(r["annotations"], r["image_id"])]
    things = [c for c in categories if c["isthing"]]
    for name, items, listed in (("truth", panoptic, categories), ("objects", instances, things)):
        content = {"images": images, "categories": listed, "annotations": items}
        (case.folder / f"{name}.json").write_text(json.dumps(content))
    return case.folder / "truth.json", case.folder / "objects.json"


def test_truth_from_coco_files_without_a_data_set(case: Case) -> None:
    panoptic, objects = coco_truth(case)
    truth = read_panoptic_truth(panoptic, case.folder / "truth")
    found = score_panoptic(case.out / "predictions.json", case.out / "predictions", truth)
    assert same(found["panoptic_seg"], case.results["panoptic_seg"])
    found = score_instances(case.out / "coco_instances_results.json", read_instance_truth(objects))
    assert same(found["segm"], case.results["segm"])


def test_the_command(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    panoptic, objects = coco_truth(case)
    words = ["--task", "panoptic_seg", "--predictions", case.out / "predictions.json", "--truth", panoptic]
    scores = case.folder / "scores.json"
    assert main([str(word) for word in [*words, "--workers", 2, "--json", scores]]) == 0
    printed = capsys.readouterr().out
    assert f"{case.results['panoptic_seg']['PQ']:.2f}" in printed
    assert "Panoptic segmentation on" in printed
    written = json.loads(scores.read_text())["scores"]
    assert written["panoptic_seg/PQ"] == case.results["panoptic_seg"]["PQ"]
    words = ["--task", "instances", "--predictions", case.out / "coco_instances_results.json", "--truth", objects]
    assert main([str(word) for word in words]) == 0
    assert f"{case.results['segm']['AP50']:.2f}" in capsys.readouterr().out


def test_the_command_with_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "dataset.yaml").write_text("classes: [sky, road, car]\n")
    entries = []
    for name in ("a", "b"):
        for kind, shape, high in (("images", (8, 8, 3), 256), ("masks", (8, 8), 3)):
            (tmp_path / kind / "val").mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, high, shape).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / "val" / f"{name}.png")
        entries += [
            {"file_name": f"/elsewhere/{name}.png", "category_id": label, "segmentation": run}
            for label, run in encode_label_map(pixels)
        ]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    words = ["--task", "sem_seg", "--predictions", str(tmp_path / "p.json"), "--dataset", f"folder:{tmp_path}:val"]
    assert main([*words, "--workers", "1"]) == 0
    assert "100.00" in capsys.readouterr().out


def test_scores_that_cannot_be_written_are_found_before_anything_is_read(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    (case.folder / "file").write_text("")
    words = ["--task", "instances", "--predictions", "missing.json", "--truth", "missing.json", "--json"]
    for place in (case.folder, case.folder / "file" / "scores.json"):
        assert main([*words, str(place)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {place} ")
        assert error.count("\n") == 1


def test_scores_are_shown_if_writing_fails_at_the_end(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: Any, scores: Any) -> None:
        raise UserError(f"{arguments.json} cannot be written")

    monkeypatch.setattr("maskformer.score.write_scores", fail)
    panoptic, _ = coco_truth(case)
    words = ["--task", "panoptic_seg", "--predictions", case.out / "predictions.json", "--truth", panoptic]
    assert main([str(word) for word in [*words, "--workers", 1, "--json", case.folder / "scores.json"]]) == 2
    captured = capsys.readouterr()
    assert f"{case.results['panoptic_seg']['PQ']:.2f}" in captured.out
    assert "scores.json cannot be written" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --dataset NAME or --truth FILE to compare with, not neither"),
        (["--dataset", "a", "--truth", "b"], "not both"),
        (["--truth", "b"], "has no semantic truth"),
        (["--dataset", "a", "--pred-folder", "b"], "--pred-folder is for --task panoptic_seg"),
        (["--dataset", "a", "--workers", "0"], "--workers is 0"),
        (["--dataset", "nothing"], "data set 'nothing' is not known"),
        (["--dataset", "coco_2017_val_panoptik"], "did you mean 'coco_2017_val_panoptic'"),
    ],
)
def test_arguments_that_do_not_go_together(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "sem_seg", "--predictions", "p.json", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------- what is refused
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


# ---------------------------------------------------------------- panopticapi, where it is installed
def test_panoptic_quality_is_that_of_panopticapi(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api = pytest.importorskip("panopticapi.evaluation", reason="panopticapi is not installed")
    rng = np.random.default_rng(8)
    categories = [{"id": 3 * i + 1, "name": f"c{i}", "isthing": int(i % 3 > 0)} for i in range(7)]
    files: dict[str, list[Any]] = {"truth": [], "predictions": []}
    for number in range(30):
        base = rng.integers(0, 9, (9, 12)).repeat(8, 0).repeat(8, 1)
        other = np.where(rng.random((9, 12)).repeat(8, 0).repeat(8, 1) < 0.8, base, rng.integers(0, 9, base.shape))
        colors = np.append(0, rng.choice(2**24 - 1, 8, replace=False) + 1)
        kinds = rng.integers(0, 7, 9)
        for name, ids in (("truth", colors[base]), ("predictions", other)):
            known = {int(colors[i]) if name == "truth" else i: int(kinds[i]) for i in range(1, 9)}
            present = [i for i in np.unique(ids).tolist() if i]
            crowds = {known[i]: i for i in present if name == "truth" and rng.random() < 0.2}
            segments = [
                {
                    "id": i,
                    "category_id": 3 * (known[i] if rng.random() < 0.9 else int(rng.integers(7))) + 1,
                    "area": int((ids == i).sum()),
                    "iscrowd": int(crowds.get(known[i]) == i),
                }
                for i in present
            ]
            seen: set[int] = set()
            for s in segments:  # panopticapi excuses one crowd of a class only
                s["iscrowd"] = int(s["iscrowd"] and s["category_id"] not in seen)
                seen |= {s["category_id"]} if s["iscrowd"] else set()
            write_panoptic_png(ids, tmp_path / name / f"{number}.png")
            files[name].append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    for name, items in files.items():
        content = {"images": [], "categories": categories, "annotations": items}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    expected = api.pq_compute(str(tmp_path / "truth.json"), str(tmp_path / "predictions.json"))
    capsys.readouterr()
    truth = read_panoptic_truth(tmp_path / "truth.json", tmp_path / "truth")
    found = score_panoptic(tmp_path / "predictions.json", tmp_path / "predictions", truth)["panoptic_seg"]
    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for metric in ("PQ", "SQ", "RQ"):
            assert found[metric + suffix] == pytest.approx(100 * expected[group][metric.lower()], abs=1e-9)
    assert 5 < found["PQ"] < 95

"""Scores of prediction files: those of the evaluation that wrote them, and those of panopticapi."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer.data.catalog import Dataset
from maskformer.errors import UserError
from maskformer.evaluation.predictions import encode_label_map, write_panoptic_png
from maskformer.evaluation.scoring import score_instances, score_panoptic, score_semantic
from maskformer.evaluation.truth import (
    instance_truth_of,
    panoptic_truth_of,
    read_instance_truth,
    read_panoptic_truth,
)
from maskformer.score import main

from .scored import Case, case, coco_truth, same

__all__ = ["case"]


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

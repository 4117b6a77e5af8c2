"""What several processes have counted and written, put together: as if one process had seen all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskformer import distributed
from maskformer.errors import UserError
from maskformer.evaluation import (
    DatasetEvaluator,
    InstanceEvaluator,
    PanopticEvaluator,
    PanopticQuality,
    PictureSaver,
    SemSegEvaluator,
    flatten_results,
    metric_names,
)
from maskformer.evaluation.predictions import JsonStream

KINDS = ("sem_seg", "panoptic_seg", "segm", "pictures")
SHARES = [(1, 2, 4), (0, 0, 4), (0, 3, 3, 4)]
"""Where the share of each rank ends; the first images are rank 0's."""


def make(kind: str, metadata: Any, folder: Path | None) -> DatasetEvaluator:
    if kind == "sem_seg":
        return SemSegEvaluator(metadata.classes, metadata.ignore_label, metadata.dataset_ids, folder)
    if kind == "panoptic_seg":
        return PanopticEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, folder)
    if kind == "segm":
        return InstanceEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, folder)
    return PictureSaver((folder or Path()) / "pictures", 3, metadata)


class Ranks:
    """Evaluators that stand for processes: each counts its share as the rank it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def counted(
        self,
        build: Callable[[], DatasetEvaluator],
        ends: Sequence[int],
        samples: Sequence[Any],
        predict: Callable[[Any], Any],
        listed: bool = True,
    ) -> list[DatasetEvaluator]:
        ids, names = [s["image_id"] for s in samples], [s["file_name"] for s in samples]
        evaluators = [build() for _ in ends]
        for evaluator in evaluators:  # all of them before the first writes, as real processes do
            evaluator.reset(*((ids, names) if listed else ()))
        for rank, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            self.monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            evaluators[rank].process(samples[start:end], [predict(s) for s in samples[start:end]])
        self.monkeypatch.setattr(distributed, "rank", lambda: 0)
        return evaluators

    def merged(self, evaluators: Sequence[DatasetEvaluator]) -> dict[str, Any]:
        return evaluators[0]._merge([evaluator._part() for evaluator in evaluators])


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_any_spread_gives_the_numbers_and_files_of_one_process(
    kind: str, ranks: Ranks, metadata: Any, samples: Any, spoiled: Any, tmp_path: Path
) -> None:
    for sample, folder in zip(samples, "abcd", strict=True):  # images that share a stem
        sample["file_name"] = f"{folder}/{sample['image_id'] // 2}.jpg"
    (alone,) = ranks.counted(lambda: make(kind, metadata, tmp_path / "one"), [4], samples, spoiled)
    expected = alone.evaluate()
    for number, ends in enumerate(SHARES):
        folder = tmp_path / str(number)
        parts = ranks.counted(lambda folder=folder: make(kind, metadata, folder), ends, samples, spoiled)
        assert json.dumps(ranks.merged(parts)) == json.dumps(expected)  # equal to the last bit, NaN included
        assert files_in(folder) == files_in(tmp_path / "one") != {}
        if isinstance(parts[0], PictureSaver) and isinstance(alone, PictureSaver):
            assert list(parts[0].pictures) == list(alone.pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_metrics_are_known_before(kind: str, metadata: Any, samples: Any, spoiled: Any) -> None:
    evaluator = make(kind, metadata, None)
    if isinstance(evaluator, PictureSaver):
        assert metric_names([evaluator]) == []
        return
    names = metric_names([evaluator])
    evaluator.process(samples, [spoiled(sample) for sample in samples])
    assert list(flatten_results({evaluator.name: evaluator.evaluate()})) == names
    assert evaluator.metric_names()[0] == {"sem_seg": "mIoU", "panoptic_seg": "PQ", "segm": "AP"}[kind]


# ---------------------------------------------------------------- exactness
def test_the_order_of_images_does_not_show_in_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    quality, ious = [], []
    for _ in range(60):
        common, missed, wrong = (int(n) for n in rng.integers(1, [60, 20, 20]))
        true = np.repeat([1, 1, 2], [missed, common, wrong])[None]
        predicted = np.repeat([2, 1, 1], [missed, common, wrong])[None]
        segments = [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}]
        quality.append(PanopticQuality({0: True, 1: False}).update(predicted, segments, true, segments))
        iou = common / (missed + common + wrong)
        ious += [iou] if iou > 0.5 else []
    results = []
    for order in (rng.permutation(60) for _ in range(20)):
        total = PanopticQuality({0: True, 1: False})
        for i in order:
            total.merge(quality[i])
        results.append(total.compute())
        assert total.iou_sum.tolist() == [math.fsum(ious), 0.0]
    assert len(ious) > 10
    assert len({json.dumps(result) for result in results}) == 1


def test_a_truth_that_states_too_small_an_area_does_not_break_the_sum() -> None:
    ids = np.ones((1, 8), dtype=int)
    found, stated = [{"id": 1, "category_id": 0}], [{"id": 1, "category_id": 0, "area": 3}]
    assert PanopticQuality({0: True}).update(ids, found, ids, stated).iou_sum.tolist() == [8 / 3]


# ---------------------------------------------------------------- images
def test_images_are_counted_over_all_processes(ranks: Ranks, metadata: Any, samples: Any, truth: Any) -> None:
    def build() -> DatasetEvaluator:
        return make("sem_seg", metadata, None)

    parts = ranks.counted(build, (2, 3), samples, truth)
    with pytest.raises(UserError, match=r"1 of 4 images were not evaluated \(image_id 3\)"):
        ranks.merged(parts)
    parts = ranks.counted(build, (2, 4), samples, truth)
    parts[1].process(samples[:1], [truth(samples[0])])
    with pytest.raises(UserError, match=r"1 images were evaluated more than once \(image_id 0\)"):
        ranks.merged(parts)


def test_two_processes_that_write_the_same_name_are_found(
    ranks: Ranks, metadata: Any, samples: Any, truth: Any, tmp_path: Path
) -> None:
    for sample in samples:
        sample["file_name"] = f"{sample['image_id']}/same.jpg"
    parts = ranks.counted(lambda: make("panoptic_seg", metadata, tmp_path), (2, 4), samples, truth, listed=False)
    with pytest.raises(UserError, match=r"two images would both be written as same\.png"):
        ranks.merged(parts)


def test_a_data_set_whose_names_clash_is_refused_at_the_start(metadata: Any, tmp_path: Path) -> None:
    evaluator = make("panoptic_seg", metadata, tmp_path)
    with pytest.raises(UserError, match=r"two images would both be written as x\.png"):
        evaluator.reset(["y", "x"], ["a/x.png", "b/x.png"])


def test_without_a_list_only_the_main_process_saves_pictures(
    ranks: Ranks, metadata: Any, samples: Any, truth: Any, tmp_path: Path
) -> None:
    parts = ranks.counted(lambda: make("pictures", metadata, tmp_path), (1, 4), samples, truth, listed=False)
    ranks.merged(parts)
    assert {path.name[:2] for path in (tmp_path / "pictures").iterdir()} == {"00"}


# ---------------------------------------------------------------- files
def test_a_shard_that_cannot_be_found_says_that_the_folder_must_be_shared(
    ranks: Ranks, metadata: Any, samples: Any, truth: Any, tmp_path: Path
) -> None:
    for spoil, words in ((Path.unlink, "is not there"), (lambda path: path.write_text("[]"), "has 2 bytes")):
        parts = ranks.counted(lambda: make("segm", metadata, tmp_path), (2, 4), samples, truth)
        brought = [part._part() for part in parts]
        spoil(next(tmp_path.glob(".coco_instances_results.json.1.*")))
        with pytest.raises(UserError, match=rf"{words} .* file system that all machines share"):
            parts[0]._merge(brought)
        for part in parts:
            part.close()
        assert list(tmp_path.iterdir()) == []


def test_pictures_that_cannot_be_found_too(
    ranks: Ranks, metadata: Any, samples: Any, truth: Any, tmp_path: Path
) -> None:
    parts = ranks.counted(lambda: make("pictures", metadata, tmp_path), (2, 4), samples, truth)
    brought = [part._part() for part in parts]
    next((tmp_path / "pictures").glob("*scene_3*")).unlink()
    with pytest.raises(UserError, match="all machines share"):
        parts[0]._merge(brought)


def test_what_one_process_cannot_write_is_said_by_the_main_one(
    ranks: Ranks, metadata: Any, samples: Any, truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ranks.counted(lambda: make("sem_seg", metadata, tmp_path), (2, 4), samples, truth)
    first = parts[0]._part()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    brought = [first, parts[1]._part()]
    with pytest.raises(UserError, match=r"cannot be written .No space left"):
        parts[0]._merge(brought)


def test_leftovers_of_killed_evaluations_are_removed(metadata: Any, samples: Any, truth: Any, tmp_path: Path) -> None:
    names = {
        "sem_seg": ".sem_seg_predictions.json.2.4711.partial",
        "panoptic_seg": "predictions/.scene_0.png.4711.partial",
        "segm": ".coco_instances_results.json.0.4711.partial",
        "pictures": "pictures/.00_scene_0.png.4711.partial",
    }
    for kind, name in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
        make(kind, metadata, tmp_path).reset()
        assert not (tmp_path / name).exists()


def test_a_stream_goes_on_after_its_shard_was_asked_for(tmp_path: Path) -> None:
    stream = JsonStream(tmp_path / "a.json")
    stream.write(1)
    assert stream.shard() is not None
    stream.write(2)
    stream.commit()
    assert json.loads((tmp_path / "a.json").read_text()) == [1, 2]
    again = JsonStream(tmp_path / "b.json")
    again.write(1)
    again.discard()
    again.write(2)
    again.commit()
    assert json.loads((tmp_path / "b.json").read_text()) == [2]

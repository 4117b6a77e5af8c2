"""Metrics on cases small enough to be counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from maskformer.errors import UserError
from maskformer.evaluation import PanopticQuality, SemanticQuality, SemSegEvaluator, semantic_segments
from maskformer.evaluation.arrays import count_values, pair_runs

THING, STUFF = 0, 1


def segment(segment_id: int, category: int = THING, **more: Any) -> dict[str, Any]:
    return {"id": segment_id, "category_id": category, **more}


def row(*runs: tuple[int, int]) -> np.ndarray:
    """One row of pixels from (value, length) runs."""
    return np.repeat([value for value, _ in runs], [length for _, length in runs])[None]


def quality() -> PanopticQuality:
    return PanopticQuality({THING: True, STUFF: False}, {THING: "cat", STUFF: "sky"})


# ---------------------------------------------------------------- semantic
def test_semantic_counted_by_hand() -> None:
    true = np.array([[0, 0, 1, 255]])
    predicted = np.array([[0, 1, 1, 1]])  # the pixel on 255 does not count
    result = SemanticQuality(3, 255, ["a", "b", "c"]).update(predicted, true).compute()
    assert result["IoU-a"] == result["IoU-b"] == pytest.approx(50.0)
    assert math.isnan(result["IoU-c"])
    assert math.isnan(result["ACC-c"])
    assert (result["ACC-a"], result["ACC-b"]) == (50.0, 100.0)
    assert result["mIoU"] == pytest.approx(50.0)
    assert result["mACC"] == pytest.approx(75.0)
    assert result["pACC"] == pytest.approx(200 / 3)
    assert result["fwIoU"] == pytest.approx(50.0)


def test_a_class_predicted_but_not_true_is_no_part_of_the_mean() -> None:
    result = SemanticQuality(2, 255, ["a", "b"]).update(np.array([[0, 1]]), np.array([[0, 0]])).compute()
    assert result["mIoU"] == pytest.approx(50.0)
    assert math.isnan(result["IoU-b"])


def test_nothing_predicted_is_wrong() -> None:
    result = SemanticQuality(2, 255).update(np.array([[255, 1]]), np.array([[0, 1]])).compute()
    assert result["pACC"] == 50.0
    assert result["mIoU"] == 50.0


def test_semantic_takes_tensors_of_any_integer_type() -> None:
    true = torch.tensor([[0, 1], [1, 255]], dtype=torch.int32)
    predicted = torch.tensor([[0, 1], [1, 0]], dtype=torch.int64)
    assert SemanticQuality(2, 255).update(predicted, true).compute()["mIoU"] == 100.0


def test_only_ignored_pixels_give_nan() -> None:
    result = SemanticQuality(2, 255).update(np.zeros((2, 2), int), np.full((2, 2), 255)).compute()
    assert all(math.isnan(value) for value in result.values())


@pytest.mark.parametrize(
    ("predicted", "true", "words"),
    [
        ([[0, 1]], [[0, 7]], "truth has label 7"),
        ([[0, 9]], [[0, 1]], "prediction has label 9"),
        ([[0, -1]], [[0, 1]], "prediction has label -1"),
        ([[0, 1]], [[0]], "1x2 but the truth 1x1"),
    ],
)
def test_semantic_refuses_what_is_no_class(predicted: Any, true: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SemanticQuality(2, 255).update(np.array(predicted), np.array(true))


# ---------------------------------------------------------------- panoptic
def test_panoptic_truth_as_prediction_scores_100() -> None:
    ids, segments = row((1, 4), (2, 3), (3, 5)), [segment(1), segment(2), segment(3, STUFF)]
    result = quality().update(ids, segments, ids, segments).compute()
    assert {k: v for k, v in result.items() if "-" not in k} == dict.fromkeys(
        (m + s for s in ("", "_th", "_st") for m in ("PQ", "SQ", "RQ")), 100.0
    )
    assert result["PQ-cat"] == result["PQ-sky"] == 100.0


def test_panoptic_iou_of_one_half_is_no_match() -> None:
    # Intersection 2, union 4: a miss and a false alarm.
    counted = quality().update(row((1, 2), (0, 2)), [segment(1)], row((1, 4)), [segment(1)])
    assert counted.per_class()[THING] == {"PQ": 0, "SQ": 0, "RQ": 0, "TP": 0, "FP": 1, "FN": 1}
    # One pixel more: 3 of 4.
    counted = quality().update(row((1, 3), (0, 1)), [segment(1)], row((1, 4)), [segment(1)])
    assert counted.per_class()[THING] == {"PQ": 0.75, "SQ": 0.75, "RQ": 1, "TP": 1, "FP": 0, "FN": 0}


def test_panoptic_wrong_class_is_no_match() -> None:
    counted = quality().update(row((1, 4)), [segment(1, STUFF)], row((1, 4)), [segment(1, THING)]).per_class()
    assert (counted[THING]["FN"], counted[STUFF]["FP"]) == (1, 1)


def test_panoptic_predicted_pixels_on_void_leave_the_union() -> None:
    # Prediction of 6 on a truth of 4 and 2 of void: IoU 4 / (6 + 4 - 4 - 2) = 1.
    counted = quality().update(row((1, 6)), [segment(1)], row((1, 4), (0, 2)), [segment(1)])
    assert counted.per_class()[THING]["SQ"] == 1.0


def test_panoptic_prediction_mostly_on_void_is_no_false_positive() -> None:
    truth = row((1, 4), (0, 8))
    predicted = row((1, 4), (2, 5), (0, 3))
    counted = quality().update(predicted, [segment(1), segment(2)], truth, [segment(1)]).per_class()
    assert (counted[THING]["TP"], counted[THING]["FP"]) == (1, 0)
    # Exactly one half on void is a false positive.
    counted = quality().update(row((2, 8), (0, 4)), [segment(2, STUFF)], truth, [segment(1)]).per_class()
    assert counted[STUFF]["FP"] == 1


def test_panoptic_ids_that_truth_does_not_list_are_void() -> None:
    counted = quality().update(row((1, 4)), [segment(1)], row((9, 4)), []).per_class()
    assert counted[THING]["FP"] == counted[THING]["FN"] == 0


def test_panoptic_crowd_is_neither_hit_nor_missed() -> None:
    crowd = [segment(1, THING, iscrowd=1)]
    missed = quality().update(row((0, 6)), [], row((1, 6)), crowd).per_class()[THING]
    assert (missed["TP"], missed["FP"], missed["FN"]) == (0, 0, 0)
    inside = quality().update(row((5, 6)), [segment(5)], row((1, 6)), crowd).per_class()[THING]
    assert (inside["TP"], inside["FP"], inside["FN"]) == (0, 0, 0)
    other_class = quality().update(row((5, 6)), [segment(5, STUFF)], row((1, 6)), crowd).per_class()[STUFF]
    assert other_class["FP"] == 1


def test_panoptic_void_and_all_crowds_of_the_class_add_up() -> None:
    # 2 pixels each on void and on two crowds of its class, 4 on a stuff segment: 6 of 10 are excused.
    truth = row((0, 2), (1, 2), (2, 2), (3, 4))
    segments = [segment(1, THING, iscrowd=1), segment(2, THING, iscrowd=1), segment(3, STUFF)]
    counted = quality().update(row((7, 10)), [segment(7)], truth, segments).per_class()
    assert counted[THING]["FP"] == 0
    assert counted[STUFF]["FN"] == 1


def test_panoptic_area_of_the_truth_is_the_one_it_states() -> None:
    # 4 pixels, area said to be 8: IoU 4 / (4 + 8 - 4).
    counted = quality().update(row((1, 4)), [segment(1)], row((1, 4)), [segment(1, area=8)]).per_class()
    assert counted[THING]["TP"] == 0
    counted = quality().update(row((1, 4)), [segment(1)], row((1, 4)), [segment(1, area=5)]).per_class()
    assert counted[THING]["SQ"] == pytest.approx(0.8)


def test_panoptic_area_of_the_truth_need_not_be_whole() -> None:
    # 4 pixels, area said to be 4.5: IoU 4 / (4 + 4.5 - 4) = 8/9; cut to 4 it would be 1.
    counted = quality().update(row((1, 4)), [segment(1)], row((1, 4)), [segment(1, area=4.5)])
    assert counted.per_class()[THING]["SQ"] == 4 / 4.5
    # 5 of 8 pixels, area said to be 10.1: 5 / (5 + 10.1 - 5), below one half.
    counted = quality().update(row((1, 5), (0, 3)), [segment(1)], row((1, 8)), [segment(1, area=10.1)])
    assert counted.per_class()[THING]["TP"] == 0


def test_panoptic_areas_that_are_not_whole_sum_the_same_in_any_order() -> None:
    areas = (9 + np.random.default_rng(3).random(50) * 3).tolist()
    sums = []
    for order in (areas, areas[::-1]):
        counted = quality()
        for area in order:
            counted.update(row((1, 9)), [segment(1)], row((1, 9)), [segment(1, area=area)])
        sums.append(counted.iou_sum.tolist())
    assert sums[0] == sums[1]
    assert sums[0][THING] == pytest.approx(sum(9 / area for area in areas), rel=1e-12)


def test_panoptic_ids_and_categories_of_other_number_types() -> None:
    predicted = [{"id": 3.0, "category_id": np.int64(1)}, {"id": np.uint8(2), "category_id": 0.0, "area": "unused"}]
    truth = [segment(5), segment(4, STUFF)]
    counted = quality().update(row((2, 3), (3, 4)), predicted, row((5, 3), (4, 4)), truth)
    assert counted.compute()["PQ"] == 100.0


def test_maps_of_truth_values() -> None:
    mask = np.array([[True, True, False]])
    for one in (mask, torch.from_numpy(mask), np.repeat(mask, 4, 0)[::2]):
        counted = quality().update(one, [segment(1)], one, [segment(1)])
        assert counted.per_class()[THING]["TP"] == 1
    assert SemanticQuality(2, 255).update(mask, np.array([[1, 1, 0]])).compute()["mIoU"] == 100.0


def test_panoptic_empty_prediction_and_empty_truth() -> None:
    counted = quality().update(row((0, 4)), [], row((1, 2), (2, 2)), [segment(1), segment(2, STUFF)])
    assert counted.compute()["PQ"] == 0.0
    nothing = quality().update(row((0, 4)), [], row((0, 4)), []).compute()
    assert all(math.isnan(value) for value in nothing.values())


def test_panoptic_large_ids() -> None:
    ids = row((2**24 - 1, 3), (2**23 + 5, 2))
    segments = [segment(2**24 - 1), segment(2**23 + 5, STUFF)]
    assert quality().update(ids, segments, ids, segments).compute()["PQ"] == 100.0


@pytest.mark.parametrize(
    ("predicted", "pred_segments", "true", "true_segments", "words"),
    [
        (row((1, 4)), [], row((1, 4)), [segment(1)], "has pixels of segment 1"),
        (row((0, 4)), [segment(1)], row((1, 4)), [segment(1)], "lists segment 1, which has no pixel"),
        (row((1, 4)), [segment(1, 5)], row((1, 4)), [segment(1)], "segment 1 of the prediction has category_id 5"),
        (row((1, 4)), [segment(1)], row((1, 4)), [segment(1, 9)], "segment 1 of the truth has category_id 9"),
        (row((1, 4)), [segment(1), segment(1)], row((1, 4)), [segment(1)], "each needs its own"),
        (row((1, 4)), [segment(1)], row((1, 5)), [segment(1)], "1x4 but the truth 1x5"),
        (row((-1, 4)), [], row((1, 4)), [segment(1)], "segment ids -1 to -1"),
        (row((1, 4)), [{"id": 10**30, "category_id": 0}], row((1, 4)), [], "prediction has the id 1000000000000"),
        (row((1, 4)), [segment(1)], row((1, 4)), [segment(2**24)], "truth has the id 16777216; ids are whole"),
        (row((1, 4)), [{"id": 1.5, "category_id": 0}], row((1, 4)), [], "prediction has the id 1.5"),
        (row((1, 4)), [segment(0)], row((1, 4)), [], "prediction has the id 0"),
        (row((1, 4)), [{"id": 1, "category_id": 0.9}], row((1, 4)), [], "has category_id 0.9, which is no category"),
        (row((1, 4)), [{"id": 1, "category_id": True}], row((1, 4)), [], "has category_id True, which is no category"),
        (row((1, 4)), [segment(1)], row((1, 4)), [segment(1, area=float("nan"))], "truth has area nan"),
        (row((1, 4)), [segment(1)], row((1, 4)), [segment(1, area=10**400)], "truth has area 1000000"),
        (row((1, 4)), [segment(1)], row((1, 4)), [segment(1, area=-1)], "truth has area -1"),
        (row((1, 4)), [segment(1)], row((1, 4)), [segment(1, area="4")], "truth has area '4'"),
    ],
)
def test_panoptic_refuses_what_does_not_fit(
    predicted: Any, pred_segments: Any, true: Any, true_segments: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        quality().update(predicted, pred_segments, true, true_segments)


def test_panoptic_agrees_with_a_plain_transcription_of_the_definition() -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        true = rng.integers(0, 5, (6, 6)).repeat(3, 0).repeat(3, 1)
        predicted = np.where(rng.random(true.shape) < 0.75, true, rng.integers(0, 5, true.shape))
        true_segments = [
            segment(int(i), int(rng.integers(2)), iscrowd=int(rng.random() < 0.2)) for i in np.unique(true) if i
        ]
        pred_segments = [segment(int(i), int(rng.integers(2))) for i in np.unique(predicted) if i]
        counted = quality().update(predicted, pred_segments, true, true_segments).per_class()
        for category in (THING, STUFF):
            expected = plain_panoptic(predicted, pred_segments, true, true_segments, category)
            assert tuple(counted[category][k] for k in ("TP", "FP", "FN")) == expected


def plain_panoptic(
    predicted: np.ndarray, pred_segments: Any, true: np.ndarray, true_segments: Any, category: int
) -> tuple[int, int, int]:
    """(TP, FP, FN) of one class, pair by pair."""
    trues = [s for s in true_segments if s["category_id"] == category and not s["iscrowd"]]
    crowds = [s["id"] for s in true_segments if s["category_id"] == category and s["iscrowd"]]
    preds = [s for s in pred_segments if s["category_id"] == category]
    matched_true, matched_pred = set(), set()
    for t in trues:
        for p in preds:
            a, b = true == t["id"], predicted == p["id"]
            if (a & b).sum() / ((a | b) & ~(b & (true == 0))).sum() > 0.5:
                matched_true.add(t["id"])
                matched_pred.add(p["id"])
    false_positives = 0
    for p in preds:
        mask = predicted == p["id"]
        excused = (mask & ((true == 0) | np.isin(true, crowds))).sum() > 0.5 * mask.sum()
        false_positives += p["id"] not in matched_pred and not excused
    return len(matched_pred), false_positives, len(trues) - len(matched_true)


def test_semantic_segments() -> None:
    ids, segments = semantic_segments(torch.tensor([[0, 3], [255, 3]]), 255)
    assert ids.tolist() == [[1, 4], [0, 4]]
    assert segments == [{"id": 1, "category_id": 0, "area": 1}, {"id": 4, "category_id": 3, "area": 2}]


def test_semantic_counts_are_those_of_segments_where_nothing_is_predicted_too() -> None:
    rng = np.random.default_rng(2)
    from_segments, from_counts = (PanopticQuality(dict.fromkeys(range(4), False)) for _ in range(2))
    for _ in range(20):
        true = rng.choice([0, 1, 2, 3, 255], (5, 6)).repeat(4, 0)
        predicted = np.where(rng.random(true.shape) < 0.8, true, rng.choice([0, 1, 2, 3, 255], true.shape))
        from_segments.update(*semantic_segments(predicted, 255), *semantic_segments(true, 255))
        from_counts.update_semantic(SemanticQuality(4, 255).count(predicted, true))
    assert from_counts.per_class() == from_segments.per_class()
    assert 0 < from_counts.compute()["PQ"] < 100


def plain_stuff_quality(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int, ignore: int) -> float:
    """PQ^St in percent by its definition: each class of an image is one segment, the ignore label is void.

    Args:
        pairs: (H, W) labels of truth and prediction of each image.
        classes: how many.
        ignore: label.
    """
    qualities = []
    for label in range(classes):
        ious, false_positives, false_negatives = [], 0, 0
        for true, predicted in pairs:
            t, p, void = true == label, predicted == label, true == ignore
            union = ((t | p) & ~void).sum()
            iou = (t & p).sum() / union if union else 0.0
            if iou > 0.5:
                ious.append(iou)
                continue
            false_negatives += int(t.any())
            false_positives += int(p.any() and (p & void).sum() <= 0.5 * p.sum())
        if ious or false_positives or false_negatives:
            qualities.append(sum(ious) / (len(ious) + 0.5 * false_positives + 0.5 * false_negatives))
    return 100 * sum(qualities) / len(qualities)


def test_quality_of_stuff_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(11)
    classes, ignore = 7, 255  # the last never occurs
    labels = [*range(classes - 1), ignore]
    pairs = []
    for _ in range(25):
        true = rng.choice(labels, (5, 6)).repeat(4, 0).repeat(4, 1)
        spoiled = (rng.random((5, 6)) < 0.4).repeat(4, 0).repeat(4, 1)
        pairs.append((true, np.where(spoiled, rng.choice(labels, true.shape), np.where(true == ignore, 2, true))))
    evaluator = SemSegEvaluator([str(label) for label in range(classes)], ignore)
    for true, predicted in pairs:
        evaluator.count(predicted, true)
    found = evaluator.finish([evaluator.partial()])["PQ_st"]
    assert found == pytest.approx(plain_stuff_quality(pairs, classes, ignore), abs=1e-9)
    assert 5 < found < 95


def test_quality_of_stuff_by_hand() -> None:
    # Class 0: 3 of 4 pixels, one predicted on void that does not count: IoU 3/4. Class 1: missed.
    true = np.array([[0, 0, 0, 0, 1, 255]])
    predicted = np.array([[0, 0, 0, 2, 2, 0]])  # class 2 is a false positive
    evaluator = SemSegEvaluator(["a", "b", "c", "d"], 255)
    evaluator.count(predicted, true)
    assert evaluator.finish([evaluator.partial()])["PQ_st"] == pytest.approx(100 * (0.75 + 0 + 0) / 3)
    assert plain_stuff_quality([(true, predicted)], 4, 255) == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("true_type", "pred_type"), [(np.int32, np.uint8), (np.uint32, np.int64), (np.uint8, np.int32)]
)
def test_maps_of_any_integer_type_and_layout(true_type: Any, pred_type: Any) -> None:
    true, predicted = np.array([[1, 2], [1, 2], [0, 2]], true_type), np.array([[3, 4], [3, 4], [3, 0]], pred_type)
    # An id beyond what the type holds is one that has no pixel.
    truth = [segment(1), segment(2, STUFF), segment(2 + 2**8, STUFF)]
    counted = quality().update(np.asfortranarray(predicted), [segment(3), segment(4, STUFF)], true, truth).per_class()
    assert (counted[THING]["TP"], counted[THING]["SQ"]) == (1, 1.0)
    assert (counted[STUFF]["TP"], counted[STUFF]["FN"]) == (1, 1)
    assert counted[STUFF]["SQ"] == pytest.approx(2 / 3)


def test_ids_of_the_truth_that_are_not_listed_can_be_refused() -> None:
    with pytest.raises(UserError, match="the truth has pixels of segment 9, which its segments do not list"):
        quality().update(row((1, 4)), [segment(1)], row((9, 2), (0, 2)), [], refuse_unlisted=True)


def test_pair_runs() -> None:
    first, second = np.array([[1, 1, 2], [2, 2, 2]]), np.array([[5, 5, 5], [5, 6, 6]])
    assert [a.tolist() for a in pair_runs(first, second)] == [[1, 2, 2], [5, 5, 6], [2, 2, 2]]
    assert [a.tolist() for a in pair_runs(first[:0], second[:0])] == [[], [], []]


def test_count_values() -> None:
    codes = np.random.default_rng(0).integers(-3, 9, (40, 50))
    values, counts = count_values(codes)
    expected = np.unique(codes, return_counts=True)
    assert values.tolist() == expected[0].tolist()
    assert counts.tolist() == expected[1].tolist()
    assert count_values(np.zeros((0, 4), int))[1].tolist() == []

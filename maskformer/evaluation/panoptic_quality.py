"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019), counted image by image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskformer.errors import UserError
from maskformer.evaluation.arrays import as_map, count_values, mean_of, pair_runs
from maskformer.evaluation.fields import as_finite, as_whole

VOID = 0
ID_LIMIT = 2**24
"""Ids are below this, as in panoptic PNGs; it packs a pair of ids into one integer."""

TABLE_LIMIT = 2**12
"""Ids below this are looked up in a table, larger ones searched for."""

IOU_BITS = 53
"""A float64 of ½ or more is a multiple of 2^-53."""

SegmentInfo = Mapping[str, Any]


class _Segments(NamedTuple):
    """The segments of one image as columns of length M, ascending by id."""

    ids: np.ndarray
    rows: np.ndarray  # position of the segment's category in the counters
    areas: np.ndarray  # in pixels; a stated one may be no whole number
    crowd: np.ndarray


class PanopticQuality:
    """PQ, SQ and RQ over all images.

    A predicted and a true segment of one class match if their IoU exceeds ½. Areas: the prediction's is counted, the
    truth's is its ``area`` if it has one; the union leaves out predicted pixels on void. Crowd regions are neither hit
    nor missed; an unmatched prediction with more than half of its area on void and on crowd of its class is no false
    positive.

    Args:
        categories: category id -> whether it is a thing.
        class_names: category id -> name; adds ``PQ-<name>`` to the result.
    """

    def __init__(self, categories: Mapping[int, Any], class_names: Mapping[int, str] | None = None) -> None:
        self.categories = {int(category): bool(isthing) for category, isthing in categories.items()}
        self.class_names = class_names
        self._row = {category: row for row, category in enumerate(self.categories)}
        count = len(self.categories)
        # Sums of floats depend on their order, sums of integers do not: see `_units`.
        self._iou_units = [0] * count
        self.true_positives = np.zeros(count, dtype=np.int64)
        self.false_positives = np.zeros(count, dtype=np.int64)
        self.false_negatives = np.zeros(count, dtype=np.int64)

    @property
    def iou_sum(self) -> np.ndarray:
        """(K,) float64 sum of the IoUs of each category's matches, the same in whatever order they came."""
        return np.array([units / 2**IOU_BITS for units in self._iou_units], dtype=np.float64)

    def update(
        self,
        pred_ids: Any,
        pred_segments: Sequence[SegmentInfo],
        true_ids: Any,
        true_segments: Sequence[SegmentInfo],
        *,
        refuse_unlisted: bool = False,
    ) -> PanopticQuality:
        """Count one image.

        Args:
            pred_ids: (H, W) integer segment ids, 0 where nothing is predicted.
            pred_segments: dicts with ``id`` and ``category_id``, one for each id in `pred_ids`.
            true_ids: (H, W) integer segment ids; 0, and ids that `true_segments` does not list, are void.
            true_segments: dicts with ``id``, ``category_id`` and optionally ``iscrowd`` and ``area``.
            refuse_unlisted: ids of the truth that `true_segments` does not list are a mistake, not void.

        Returns:
            itself.

        Raises:
            UserError: if sizes, ids or categories do not fit together.
        """
        predicted, true = as_map(pred_ids), as_map(true_ids)
        if predicted.shape != true.shape:
            raise UserError(
                f"the prediction is {predicted.shape[0]}x{predicted.shape[1]} but the truth "
                f"{true.shape[0]}x{true.shape[1]}; they must be equal"
            )
        run_true, run_pred, lengths = pair_runs(true, predicted)
        _check_range(run_pred, "prediction")
        _check_range(run_true, "truth")
        truth = self._columns(true_segments, "truth")
        answer = self._columns(pred_segments, "prediction")
        row, column = _positions(truth.ids, run_true), _positions(answer.ids, run_pred)
        # First row and column: pixels of no segment.
        shape = len(truth.ids) + 1, len(answer.ids) + 1
        table = np.bincount(row * shape[1] + column, weights=lengths, minlength=shape[0] * shape[1])
        pixels = table.astype(np.int64).reshape(shape)
        _check_unlisted(run_pred[column == 0], "prediction")
        if refuse_unlisted:
            _check_unlisted(run_true[row == 0], "truth")
        areas = pixels.sum(0)[1:]
        if (areas == 0).any():
            raise UserError(
                f"the prediction lists segment {answer.ids[areas == 0][0]}, which has no pixel; leave it out"
            )
        stated = np.where(np.isnan(truth.areas), pixels.sum(1)[1:], truth.areas)
        self._count(truth._replace(areas=stated), answer._replace(areas=areas), pixels[1:, 1:], pixels[0, 1:])
        return self

    def update_semantic(self, pixels: np.ndarray) -> PanopticQuality:
        """Count one image in which every class is one segment; its categories are 0..K-1.

        As `update` with `semantic_segments` of truth and prediction, from what `SemanticQuality` counts anyway.

        Args:
            pixels: (K+1, K+1) pixels by true (row) and predicted (column) class; last those that have none.

        Returns:
            itself.
        """
        areas, found = pixels.sum(1)[:-1], pixels.sum(0)[:-1]
        true, predicted = np.flatnonzero(areas), np.flatnonzero(found)
        truth = _Segments(true, true, areas[true], np.zeros(len(true), dtype=bool))
        answer = _Segments(predicted, predicted, found[predicted], np.zeros(len(predicted), dtype=bool))
        self._count(truth, answer, pixels[np.ix_(true, predicted)], pixels[-1, predicted])
        return self

    def _columns(self, segments: Sequence[SegmentInfo], what: str) -> _Segments:
        """The segments ascending by id; areas as the truth states them, NaN where none is."""
        whole = [as_whole(segment["id"]) for segment in segments]
        for own in whole:
            if own is None or not VOID < own < ID_LIMIT:
                wrong = segments[whole.index(own)]["id"]
                raise UserError(
                    f"a segment of the {what} has the id {wrong!r:.80}; ids are whole numbers from 1 to {ID_LIMIT - 1}"
                )
        ids = np.array(whole, dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        if (ids[1:] == ids[:-1]).any():
            raise UserError(f"the segments of the {what} have ids {ids.tolist()}; each needs its own")
        ordered = [segments[position] for position in order.tolist()]
        rows = []
        for segment in ordered:
            row = self._row.get(as_whole(segment["category_id"]))  # type: ignore[arg-type]
            if row is None:
                raise UserError(
                    f"segment {segment['id']} of the {what} has category_id {segment['category_id']}, which is no "
                    f"category of the data set ({len(self._row)} categories); check its categories"
                )
            rows.append(row)
        areas = np.full(len(ids), np.nan) if what == "prediction" else _stated_areas(ordered)
        crowd = [bool(segment.get("iscrowd", 0)) for segment in ordered]
        return _Segments(ids, np.array(rows, dtype=np.int64), areas, np.array(crowd, dtype=bool))

    def _count(self, truth: _Segments, answer: _Segments, overlap: np.ndarray, on_void: np.ndarray) -> None:
        """Add one image, given the overlaps (true, predicted) in pixels and the predicted pixels on void."""
        same_class = truth.rows[:, None] == answer.rows[None]
        union = truth.areas[:, None] + answer.areas[None] - overlap - on_void[None]
        iou = np.divide(overlap, union, out=np.zeros(overlap.shape), where=union > 0)
        match = (iou > 0.5) & same_class & ~truth.crowd[:, None]
        size = len(self.categories)
        true_index, pred_index = np.nonzero(match)
        for row, value in zip(truth.rows[true_index].tolist(), iou[true_index, pred_index].tolist(), strict=True):
            self._iou_units[row] += _units(value)
        self.true_positives += np.bincount(truth.rows[true_index], minlength=size)
        missed = ~match.any(1) & ~truth.crowd
        self.false_negatives += np.bincount(truth.rows[missed], minlength=size)
        excused = on_void + (overlap * (same_class & truth.crowd[:, None])).sum(0)
        wrong = ~match.any(0) & ~(excused > 0.5 * answer.areas)
        self.false_positives += np.bincount(answer.rows[wrong], minlength=size)

    def merge(self, other: PanopticQuality) -> PanopticQuality:
        """Add what another one (of the same categories) has counted, for example another process; returns itself."""
        self._iou_units = [a + b for a, b in zip(self._iou_units, other._iou_units, strict=True)]
        self.true_positives += other.true_positives
        self.false_positives += other.false_positives
        self.false_negatives += other.false_negatives
        return self

    def _qualities(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        tp, fp, fn, iou_sum = self.true_positives, self.false_positives, self.false_negatives, self.iou_sum
        present = tp + fp + fn > 0
        divisor = np.maximum(tp + 0.5 * fp + 0.5 * fn, 0.5)
        return {"PQ": iou_sum / divisor, "SQ": iou_sum / np.maximum(tp, 1), "RQ": tp / divisor}, present

    def per_class(self) -> dict[int, dict[str, float]]:
        """For each category id ``PQ``, ``SQ``, ``RQ`` in [0, 1] (NaN if it never occurred), ``TP``, ``FP``, ``FN``."""
        qualities, present = self._qualities()
        table: dict[int, dict[str, float]] = {}
        for row, category in enumerate(self.categories):
            table[category] = {k: float(v[row]) if present[row] else float("nan") for k, v in qualities.items()}
            table[category]["TP"] = int(self.true_positives[row])
            table[category]["FP"] = int(self.false_positives[row])
            table[category]["FN"] = int(self.false_negatives[row])
        return table

    def compute(self) -> dict[str, float]:
        """``PQ``, ``SQ``, ``RQ``, the same of things (``_th``) and stuff (``_st``), with class names ``PQ-<name>``.

        All × 100. Means run over the categories that occur in truth or prediction; NaN where there is none.
        """
        qualities, present = self._qualities()
        things = np.array(list(self.categories.values()), dtype=bool)
        result = {}
        for suffix, chosen in (("", present), ("_th", present & things), ("_st", present & ~things)):
            for metric, values in qualities.items():
                result[metric + suffix] = 100 * mean_of(values, chosen)
        if self.class_names is not None:
            for category, own in self.per_class().items():
                result[f"PQ-{self.class_names[category]}"] = 100 * own["PQ"]
        return result


def _stated_areas(segments: Sequence[SegmentInfo]) -> np.ndarray:
    """(M,) float64, in which whole numbers of pixels are exact; NaN where there is none."""
    areas = np.full(len(segments), np.nan)
    for position, segment in enumerate(segments):
        area = segment.get("area")
        if area is None:
            continue
        number = as_finite(area)
        if number is None or number < 0:
            raise UserError(
                f"segment {segment['id']} of the truth has area {area!r:.80}; it is a number of pixels, or left out"
            )
        areas[position] = number
    return areas


def _units(iou: float) -> int:
    """An IoU above ½ in units of 2^-53, exactly."""
    return int(math.ldexp(iou, IOU_BITS))


def _check_range(ids: np.ndarray, what: str) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= ID_LIMIT):
        raise UserError(f"the {what} has segment ids {ids.min()} to {ids.max()}; they must be in 0 to {ID_LIMIT - 1}")


def _check_unlisted(ids: np.ndarray, what: str) -> None:
    """Pixels that are of no segment must say so."""
    unknown = ids[ids != VOID]
    if len(unknown):
        raise UserError(
            f"the {what} has pixels of segment {unknown.min()}, which its segments do not list; list every id"
        )


def _positions(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value 1 + its place in the ascending `ids`, 0 if it is none of them; all below `ID_LIMIT`."""
    size = int(values.max(initial=0)) + 1
    there = np.flatnonzero(ids < size)
    if size <= TABLE_LIMIT:
        table = np.zeros(size, dtype=np.intp)
        table[ids[there]] = there + 1
        return table[values]
    known = np.append(ids[there], -1)  # what stands after all others equals no value
    position = np.searchsorted(known[:-1], values.astype(np.int64))
    return np.where(known[position] == values, position + 1, 0)


def semantic_segments(label_map: Any, ignore_label: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A label map as panoptic segmentation: each class present is one segment, ignored pixels are void.

    With it `PanopticQuality` of truth and prediction is the PQ of stuff by which semantic models are compared (paper,
    section 4).

    Args:
        label_map: (H, W) integers, classes ≥ 0 or the ignore label.
        ignore_label: becomes void.

    Returns:
        ids (H, W) int64, label + 1 or 0, and dicts with ``id``, ``category_id``, ``area``.
    """
    labels = as_map(label_map).astype(np.int64)
    ids = np.where(labels == ignore_label, VOID, labels + 1)
    values, counts = count_values(ids)
    segments = [
        {"id": int(value), "category_id": int(value) - 1, "area": int(count)}
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        if value != VOID
    ]
    return ids, segments

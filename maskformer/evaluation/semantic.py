"""Semantic segmentation: mean intersection over union and its relatives, and the evaluator that reports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskformer.errors import UserError
from maskformer.evaluation.arrays import as_map, mean_of, pair_runs
from maskformer.evaluation.base import DatasetEvaluator, check_size
from maskformer.evaluation.panoptic_quality import PanopticQuality
from maskformer.evaluation.predictions import encode_label_map


class SemanticQuality:
    """IoU and accuracy from a confusion matrix over all images.

    Args:
        num_classes: K.
        ignore_label: truth pixels of this value do not count.
        class_names: K names; adds ``IoU-<name>`` and ``ACC-<name>`` to the result.
    """

    def __init__(self, num_classes: int, ignore_label: int, class_names: Sequence[str] | None = None) -> None:
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{num_classes} classes need as many names, not {len(class_names)}")
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.class_names = class_names
        # Rows are truth, columns prediction; last stands the ignore label: pixels that do not count, nothing predicted.
        self.confusion = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)

    def update(self, predicted: Any, true: Any) -> SemanticQuality:
        """Count one image.

        Args:
            predicted: (H, W) integers, a class 0..K-1 or the ignore label (nothing predicted, which is wrong).
            true: (H, W) integers, a class 0..K-1 or the ignore label.

        Returns:
            itself.

        Raises:
            UserError: if sizes differ or a value is no class.
        """
        predicted, true = as_map(predicted), as_map(true)
        if predicted.shape != true.shape:
            raise UserError(f"the prediction is {_size(predicted)} but the truth {_size(true)}; they must be equal")
        self.confusion += self.count(predicted, true)
        return self

    def count(self, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
        """Pixels of one image by true and predicted class, (K+1, K+1) int64 as `confusion`, which stays as it is."""
        run_true, run_pred, lengths = pair_runs(true, predicted)
        rows, columns = self._positions(run_true, "truth"), self._positions(run_pred, "prediction")
        size = self.num_classes + 1
        pixels = np.bincount(rows * size + columns, weights=lengths, minlength=size * size)
        return pixels.astype(np.int64).reshape(size, size)

    def _positions(self, labels: np.ndarray, what: str) -> np.ndarray:
        """(R,) int64 row or column of the confusion matrix."""
        ignored = labels == self.ignore_label
        known = (labels >= 0) & (labels < self.num_classes) | ignored
        if not known.all():
            raise UserError(
                f"the {what} has label {labels[~known][0]}, which is neither a class (0 to {self.num_classes - 1}) "
                f"nor the ignore label {self.ignore_label}; check the data set's classes and ignore label"
            )
        return np.where(ignored, self.num_classes, labels).astype(np.int64)

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(K,) float64 pixels of each class: rightly predicted, in the truth, and predicted where the truth counts."""
        counted = self.confusion[: self.num_classes].astype(np.float64)
        return np.diagonal(counted), counted.sum(1), counted[:, : self.num_classes].sum(0)

    def merge(self, other: SemanticQuality) -> SemanticQuality:
        """Add what another one has counted, for example another process; returns itself."""
        self.confusion += other.confusion
        return self

    def per_class(self) -> dict[str, np.ndarray]:
        """``IoU`` and ``ACC`` of each class, (K,) float64 in [0, 1], NaN for classes that the truth lacks."""
        true_positive, in_truth, in_prediction = self._counts()
        present = in_truth > 0
        nothing = np.full(self.num_classes, np.nan)
        union = in_truth + in_prediction - true_positive
        return {
            "IoU": np.divide(true_positive, union, out=nothing.copy(), where=present),
            "ACC": np.divide(true_positive, in_truth, out=nothing.copy(), where=present),
        }

    def compute(self) -> dict[str, float]:
        """``mIoU``, ``fwIoU``, ``mACC``, ``pACC`` and, with class names, ``IoU-<name>``, ``ACC-<name>``: all × 100.

        Means run over the classes that occur in the truth; a class that does not is NaN.
        """
        classes = self.per_class()
        true_positive, in_truth, _ = self._counts()
        present = in_truth > 0
        total, correct = float(in_truth.sum()), float(true_positive.sum())
        weighted = float((classes["IoU"][present] * in_truth[present]).sum())
        result = {
            "mIoU": 100 * mean_of(classes["IoU"], present),
            "fwIoU": 100 * weighted / total if total else float("nan"),
            "mACC": 100 * mean_of(classes["ACC"], present),
            "pACC": 100 * correct / total if total else float("nan"),
        }
        for metric, values in classes.items():
            for name, value in zip(self.class_names or (), values, strict=False):
                result[f"{metric}-{name}"] = 100 * float(value)
        return result


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


class _Counted(NamedTuple):
    quality: SemanticQuality
    stuff_quality: PanopticQuality | None


class SemSegEvaluator(DatasetEvaluator):
    """mIoU and its relatives, PQ^St (every class of an image one segment), and ``sem_seg_predictions.json``.

    Args:
        class_names: K names.
        ignore_label: of the truth.
        dataset_ids: the data set's own id of each class, written to the file; None for 0..K-1.
        output_dir: where the predictions go; None writes none.
        pq_stuff: whether to measure PQ^St, as ``PQ_st``.
    """

    name = "sem_seg"
    file_name = "sem_seg_predictions.json"

    def __init__(
        self,
        class_names: Sequence[str],
        ignore_label: int,
        dataset_ids: Sequence[int] | None = None,
        output_dir: str | Path | None = None,
        *,
        pq_stuff: bool = True,
    ) -> None:
        super().__init__(output_dir)
        self.class_names = list(class_names)
        self.ignore_label = ignore_label
        self.pq_stuff = pq_stuff
        self.dataset_ids = list(dataset_ids) if dataset_ids is not None else list(range(len(self.class_names)))
        self._start()

    def _start(self) -> None:
        super()._start()
        self.quality, self.stuff_quality = self._nothing()

    def _nothing(self) -> _Counted:
        classes = len(self.class_names)
        quality = SemanticQuality(classes, self.ignore_label, self.class_names)
        return _Counted(quality, PanopticQuality(dict.fromkeys(range(classes), False)) if self.pq_stuff else None)

    def process_image(self, sample: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Count one image: ``sem_seg`` (H, W) of the sample against ``sem_seg_labels`` (H, W) of the result."""
        true = as_map(self.need(sample, "sem_seg", "truth"))
        if "sem_seg_labels" in result:
            predicted = as_map(result["sem_seg_labels"])
        else:
            predicted = as_map(self.need(result, "sem_seg", "result").argmax(0))
        check_size(sample, predicted.shape, true.shape)
        self.count(predicted, true)
        if self._file is not None:
            for label, segmentation in encode_label_map(predicted):
                if label == self.ignore_label:
                    continue
                self._file.write(
                    {
                        "file_name": str(sample["file_name"]),
                        "category_id": int(self.dataset_ids[label]),
                        "segmentation": segmentation,
                    }
                )

    def count(self, predicted: np.ndarray, true: np.ndarray) -> None:
        """Add one image of (H, W) labels."""
        pixels = self.quality.count(predicted, true)
        self.quality.confusion += pixels
        if self.stuff_quality is not None:
            self.stuff_quality.update_semantic(pixels)

    def partial(self) -> _Counted:
        """The counters of this process."""
        return _Counted(self.quality, self.stuff_quality)

    def finish(self, partials: Sequence[_Counted]) -> dict[str, float]:
        """``mIoU``, ``fwIoU``, ``mACC``, ``pACC``, ``PQ_st``, then ``IoU-<name>`` and ``ACC-<name>``."""
        total = self._nothing()
        for part in partials:
            total.quality.merge(part.quality)
            if total.stuff_quality is not None and part.stuff_quality is not None:
                total.stuff_quality.merge(part.stuff_quality)
        result = total.quality.compute()
        headline = {key: value for key, value in result.items() if "-" not in key}
        classes = {key: value for key, value in result.items() if key not in headline}
        if total.stuff_quality is not None:
            headline["PQ_st"] = total.stuff_quality.compute()["PQ"]
        return {**headline, **classes}

    def metric_names(self) -> list[str]:
        """See `finish`."""
        return list(self.finish([]))

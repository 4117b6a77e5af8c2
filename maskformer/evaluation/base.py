"""What every evaluator does: count each image exactly once, name the file that cannot be evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from maskformer.errors import UserError

MAX_NAMED = 5


class DatasetEvaluator:
    """Results of one task over a data set: `reset`, then `process` for every batch, then `evaluate`.

    Subclasses say what happens to one image (`process_image`), what comes out (`finish`) and how to start (`_start`).
    """

    name = ""
    """Key of the results, such as ``sem_seg``."""

    def __init__(self) -> None:
        self._seen: Counter[Any] = Counter()
        self._expected: list[Any] | None = None

    def reset(self, expected_ids: Iterable[Any] | None = None) -> None:
        """Forget everything counted so far.

        Args:
            expected_ids: ``image_id`` of every image of the data set; with it `evaluate` refuses to miss one.
        """
        self.close()
        self._seen = Counter()
        self._expected = None if expected_ids is None else list(expected_ids)
        self._start()

    def process(self, samples: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> None:
        """Count a batch.

        Args:
            samples: with ``file_name``, ``image_id`` and the truth.
            results: of the model, one per sample, at the size of the truth.

        Raises:
            UserError: naming the image whose truth or result cannot be used.
        """
        for sample, result in zip(samples, results, strict=True):
            image_id = sample["image_id"]
            self._seen[image_id] += 1
            if self._seen[image_id] > 1:
                continue  # `evaluate` reports all of them at once
            try:
                self.process_image(sample, result)
            except UserError as error:
                if str(sample["file_name"]) in str(error):
                    raise
                raise UserError(f"{sample['file_name']}: {error}") from error

    def evaluate(self) -> dict[str, Any]:
        """The metrics.

        Raises:
            UserError: if images came twice, were missing or were none.
        """
        self.check_images()
        return self.finish()

    def check_images(self) -> None:
        """Every image once, no more, no less."""
        twice = [image_id for image_id, count in self._seen.items() if count > 1]
        if twice:
            raise UserError(
                f"{len(twice)} images were evaluated more than once (image_id {_some(twice)}); "
                "every record of a data set needs its own image_id"
            )
        if not self._seen:
            raise UserError("no image was evaluated; check that the data set in DATASETS.TEST is not empty")
        if self._expected is None:
            return
        repeated = [image_id for image_id, count in Counter(self._expected).items() if count > 1]
        if repeated:
            raise UserError(
                f"{len(repeated)} image ids occur more than once in the data set (image_id {_some(repeated)}); "
                "every record needs its own"
            )
        missing = [image_id for image_id in self._expected if image_id not in self._seen]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self._expected)} images were not evaluated (image_id {_some(missing)}); "
                "the scores would not be those of the data set"
            )

    def need(self, where: Mapping[str, Any], key: str, what: str) -> Any:
        """`where[key]`.

        Raises:
            UserError: if the truth or the result has no such key.
        """
        if key in where:
            return where[key]
        if what == "truth":
            raise UserError(f"the data set has no '{key}' for this image, which evaluating {self.name} needs")
        raise UserError(f"the model gives no '{key}', which evaluating {self.name} needs; see MODEL.MASK_FORMER.TEST")

    def _start(self) -> None:
        """Empty counters and files; called by `reset`."""

    def process_image(self, sample: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Count one image."""
        raise NotImplementedError("an evaluator says how it counts an image")

    def finish(self) -> dict[str, Any]:
        """The metrics of everything counted; files are complete afterwards."""
        raise NotImplementedError("an evaluator says what it has found")

    def close(self) -> None:
        """Let go of what an evaluation that did not finish left open."""


def check_size(sample: Mapping[str, Any], predicted: Sequence[int], true: Sequence[int]) -> None:
    """Prediction and truth must have one size.

    Raises:
        UserError: naming the file.
    """
    if tuple(predicted) != tuple(true):
        raise UserError(
            f"{sample['file_name']}: the prediction is {predicted[0]}x{predicted[1]} but the truth {true[0]}x{true[1]} "
            "(height x width); the label file does not belong to this image, or its record has a wrong height and width"
        )


def _some(ids: Sequence[Any]) -> str:
    named = ", ".join(str(image_id) for image_id in ids[:MAX_NAMED])
    return named if len(ids) <= MAX_NAMED else f"{named}, …"

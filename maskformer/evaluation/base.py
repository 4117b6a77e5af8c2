"""What every evaluator does: count each image once over all processes, name the file that cannot be evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskformer import distributed
from maskformer.errors import UserError
from maskformer.evaluation.predictions import JsonStream, Shard

MAX_NAMED = 5


class _Part(NamedTuple):
    """What one process brings to the main process."""

    seen: Counter[Any]
    counted: Any = None
    shard: Shard | None = None
    problem: str | None = None  # why it has nothing to bring


class DatasetEvaluator:
    """Results of one task over a data set: `reset`, then `process` for every batch, then `evaluate`.

    With several processes each of them processes its own images; `reset` and `evaluate` are called by all of them.
    Results and files are those of one process that sees the images in the order of the ranks.

    Subclasses say how to start (`_start`), what happens to one image (`process_image`), what a process has counted
    (`partial`) and what comes out of all that was counted (`finish`).

    Args:
        output_dir: where predictions go; None writes none.
    """

    name = ""
    """Key of the results, such as ``sem_seg``."""
    file_name: str | None = None
    """Of the JSON file of predictions, a list."""
    list_key: str | None = None
    """Key of that list, where the file is an object."""

    def __init__(self, output_dir: str | Path | None = None) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._seen: Counter[Any] = Counter()
        self._expected: list[Any] | None = None
        self._file_names: list[str] | None = None
        self._file: JsonStream | None = None

    def reset(self, expected_ids: Iterable[Any] | None = None, file_names: Iterable[str] | None = None) -> None:
        """Forget everything counted so far, and remove what a killed evaluation has left.

        Args:
            expected_ids: ``image_id`` of every image of the data set, whichever process sees it; with it `evaluate`
                refuses to miss one.
            file_names: of the same images, in the same order; with it the names of prediction files do not depend on
                the number of processes where images share a name.
        """
        self.close()
        self._seen = Counter()
        self._expected = None if expected_ids is None else list(expected_ids)
        self._file_names = None if file_names is None else list(file_names)
        distributed.on_main(self._remove_leftovers)  # before any process begins a file
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
        """The metrics, on every process.

        Raises:
            UserError: on every process, if images came twice, were missing or were none, or if predictions cannot be
                written.
        """
        parts = distributed.gather_to_main(self._part())
        return distributed.on_main(lambda: self._merge(parts))

    def _part(self) -> _Part:
        try:
            shard = None if self._file is None else self._file.shard()
        except UserError as error:  # raised here it would leave the main process waiting
            return _Part(self._seen, problem=str(error))
        return _Part(self._seen, self.partial(), shard)

    def _merge(self, parts: Sequence[_Part]) -> dict[str, Any]:
        """The metrics of all processes; on the main process."""
        seen: Counter[Any] = Counter()
        for part in parts:
            if part.problem is not None:
                raise UserError(part.problem)
            seen.update(part.seen)
        self.check_images(seen)
        partials = [part.counted for part in parts]
        if self._file is not None:
            self._file.commit(self.tables(partials), [part.shard for part in parts if part.shard is not None])
        return self.finish(partials)

    def check_images(self, seen: Mapping[Any, int]) -> None:
        """Every image once, no more, no less.

        Args:
            seen: how often each ``image_id`` came, over all processes.
        """
        twice = [image_id for image_id, count in seen.items() if count > 1]
        if twice:
            raise UserError(
                f"{len(twice)} images were evaluated more than once (image_id {_some(twice)}); "
                "every record of a data set needs its own image_id"
            )
        if not seen:
            raise UserError("no image was evaluated; check that the data set in DATASETS.TEST is not empty")
        if self._expected is None:
            return
        repeated = [image_id for image_id, count in Counter(self._expected).items() if count > 1]
        if repeated:
            raise UserError(
                f"{len(repeated)} image ids occur more than once in the data set (image_id {_some(repeated)}); "
                "every record needs its own"
            )
        missing = [image_id for image_id in self._expected if image_id not in seen]
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
        if self.output_dir is not None and self.file_name is not None:
            self._file = JsonStream(self.output_dir / self.file_name, self.list_key)

    def _remove_leftovers(self) -> None:
        """Remove temporary files of an evaluation that was killed; on the main process."""
        if self._file is not None:
            self._file.remove_leftovers()

    def process_image(self, sample: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Count one image."""
        raise NotImplementedError("an evaluator says how it counts an image")

    def partial(self) -> Any:
        """What this process has counted so far; can be pickled."""
        raise NotImplementedError("an evaluator says what it has counted")

    def finish(self, partials: Sequence[Any]) -> dict[str, Any]:
        """The metrics of everything counted; called on the main process, when the files are complete.

        Args:
            partials: `partial` of every process, by rank; left as they are, but for what a second call would repeat.
        """
        raise NotImplementedError("an evaluator says what it has found")

    def tables(self, partials: Sequence[Any]) -> dict[str, Any]:
        """What the prediction file holds besides its list."""
        return {}

    def metric_names(self) -> list[str]:
        """Names of the metrics that `evaluate` gives, in its order."""
        return []

    def close(self) -> None:
        """Let go of what an evaluation that did not finish left open."""
        if self._file is not None:
            self._file.discard()


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

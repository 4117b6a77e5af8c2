"""Panoptic segmentation: the evaluator that reports PQ and writes the COCO panoptic prediction file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskformer.errors import UserError
from maskformer.evaluation.arrays import as_map, count_values
from maskformer.evaluation.base import DatasetEvaluator, check_size
from maskformer.evaluation.panoptic_quality import PanopticQuality
from maskformer.evaluation.predictions import remove_partials, write_panoptic_png


class _PngNames:
    """File names of PNGs: an image's stem, or its id where an earlier image of another folder has the stem.

    Args:
        images: id and file name of every image of the data set, so that no name depends on which process sees which
            images; without them images are named as they come.
    """

    def __init__(self, images: Iterable[tuple[Any, str]] = ()) -> None:
        self._names: dict[Any, str] = {}
        self._taken: set[str] = set()
        for image_id, file_name in images:
            self.of(image_id, file_name)

    def of(self, image_id: Any, file_name: str) -> str:
        """The name for an image.

        Raises:
            UserError: if its stem and its id are taken.
        """
        if image_id not in self._names:
            name = Path(file_name).stem + ".png"
            if name in self._taken:
                name = "".join(c if c.isalnum() or c in "-_." else "_" for c in str(image_id)) + ".png"
            if name in self._taken:
                raise _same_name(name)
            self._taken.add(name)
            self._names[image_id] = name
        return self._names[image_id]


def _same_name(name: str) -> UserError:
    return UserError(f"two images would both be written as {name}; give the images different names or ids")


class _Counted(NamedTuple):
    quality: PanopticQuality
    images: list[dict[str, Any]]
    png_names: list[str]


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ of all, thing and stuff classes, and ``predictions.json`` with PNGs in ``predictions/``.

    Args:
        class_names: K names.
        things: K flags, true for countable classes.
        dataset_ids: the data set's own id of each class, written to the file; None for 0..K-1.
        output_dir: where the predictions go; None writes none.
        annotation_file: COCO panoptic JSON whose ``images`` and ``categories`` are copied to the prediction file;
            without it they are made from the images evaluated and the classes.
    """

    name = "panoptic_seg"
    file_name = "predictions.json"
    list_key = "annotations"

    def __init__(
        self,
        class_names: Sequence[str],
        things: Sequence[bool],
        dataset_ids: Sequence[int] | None = None,
        output_dir: str | Path | None = None,
        annotation_file: str | Path | None = None,
    ) -> None:
        super().__init__(output_dir)
        self.class_names = list(class_names)
        self.things = [bool(thing) for thing in things]
        self.dataset_ids = list(dataset_ids) if dataset_ids is not None else list(range(len(self.class_names)))
        self.annotation_file = None if annotation_file is None else Path(annotation_file)
        self._start()

    def _start(self) -> None:
        super()._start()
        self.quality = self._nothing()
        self._images: list[dict[str, Any]] = []
        self._written: list[str] = []
        known = self.output_dir is not None and self._expected is not None and self._file_names is not None
        self._names = _PngNames(zip(self._expected or (), self._file_names or (), strict=True) if known else ())

    def _nothing(self) -> PanopticQuality:
        return PanopticQuality(dict(enumerate(self.things)), dict(enumerate(self.class_names)))

    def _remove_leftovers(self) -> None:
        super()._remove_leftovers()
        if self.output_dir is not None:
            remove_partials(self.output_dir / "predictions", "*.png")

    def process_image(self, sample: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Count one image: ``pan_seg`` of the sample, ``panoptic_seg`` of the result, both (ids (H, W), segments)."""
        true_ids, true_segments = self.need(sample, "pan_seg", "truth")
        pred_ids, pred_segments = self.need(result, "panoptic_seg", "result")
        predicted = as_map(pred_ids)
        check_size(sample, predicted.shape, true_ids.shape)
        self.quality.update(predicted, pred_segments, true_ids, true_segments)
        if self._file is not None and self.output_dir is not None:
            name = self._names.of(sample["image_id"], str(sample["file_name"]))
            self._written.append(name)
            write_panoptic_png(predicted, self.output_dir / "predictions" / name)
            self._file.write(self._annotation(sample["image_id"], name, predicted, pred_segments))
            height, width = predicted.shape
            file_name = Path(str(sample["file_name"])).name
            self._images.append(
                {"id": sample["image_id"], "file_name": file_name, "height": int(height), "width": int(width)}
            )

    def _annotation(
        self, image_id: Any, png_name: str, predicted: np.ndarray, segments: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        values, counts = count_values(predicted)
        area = dict(zip(values.tolist(), counts.tolist(), strict=True))
        infos = []
        for segment in segments:
            info: dict[str, Any] = {
                "id": int(segment["id"]),
                "category_id": int(self.dataset_ids[int(segment["category_id"])]),
                "area": int(area[int(segment["id"])]),
                "isthing": int(self.things[int(segment["category_id"])]),
                "iscrowd": 0,
            }
            if "score" in segment:
                info["score"] = round(float(segment["score"]), 5)
            infos.append(info)
        return {"image_id": image_id, "file_name": png_name, "segments_info": infos}

    def partial(self) -> _Counted:
        """The counters of this process, and what it has written."""
        return _Counted(self.quality, self._images, self._written)

    def finish(self, partials: Sequence[_Counted]) -> dict[str, float]:
        """``PQ``, ``SQ``, ``RQ``, the same of things and stuff, then ``PQ-<name>``."""
        total = self._nothing()
        for part in partials:
            total.merge(part.quality)
        return total.compute()

    def metric_names(self) -> list[str]:
        """See `finish`."""
        return list(self.finish([]))

    def tables(self, partials: Sequence[_Counted]) -> dict[str, Any]:
        """``images`` and ``categories``, from the truth's file if there is one.

        Raises:
            UserError: if two processes have written PNGs of one name.
        """
        for name, count in Counter(name for part in partials for name in part.png_names).items():
            if count > 1:
                raise _same_name(name)
        if self.annotation_file is not None and self.annotation_file.is_file():
            with self.annotation_file.open(encoding="utf-8") as file:
                truth = json.load(file)
            return {key: truth[key] for key in ("images", "categories") if key in truth}
        columns = zip(self.dataset_ids, self.class_names, self.things, strict=True)
        categories = [{"id": int(i), "name": name, "isthing": int(thing)} for i, name, thing in columns]
        return {"images": [image for part in partials for image in part.images], "categories": categories}

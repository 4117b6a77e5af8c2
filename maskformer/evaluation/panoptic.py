"""Panoptic segmentation: the evaluator that reports PQ and writes the COCO panoptic prediction file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskformer.errors import UserError
from maskformer.evaluation.arrays import as_map, count_values
from maskformer.evaluation.base import DatasetEvaluator, check_size
from maskformer.evaluation.panoptic_quality import PanopticQuality
from maskformer.evaluation.predictions import JsonStream, write_panoptic_png


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

    def __init__(
        self,
        class_names: Sequence[str],
        things: Sequence[bool],
        dataset_ids: Sequence[int] | None = None,
        output_dir: str | Path | None = None,
        annotation_file: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.things = [bool(thing) for thing in things]
        self.dataset_ids = list(dataset_ids) if dataset_ids is not None else list(range(len(self.class_names)))
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.annotation_file = None if annotation_file is None else Path(annotation_file)
        self._start()

    def _start(self) -> None:
        self.quality = PanopticQuality(dict(enumerate(self.things)), dict(enumerate(self.class_names)))
        self._images: list[dict[str, Any]] = []
        self._names: set[str] = set()
        self._file = (
            None if self.output_dir is None else JsonStream(self.output_dir / "predictions.json", "annotations")
        )

    def process_image(self, sample: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Count one image: ``pan_seg`` of the sample, ``panoptic_seg`` of the result, both (ids (H, W), segments)."""
        true_ids, true_segments = self.need(sample, "pan_seg", "truth")
        pred_ids, pred_segments = self.need(result, "panoptic_seg", "result")
        predicted = as_map(pred_ids)
        check_size(sample, predicted.shape, true_ids.shape)
        self.quality.update(predicted, pred_segments, true_ids, true_segments)
        if self._file is not None and self.output_dir is not None:
            name = self._png_name(sample)
            write_panoptic_png(predicted, self.output_dir / "predictions" / name)
            self._file.write(self._annotation(sample["image_id"], name, predicted, pred_segments))
            height, width = predicted.shape
            file_name = Path(str(sample["file_name"])).name
            self._images.append(
                {"id": sample["image_id"], "file_name": file_name, "height": int(height), "width": int(width)}
            )

    def _png_name(self, sample: Mapping[str, Any]) -> str:
        """The image's stem, or its id where two images of different folders share the stem."""
        name = Path(str(sample["file_name"])).stem + ".png"
        if name in self._names:
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in str(sample["image_id"])) + ".png"
        if name in self._names:
            raise UserError(f"two images would both be written as {name}; give the images different names or ids")
        self._names.add(name)
        return name

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

    def finish(self) -> dict[str, float]:
        """The metrics; the files are complete afterwards."""
        if self._file is not None:
            self._file.commit(self._truth_tables())
        return self.quality.compute()

    def _truth_tables(self) -> dict[str, Any]:
        if self.annotation_file is not None and self.annotation_file.is_file():
            with self.annotation_file.open(encoding="utf-8") as file:
                truth = json.load(file)
            return {key: truth[key] for key in ("images", "categories") if key in truth}
        columns = zip(self.dataset_ids, self.class_names, self.things, strict=True)
        categories = [{"id": int(i), "name": name, "isthing": int(thing)} for i, name, thing in columns]
        return {"images": self._images, "categories": categories}

    def close(self) -> None:
        """Throw an unfinished file away."""
        if self._file is not None:
            self._file.discard()

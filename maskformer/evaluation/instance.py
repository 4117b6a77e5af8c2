"""Instance segmentation: COCO's average precision of masks, and the COCO results file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskformer.data.image_io import segmentation_to_rle
from maskformer.errors import UserError
from maskformer.evaluation.arrays import as_map
from maskformer.evaluation.base import DatasetEvaluator, check_size
from maskformer.evaluation.predictions import encode_masks

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class _Image(NamedTuple):
    """One image as pycocotools wants it, but without ids, which follow from all images."""

    size: tuple[int, int]
    truth: list[dict[str, Any]]
    detections: list[dict[str, Any]]


class InstanceEvaluator(DatasetEvaluator):
    """Mask AP (×100) as COCO defines it, by pycocotools, and ``coco_instances_results.json``.

    Truth comes from ``annotations`` of the sample, or from the things of its ``pan_seg``.

    Args:
        class_names: K names.
        things: K flags; only these classes have AP.
        dataset_ids: the data set's own id of each class, written to the file; None for 0..K-1.
        output_dir: where the predictions go; None writes none.
    """

    name = "segm"
    file_name = "coco_instances_results.json"

    def __init__(
        self,
        class_names: Sequence[str],
        things: Sequence[bool],
        dataset_ids: Sequence[int] | None = None,
        output_dir: str | Path | None = None,
    ) -> None:
        super().__init__(output_dir)
        self.class_names = list(class_names)
        self.things = [bool(thing) for thing in things]
        self.dataset_ids = list(dataset_ids) if dataset_ids is not None else list(range(len(self.class_names)))
        self._start()

    def _start(self) -> None:
        super()._start()
        self._images: list[_Image] = []

    def process_image(self, sample: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Note one image: its true objects, and ``instances`` (masks (N, H, W), labels, scores (N,)) of the result."""
        instances = self.need(result, "instances", "result")
        masks = np.asarray(instances["masks"].cpu(), dtype=bool)
        labels, scores = instances["labels"].tolist(), instances["scores"].tolist()
        detections = [
            {"category_id": label, "score": score, "segmentation": segmentation}
            for label, score, segmentation in zip(labels, scores, encode_masks(masks), strict=True)
        ]
        self.add(sample, tuple(masks.shape[-2:]), detections)
        if self._file is not None:
            for item in detections:
                own = {"image_id": sample["image_id"], "category_id": int(self.dataset_ids[item["category_id"]])}
                # As many digits as tell float32 numbers apart, for the order of the scores decides.
                score = float(str(np.float32(item["score"])))
                self._file.write({**own, "score": score, "segmentation": item["segmentation"]})

    def add(self, sample: Mapping[str, Any], size: tuple[int, ...], detections: Sequence[Mapping[str, Any]]) -> None:
        """Note one image.

        Args:
            sample: with the truth.
            size: (height, width) of the detections' masks.
            detections: dicts of contiguous ``category_id``, ``score`` and ``segmentation`` (compressed COCO RLE).

        Raises:
            UserError: if there is no truth, or it has another size.
        """
        truth, true_size = self._true_objects(sample, size)
        check_size(sample, size, true_size)
        keys = "category_id", "score", "segmentation"
        self._images.append(_Image(true_size, truth, [{key: item[key] for key in keys} for item in detections]))

    def _true_objects(
        self, sample: Mapping[str, Any], default_size: tuple[int, ...]
    ) -> tuple[list[dict[str, Any]], tuple[int, int]]:
        """COCO annotations (RLE) of one image without ids, and its height and width."""
        if "annotations" in sample:
            height = int(sample.get("height", default_size[0]))
            width = int(sample.get("width", default_size[1]))
            annotations = [a for a in sample["annotations"] if self.things[int(a["category_id"])]]
            where = f"an annotation of image {str(sample['file_name'])!r}"
            return [_true_object(a, height, width, where) for a in annotations], (height, width)
        if "pan_seg" not in sample:
            raise UserError(
                "the data set has neither 'annotations' nor 'pan_seg' for this image, which evaluating instances needs"
            )
        ids, segments = as_map(sample["pan_seg"][0]), sample["pan_seg"][1]
        segments = [s for s in segments if self.things[int(s["category_id"])]]
        masks = ids[None] == np.array([s["id"] for s in segments], dtype=np.int64).reshape(-1, 1, 1)
        objects = [
            _true_object({**segment, "segmentation": segmentation}, ids.shape[0], ids.shape[1], "pan_seg")
            for segment, segmentation in zip(segments, encode_masks(masks), strict=True)
        ]
        return objects, (ids.shape[0], ids.shape[1])

    def partial(self) -> list[_Image]:
        """The images of this process."""
        return self._images

    def finish(self, partials: Sequence[list[_Image]]) -> dict[str, float]:
        """``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AP-<name>``; NaN without such true objects."""
        categories = [{"id": label, "name": self.class_names[label]} for label, t in enumerate(self.things) if t]
        result = dict.fromkeys(SUMMARY, float("nan"))
        precision = np.zeros((0, 0, len(categories)))
        images, truth, detections = _numbered([image for part in partials for image in part])
        if truth:
            evaluation = _coco_evaluation(
                {"images": images, "annotations": truth, "categories": categories}, detections
            )
            result.update(zip(SUMMARY, (_percent(value) for value in evaluation.stats[:6]), strict=True))
            precision = evaluation.eval["precision"][:, :, :, 0, -1]
        for index, category in enumerate(categories):
            valid = precision[:, :, index]
            valid = valid[valid > -1]
            result[f"AP-{category['name']}"] = _percent(valid.mean()) if valid.size else float("nan")
        return result

    def metric_names(self) -> list[str]:
        """See `finish`."""
        return list(self.finish([]))


def _numbered(images: Sequence[_Image]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Images, true objects and detections with ids, in place: there may be half a million detections."""
    table = [{"id": n, "height": image.size[0], "width": image.size[1]} for n, image in enumerate(images, start=1)]
    for number, image in enumerate(images, start=1):
        for item in (*image.truth, *image.detections):
            item["image_id"] = number
    truth = [item for image in images for item in image.truth]
    for number, item in enumerate(truth, start=1):  # not from 0, which pycocotools takes for "unmatched"
        item["id"] = number
    return table, truth, [item for image in images for item in image.detections]


def _true_object(annotation: Mapping[str, Any], height: int, width: int, where: str) -> dict[str, Any]:
    run = segmentation_to_rle(annotation["segmentation"], height, width, where)
    return {
        "category_id": int(annotation["category_id"]),
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "segmentation": run,
        "bbox": [float(x) for x in coco_mask.toBbox(run)],
        "area": float(coco_mask.area(run) if annotation.get("area") is None else annotation["area"]),
    }


def _coco_evaluation(truth: dict[str, Any], detections: list[dict[str, Any]]) -> Any:
    """Pycocotools' evaluation of masks, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        found = COCO()
        found.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": []}
        for number, detection in enumerate(detections, start=1):
            run = detection["segmentation"]
            detection.update(
                id=number, iscrowd=0, area=float(coco_mask.area(run)), bbox=[float(x) for x in coco_mask.toBbox(run)]
            )
        found.dataset["annotations"] = detections
        found.createIndex()
        evaluation = COCOeval(reference, found, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _percent(value: float) -> float:
    return 100 * float(value) if value > -1 else float("nan")

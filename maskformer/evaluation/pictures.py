"""A few images of a data set, each as image | truth | prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskformer import distributed
from maskformer.data.image_io import decode_segmentation
from maskformer.errors import UserError
from maskformer.evaluation.base import DatasetEvaluator
from maskformer.evaluation.predictions import remove_partials, write_png
from maskformer.visualization import (
    LegendEntry,
    Overlay,
    add_legend,
    instance_overlay,
    panoptic_overlay,
    read_array,
    semantic_overlay,
    side_by_side,
)

LONGEST_SIDE = 1024
"""Larger images are shrunk for the picture."""


class PictureSaver(DatasetEvaluator):
    """Saves image | truth | prediction of a few images, spread evenly over the data set; always the same ones.

    Args:
        directory: where the PNGs go.
        count: of images.
        metadata: names, things, colours, ignore label.
        image_format: order of the channels of ``image`` in the samples, RGB or BGR.
    """

    name = "pictures"

    def __init__(self, directory: str | Path, count: int, metadata: Any, image_format: str = "RGB") -> None:
        super().__init__()
        self.directory = Path(directory)
        self.count = count
        self.metadata = metadata
        self.image_format = image_format
        self.pictures: dict[str, Path] = {}
        self._chosen: list[Any] | None = None
        self._saved = 0

    def reset(self, expected_ids: Iterable[Any] | None = None, file_names: Iterable[str] | None = None) -> None:
        """Start anew.

        Args:
            expected_ids: tells which images are saved, whichever process sees them; without it they are the first ones
                of the main process.
            file_names: of the same images.
        """
        ids = None if expected_ids is None else list(expected_ids)
        super().reset(ids, file_names)
        self.pictures = {}
        self._saved = 0
        self._chosen = None
        if ids is not None:
            places = np.linspace(0, len(ids) - 1, min(self.count, len(ids))).round().astype(int) if ids else []
            self._chosen = [ids[place] for place in places]

    def _remove_leftovers(self) -> None:
        remove_partials(self.directory, "*.png")

    def process_image(self, sample: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Save the image if it is one of the chosen."""
        if self._chosen is None:
            if self._saved >= self.count or not distributed.is_main():
                return
        elif sample["image_id"] not in self._chosen:
            return
        number = self._saved if self._chosen is None else self._chosen.index(sample["image_id"])
        self._saved += 1
        image, size = self._image(sample)
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(str(sample["file_name"])).stem)
        for task, truth, prediction in self._overlays(image, size, sample, result):
            row = side_by_side([image, truth.picture, prediction.picture], ["image", "truth", "prediction"])
            path = self.directory / f"{number:02d}_{stem}_{task}.png"
            write_png(add_legend(row, _common_legend(truth, prediction)), path)
            self.pictures[f"{task}/{number:02d}_{stem}"] = path

    def partial(self) -> dict[str, Path]:
        """The pictures of this process."""
        return self.pictures

    def finish(self, partials: Sequence[dict[str, Path]]) -> dict[str, Any]:
        """Nothing is measured; on the main process `pictures` now has the files of all, by name.

        Raises:
            UserError: if a file is not there.
        """
        self.pictures = {name: path for part in partials for name, path in part.items()}
        for path in self.pictures.values():
            if not path.is_file():
                raise UserError(
                    f"{path}, written by another process, is not there for the main process; "
                    "OUTPUT_DIR must be on a file system that all machines share"
                )
        return {}

    def _image(self, sample: Mapping[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
        """The RGB image at the size of the picture, and that size: of the truth, but not above `LONGEST_SIDE`."""
        image = read_array(sample["image"]).transpose(1, 2, 0)
        if self.image_format == "BGR":
            image = image[..., ::-1]
        height, width = int(sample.get("height", image.shape[0])), int(sample.get("width", image.shape[1]))
        scale = min(1.0, LONGEST_SIDE / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        resized = Image.fromarray(np.ascontiguousarray(image)).resize(size[::-1], Image.Resampling.BICUBIC)
        return np.asarray(resized), size

    def _overlays(
        self, image: np.ndarray, size: tuple[int, int], sample: Mapping[str, Any], result: Mapping[str, Any]
    ) -> list[tuple[str, Overlay, Overlay]]:
        """(task, truth, prediction) for every task that both have."""
        found = []
        if "sem_seg" in sample and "sem_seg_labels" in result:
            truth = semantic_overlay(image, _nearest(sample["sem_seg"], size), self.metadata)
            prediction = semantic_overlay(image, _nearest(result["sem_seg_labels"], size), self.metadata)
            found.append(("semantic", truth, prediction))
        if "pan_seg" in sample and "panoptic_seg" in result:
            pair = [
                panoptic_overlay(image, _nearest(ids, size), segments, self.metadata)
                for ids, segments in (sample["pan_seg"], result["panoptic_seg"])
            ]
            found.append(("panoptic", pair[0], pair[1]))
        if "annotations" in sample and "instances" in result:
            instances = dict(result["instances"])
            instances["masks"] = _nearest(instances["masks"], size)
            truth = instance_overlay(image, _true_instances(sample, size), self.metadata)
            found.append(("instance", truth, instance_overlay(image, instances, self.metadata)))
        return found


def _nearest(maps: Any, size: tuple[int, int]) -> np.ndarray:
    """(…, H, W) maps resampled by nearest."""
    array = read_array(maps)
    rows = np.arange(size[0]) * array.shape[-2] // size[0]
    columns = np.arange(size[1]) * array.shape[-1] // size[1]
    return array[..., rows[:, None], columns]


def _true_instances(sample: Mapping[str, Any], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The COCO annotations of a sample as instances of score 1 with masks (N, *size), crowd left out."""
    kept = [annotation for annotation in sample["annotations"] if not annotation.get("iscrowd", 0)]
    where = f"an annotation of image {str(sample['file_name'])!r}"
    height, width = int(sample["height"]), int(sample["width"])
    masks = [_nearest(decode_segmentation(a["segmentation"], height, width, where), size) for a in kept]
    return {
        "masks": np.stack(masks) if masks else np.zeros((0, *size), dtype=bool),
        "labels": np.array([int(annotation["category_id"]) for annotation in kept], dtype=np.int64),
        "scores": np.ones(len(kept)),
    }


def _common_legend(truth: Overlay, prediction: Overlay) -> list[LegendEntry]:
    """What the colours of either picture mean, without numbers, which are those of one picture only."""
    entries: dict[str, LegendEntry] = {}
    for overlay in (truth, prediction):
        for entry in overlay.legend:
            entries.setdefault(entry.name, LegendEntry(entry.name, entry.colors[:1]))
    return list(entries.values())

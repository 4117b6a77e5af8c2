"""The published recipes: from a record to a sample, for training and for testing.

A recipe is called with (record, rng); all chance comes from `rng`, so a sample is a function of record and seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from maskformer.data import image_io, labels
from maskformer.data.dataset import Metadata, Record, nearest
from maskformer.data.transforms import (
    Crop,
    CropRule,
    Geometry,
    Mirror,
    Resize,
    ResizeRule,
    Size,
    distort_colors,
    pad_to_canvas,
    shortest_edge_size,
)
from maskformer.errors import UserError
from maskformer.structures import UNSUPERVISED

Sample = dict[str, Any]
CountClasses = Callable[[Geometry], np.ndarray]
"""Geometry → pixels of each class in its result."""


# ------------------------------------------------------------------ plans
@dataclass(frozen=True)
class ResizeCropMirror:
    """Resize, crop (if any), mirror one half of the images: the recipes ``mask_former_*``."""

    resize: ResizeRule
    crop: CropRule | None

    def __call__(self, rng: np.random.Generator, size: Size, count_classes: CountClasses) -> Geometry:
        """The geometry of one sample from an image of (H, W)."""
        geometry = Geometry(size).then(self.resize.draw(rng, size))
        geometry = _cropped(geometry, self.crop, rng, count_classes)
        return geometry.then(Mirror()) if rng.random() < 0.5 else geometry


@dataclass(frozen=True)
class MirrorCropResize:
    """Mirror one half; then resize, or (half of the time, if there is a crop) resize small, crop, resize.

    The recipe ``detr_panoptic``.
    """

    resize: ResizeRule
    crop: CropRule | None

    SMALL = ResizeRule((400, 500, 600), longest=2**31)

    def __call__(self, rng: np.random.Generator, size: Size, count_classes: CountClasses) -> Geometry:
        """The geometry of one sample from an image of (H, W)."""
        geometry = Geometry(size)
        if rng.random() < 0.5:
            geometry = geometry.then(Mirror())
        if self.crop is not None and rng.random() < 0.5:
            geometry = geometry.then(self.SMALL.draw(rng, size))
            geometry = _cropped(geometry, self.crop, rng, count_classes)
        return geometry.then(self.resize.draw(rng, geometry.size))


Plan = ResizeCropMirror | MirrorCropResize


def _cropped(
    geometry: Geometry, crop: CropRule | None, rng: np.random.Generator, count_classes: CountClasses
) -> Geometry:
    if crop is None:
        return geometry

    def count(box: Crop) -> np.ndarray:
        return count_classes(geometry.then(box))

    return geometry.then(crop.draw(rng, geometry.size, count))


# ------------------------------------------------------------------ recipes
@dataclass(frozen=True)
class TrainingRecipe:
    """Record → training sample.

    Attributes:
        task: ``semantic``, ``panoptic`` or ``instance``: which segments supervise.
        metadata: of the data set the records come from.
        image_format: ``RGB`` or ``BGR``.
        plan: draws the geometry.
        colors: whether to distort colours as SSD does.
        canvas: side of the square that samples are padded to; 0 or below: none.
        keep_empty: keep segments that have no pixel left (semantic ones are always those present).
    """

    task: str
    metadata: Metadata
    image_format: str
    plan: Plan
    colors: bool
    canvas: int
    keep_empty: bool

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        """Reads and augments one record.

        Args:
            record: of the data set.
            rng: source of all chance.

        Returns:
            ``image`` (3, H, W) uint8, ``segments`` SegmentMap of (H, W), ``height``, ``width`` of the image as stored,
            ``file_name``, ``image_id``.

        Raises:
            UserError: if a file is unreadable, sizes differ, or a label is unknown.
        """
        image = read_record_image(record, self.image_format)
        size = (image.shape[0], image.shape[1])
        planes, classes, plane = labels.READERS[self.task](record, self.metadata)
        _check_label_size(planes.shape[1:], size, record, self.task)

        def count_classes(geometry: Geometry) -> np.ndarray:
            areas = np.bincount((geometry.apply_to_ids(planes) + np.int16(1)).reshape(-1), minlength=len(classes) + 1)
            return np.bincount(classes, weights=areas[1:]) if len(classes) else np.zeros(1)

        geometry = self.plan(rng, size, count_classes)
        image = geometry.apply_to_image(image)
        if self.colors:
            image = distort_colors(image, rng, self.image_format)
        image, planes = pad_to_canvas(image, geometry.apply_to_ids(planes), self.canvas, UNSUPERVISED)
        keep_empty = self.keep_empty and self.task != "semantic"
        return {
            "image": _to_tensor(image),
            "segments": labels.planes_to_segment_map(planes, classes, plane, keep_empty),
            "height": size[0],
            "width": size[1],
            "file_name": record["file_name"],
            "image_id": record["image_id"],
        }


@dataclass(frozen=True)
class TestRecipe:
    """Record → test sample: resized image, and the truth at the original size.

    Attributes:
        metadata: of the data set the records come from.
        image_format: ``RGB`` or ``BGR``.
        shorter: the image's shorter side becomes this; 0: as it is.
        longest: unless the longer side would exceed this.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    metadata: Metadata
    image_format: str
    shorter: int
    longest: int

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Sample:
        """Reads one record; `rng` is not used.

        Returns:
            ``image`` (3, H', W') uint8, ``height``, ``width`` of the image as stored (results have this size),
            ``file_name``, ``image_id``, and what truth the record has: ``sem_seg`` (H, W) int32 contiguous labels and
            ignore label; ``pan_seg`` = ((H, W) int32 ids, list of ``{id, category_id, isthing, iscrowd, area}``);
            ``annotations`` list of ``{id, category_id, iscrowd, area, bbox, segmentation}``.
        """
        image = read_record_image(record, self.image_format)
        size = (image.shape[0], image.shape[1])
        sample: Sample = {
            "image": _to_tensor(resize_for_test(image, self.shorter, self.longest)),
            "height": size[0],
            "width": size[1],
            "file_name": record["file_name"],
            "image_id": record["image_id"],
        }
        if "pan_seg_file_name" in record:
            ids, segments = labels.read_panoptic(record, self.metadata)
            _check_label_size(ids.shape, size, record, "panoptic")
            sample["pan_seg"] = (torch.from_numpy(np.array(ids, np.int32)), segments)
        if "sem_seg_file_name" in record or ("sem_seg" in self.metadata.evaluators and "pan_seg" in sample):
            label_map = labels.read_semantic(record, self.metadata)
            _check_label_size(label_map.shape, size, record, "semantic")
            sample["sem_seg"] = torch.from_numpy(np.ascontiguousarray(label_map, np.int32))
        if "annotations" in record:
            sample["annotations"] = [dict(a) for a in record["annotations"]]
        return sample


def resize_for_test(image: np.ndarray, shorter: int, longest: int) -> np.ndarray:
    """The test-time resize of an (H, W, 3) uint8 image: shorter side, but longer at most `longest`; 0: unchanged."""
    size = shortest_edge_size(image.shape[0], image.shape[1], shorter, longest)
    return Geometry((image.shape[0], image.shape[1])).then(Resize(*size)).apply_to_image(image)


def read_record_image(record: Record, image_format: str) -> np.ndarray:
    """The (H, W, 3) uint8 image of a record, refused if its size is not the recorded one."""
    image = image_io.read_image(record["file_name"], image_format)
    if "height" in record and "width" in record:
        expected, path = (int(record["height"]), int(record["width"])), str(record["file_name"])
        image_io.check_size(image.shape[:2], expected, path, "file_name", "its recorded size", path)
    return image


def _check_label_size(found: tuple[int, ...], size: Size, record: Record, task: str) -> None:
    field = "pan_seg_file_name" if task == "panoptic" or "sem_seg_file_name" not in record else "sem_seg_file_name"
    if found != size:
        path = str(record["file_name"])
        image_io.check_size(found, size, record.get(field, "annotations"), field, f"image {path!r}", path)


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 array → (3, H, W) contiguous tensor of its own memory."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


# ------------------------------------------------------------------ from the config
_TASKS: dict[str, tuple[str, type[ResizeCropMirror] | type[MirrorCropResize]]] = {
    "mask_former_semantic": ("semantic", ResizeCropMirror),
    "mask_former_panoptic": ("panoptic", ResizeCropMirror),
    "mask_former_instance": ("instance", ResizeCropMirror),
    "detr_panoptic": ("panoptic", MirrorCropResize),
}


def recipe_task(cfg: CfgNode) -> str:
    """What ``INPUT.DATASET_MAPPER_NAME`` trains on: ``semantic``, ``panoptic`` or ``instance``."""
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in _TASKS:
        raise UserError(f"INPUT.DATASET_MAPPER_NAME is {name!r}, which is not a recipe: {nearest(name, _TASKS)}")
    return _TASKS[name][0]


def build_recipe(cfg: CfgNode, metadata: Metadata, training: bool) -> TrainingRecipe | TestRecipe:
    """The recipe that the config names.

    Args:
        cfg: reads ``INPUT``.
        metadata: of the data set whose records will be read.
        training: the training recipe, else the test recipe.

    Raises:
        UserError: if a value of ``INPUT`` makes no sense.
    """
    if cfg.INPUT.FORMAT not in image_io.IMAGE_FORMATS:
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but images can only be read as RGB or BGR")
    if not training:
        return TestRecipe(metadata, cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    task = recipe_task(cfg)
    plan = _TASKS[cfg.INPUT.DATASET_MAPPER_NAME][1](_resize_rule(cfg), _crop_rule(cfg))
    published = cfg.INPUT.DATASET_MAPPER_NAME == "detr_panoptic"  # which has neither colours nor canvas
    return TrainingRecipe(
        task=task,
        metadata=metadata,
        image_format=cfg.INPUT.FORMAT,
        plan=plan,
        colors=bool(cfg.INPUT.COLOR_AUG_SSD) and not published,
        canvas=-1 if published else int(cfg.INPUT.SIZE_DIVISIBILITY),
        keep_empty=bool(cfg.INPUT.KEEP_EMPTY_SEGMENTS),
    )


def _resize_rule(cfg: CfgNode) -> ResizeRule:
    given = cfg.INPUT.MIN_SIZE_TRAIN
    sizes = (given,) if isinstance(given, int) else tuple(int(s) for s in given)
    sampling = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    if sampling == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN is {given}, but MIN_SIZE_TRAIN_SAMPLING 'range' needs two sizes, the lower first"
        )
    return ResizeRule(sizes, int(cfg.INPUT.MAX_SIZE_TRAIN), sampling)


def _crop_rule(cfg: CfgNode) -> CropRule | None:
    crop = cfg.INPUT.CROP
    if not crop.ENABLED:
        return None
    size = (crop.SIZE[0], crop.SIZE[1])
    if crop.TYPE.startswith("relative"):
        if not all(0 < s <= 1 for s in size):
            raise UserError(f"INPUT.CROP.SIZE is {size}, but TYPE {crop.TYPE!r} needs two fractions in (0, 1]")
    elif not all(float(s).is_integer() and s >= 1 for s in size):
        raise UserError(f"INPUT.CROP.SIZE is {size}, but TYPE {crop.TYPE!r} needs two numbers of pixels")
    elif crop.TYPE == "absolute_range" and size[0] > size[1]:
        raise UserError(f"INPUT.CROP.SIZE is {size}, but TYPE 'absolute_range' needs the smaller number first")
    canvas = cfg.INPUT.SIZE_DIVISIBILITY
    too_large = not crop.TYPE.startswith("relative") and 0 < canvas < min(max(size), cfg.INPUT.MAX_SIZE_TRAIN)
    if too_large and "detr" not in cfg.INPUT.DATASET_MAPPER_NAME:
        raise UserError(
            f"INPUT.SIZE_DIVISIBILITY {canvas} is smaller than INPUT.CROP.SIZE {size}: crops would not fit the canvas"
        )
    return CropRule(crop.TYPE, size, float(crop.SINGLE_CATEGORY_MAX_AREA))

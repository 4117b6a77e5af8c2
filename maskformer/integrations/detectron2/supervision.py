"""What supervises a sample, whoever made the sample: our recipes, Detectron2's mappers or a third party's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from maskformer.errors import UserError
from maskformer.structures import SegmentMap


def segment_map(
    sample: Mapping[str, Any], ignore_label: int, keep_empty: bool = False, num_classes: int | None = None
) -> SegmentMap:
    """The segments of a sample at the size of its image; the meta-architecture pads them to its batch.

    Args:
        sample: with ``segments`` (`SegmentMap`, taken as it is); else ``instances`` (Detectron2's, with ``gt_classes``
            and ``gt_masks`` as `BitMasks`, `PolygonMasks` or an (M, H, W) tensor, which may overlap); else ``sem_seg``
            (H, W), integer labels. With ``image`` (3, H, W), its size is compared.
        ignore_label: value of unsupervised pixels in ``sem_seg``.
        keep_empty: keep instances that have no pixel as empty masks.
        num_classes: K; None for labels that are not checked. Those of ``segments`` on another device than the CPU are
            not checked either, since reading them would wait for it.

    Raises:
        UserError: if the sample has none of these, or what it has cannot be used.
    """
    name = _name(sample)
    segments = _segments(sample, ignore_label, name)
    if "image" in sample and tuple(sample["image"].shape[1:]) != segments.size:
        (height, width), own = sample["image"].shape[1:], segments.size
        raise UserError(
            f"the truth of {name} is {own[0]}x{own[1]} but its image {height}x{width} (height x width); let the mapper "
            "transform both alike"
        )
    if num_classes is not None and segments.labels.device.type == "cpu":
        check_labels(segments.labels, num_classes, ignore_label, name)
    return segments if keep_empty or "segments" in sample or "instances" not in sample else segments.drop_empty()


def check_labels(labels: Tensor, num_classes: int, ignore_label: int, name: str) -> None:
    """Refuse classes that a model does not have; class K would train towards *no object*.

    Args:
        labels: integers of any shape, without unsupervised pixels.
        num_classes: K.
        ignore_label: named in the message alone.
        name: of what the labels are of.

    Raises:
        UserError: if a label is outside 0..K-1.
    """
    if labels.numel() == 0:
        return
    lowest, highest = torch.stack(labels.aminmax()).tolist()  # read at once
    if lowest < 0 or highest >= num_classes:
        found = lowest if lowest < 0 else highest
        raise UserError(
            f"the truth of {name} has the label {found}, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes} (labels "
            f"0..{num_classes - 1}) and IGNORE_VALUE {ignore_label}; correct the key or the mapper"
        )


def _segments(sample: Mapping[str, Any], ignore_label: int, name: str) -> SegmentMap:
    if "segments" in sample:
        segments: SegmentMap = sample["segments"]
        return segments
    if "instances" in sample:
        masks = _masks(sample["instances"], name)
        if "sem_seg" in sample:
            _refuse_stuff(masks, _label_map(sample["sem_seg"], name), ignore_label, name)
        return SegmentMap.from_masks(masks, _classes(sample["instances"], len(masks), name))
    if "sem_seg" in sample:
        return SegmentMap.from_label_map(_label_map(sample["sem_seg"], name), ignore_label)
    raise UserError(
        f"the sample of {name} has none of 'segments', 'instances' and 'sem_seg', so nothing supervises it; "
        "train with MaskFormerMapper, or with a mapper that gives one of them"
    )


def _refuse_stuff(masks: Tensor, label_map: Tensor, ignore_label: int, name: str) -> None:
    """Refuse labels beside instances (M, H, W) that say more than these do.

    They cannot be added to the instances: Detectron2's data sets number things and stuff apart, both from 0.
    """
    if label_map.shape != masks.shape[1:]:
        raise UserError(
            f"the sem_seg of {name} is {label_map.shape[0]}x{label_map.shape[1]} but its instances "
            f"{masks.shape[1]}x{masks.shape[2]} (height x width); let the mapper transform both alike"
        )
    if bool(((label_map != ignore_label) & ~masks.any(0)).any()):
        raise UserError(
            f"the sample of {name} has instances and a sem_seg that labels pixels of none of them, and the classes of "
            "the two may be numbered apart; train with MaskFormerMapper on a panoptic data set with one list of "
            "classes, or let the mapper give one of the two"
        )


def _name(sample: Mapping[str, Any]) -> str:
    return str(sample.get("file_name", "an image without file_name"))


def _masks(instances: Instances, name: str) -> Tensor:
    """(M, H, W) bool on the CPU, where planes are laid."""
    height, width = (int(side) for side in instances.image_size)
    if not instances.has("gt_masks"):
        if (
            not instances.get_fields() or len(instances) == 0
        ):  # Detectron2's mapper leaves the field out of an image without annotations
            return torch.zeros((0, height, width), dtype=torch.bool)
        raise UserError(
            f"the instances of {name} have no gt_masks, and boxes alone cannot supervise masks; set MODEL.MASK_ON True"
        )
    found = instances.gt_masks
    if isinstance(found, PolygonMasks):
        found = BitMasks.from_polygon_masks(found, height, width)
    masks = found.tensor if isinstance(found, BitMasks) else found
    if not isinstance(masks, Tensor) or masks.dim() != 3:
        raise UserError(
            f"the gt_masks of {name} are {type(found).__name__}, but can only be BitMasks, PolygonMasks or a tensor "
            "(M, H, W); set INPUT.MASK_FORMAT to bitmask or polygon"
        )
    if tuple(masks.shape[1:]) != (height, width):
        raise UserError(
            f"the gt_masks of {name} are {masks.shape[1]}x{masks.shape[2]} but its instances {height}x{width} "
            "(height x width); correct the mapper"
        )
    return masks.to("cpu", torch.bool)


def _classes(instances: Instances, count: int, name: str) -> Tensor:
    """(M,) int64."""
    if not instances.has("gt_classes"):
        if count == 0:
            return torch.zeros(0, dtype=torch.int64)
        raise UserError(f"the instances of {name} have no gt_classes; correct the mapper")
    return torch.as_tensor(instances.gt_classes).to("cpu", torch.int64)


def _label_map(found: Any, name: str) -> Tensor:
    """(H, W) on the CPU."""
    label_map = torch.as_tensor(found)
    if label_map.dim() != 2 or label_map.is_floating_point():
        raise UserError(
            f"the sem_seg of {name} is {tuple(label_map.shape)} {label_map.dtype}, but must be integer labels (H, W); "
            "correct the mapper"
        )
    return label_map.cpu()

"""What supervises a sample, whoever made the sample: our recipes, Detectron2's mappers or a third party's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from maskformer.errors import UserError
from maskformer.structures import SegmentMap


def segment_map(sample: Mapping[str, Any], ignore_label: int, keep_empty: bool = False) -> SegmentMap:
    """The segments of a sample at the size of its truth; the meta-architecture pads them to its batch.

    Args:
        sample: with ``segments`` (`SegmentMap`, taken as it is); else ``instances`` (Detectron2's, with ``gt_classes``
            and ``gt_masks`` as `BitMasks`, `PolygonMasks` or an (M, H, W) tensor, which may overlap); else ``sem_seg``
            (H, W), integer labels.
        ignore_label: value of unsupervised pixels in ``sem_seg``.
        keep_empty: keep instances that have no pixel as empty masks.

    Raises:
        UserError: if the sample has none of these, or what it has cannot be used.
    """
    if "segments" in sample:
        segments: SegmentMap = sample["segments"]
        return segments
    if "instances" in sample:
        masks = _masks(sample["instances"], _name(sample))
        segments = SegmentMap.from_masks(masks, _classes(sample["instances"], len(masks), _name(sample)))
        return segments if keep_empty else segments.drop_empty()
    if "sem_seg" in sample:
        return SegmentMap.from_label_map(_label_map(sample["sem_seg"], _name(sample)), ignore_label)
    raise UserError(
        f"the sample of {_name(sample)} has none of 'segments', 'instances' and 'sem_seg', so nothing supervises it; "
        "train with MaskFormerMapper, or with a mapper that gives one of them"
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

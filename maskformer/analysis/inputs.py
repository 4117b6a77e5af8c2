"""What is measured when there is no data: sizes that a config implies, random images, generated segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from yacs.config import CfgNode

from maskformer.data.transforms import Size, shortest_edge_size
from maskformer.structures import SegmentMap

COMMON_PHOTOGRAPH: Size = (480, 640)
"""Height and width of most images of COCO; stands for a data set whose images have many sizes."""


def counting_size(cfg: CfgNode) -> Size:
    """(H, W) that multiply-adds are counted at.

    As in the paper, semantic recipes at the square of their crop's height. Panoptic and instance recipes, which the
    paper averages over photographs, and those without a crop in pixels: a photograph of `COMMON_PHOTOGRAPH` resized for
    testing.
    """
    crop, test = cfg.INPUT.CROP, cfg.MODEL.MASK_FORMER.TEST
    if crop.ENABLED and crop.TYPE == "absolute" and not (test.PANOPTIC_ON or test.INSTANCE_ON):
        return int(crop.SIZE[0]), int(crop.SIZE[0])
    return shortest_edge_size(*COMMON_PHOTOGRAPH, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def training_size(cfg: CfgNode) -> Size:
    """(H, W) of a training step: the crop where images end as crops, else a photograph at the largest training size."""
    crop = cfg.INPUT.CROP
    if crop.ENABLED and crop.TYPE == "absolute" and cfg.INPUT.DATASET_MAPPER_NAME != "detr_panoptic":
        return int(crop.SIZE[0]), int(crop.SIZE[1])
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    largest = max(sizes) if isinstance(sizes, Sequence) else int(sizes)
    return shortest_edge_size(*COMMON_PHOTOGRAPH, largest, cfg.INPUT.MAX_SIZE_TRAIN)


def random_samples(
    size: Size, count: int, *, classes: int, segments: int = 0, device: torch.device | str = "cpu", seed: int = 0
) -> list[dict[str, Any]]:
    """Samples as a recipe makes them, with noise for an image and upright stripes for segments.

    Args:
        size: (H, W) of every image.
        count: number of samples.
        classes: K, from which the segments take their labels in turn.
        segments: per image; 0 leaves supervision out.
        device: where the images are; on the meta device they have no values.
        seed: of the noise.
    """
    height, width = size
    generator = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)
    samples = []
    for number in range(count):
        image = torch.empty((3, height, width), dtype=torch.uint8, device=device)
        image.random_(0, 256, generator=generator)
        sample: dict[str, Any] = {"image": image, "height": height, "width": width, "file_name": f"random {number}"}
        if segments:
            stripes = (torch.arange(width) * segments // width).to(torch.int16).expand(1, height, width)
            labels = (torch.arange(segments) + number) % classes
            sample["segments"] = SegmentMap(stripes.contiguous(), labels)
        samples.append(sample)
    return samples

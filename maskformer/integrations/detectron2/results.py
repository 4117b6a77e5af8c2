"""Results in the types that Detectron2's evaluators and visualisers take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.structures import BitMasks, Instances


def to_detectron2(result: Mapping[str, Any]) -> dict[str, Any]:
    """The results of one image; ``sem_seg`` and ``panoptic_seg`` have the same form on both sides.

    Args:
        result: of our meta-architectures, ``instances`` as masks (N, H, W) bool, labels (N,) and scores (N,).

    Returns:
        The same, ``instances`` as `Instances` with ``pred_masks``, ``pred_classes``, ``scores`` and ``pred_boxes``.
    """
    results = dict(result)
    if "instances" in results:
        found = results["instances"]
        masks = found["masks"]
        instances = Instances((masks.shape[1], masks.shape[2]))
        instances.pred_masks = masks
        instances.pred_boxes = BitMasks(masks).get_bounding_boxes().to(masks.device)
        instances.scores = found["scores"]
        instances.pred_classes = found["labels"]
        results["instances"] = instances
    return results

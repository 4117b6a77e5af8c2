"""From the predictions of one image to results: semantic scores, panoptic segments, instances (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

PanopticResult = tuple[Tensor, list[dict[str, Any]]]


def resize_bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) maps resampled bilinearly (align_corners off) to (C, *size)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def crop_and_resize(maps: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """(C, H, W) maps of a padded image: the padding cut off, then resampled to (C, *output_size)."""
    return resize_bilinear(maps[:, : image_size[0], : image_size[1]], output_size)


def semantic_scores(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Σ_q softmax(class)[q, k] · sigmoid(mask)[q] for every class but *no object*.

    Args:
        class_logits: (Q, K+1).
        mask_logits: (Q, H, W).

    Returns:
        (K, H, W) scores ≥ 0.
    """
    probability = class_logits.float().softmax(-1)[:, :-1]
    return torch.einsum("qk,qhw->khw", probability, mask_logits.float().sigmoid())


def panoptic_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    things: Sequence[bool],
    *,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> PanopticResult:
    """Non-overlapping segments of one image.

    Queries whose most likely class is not *no object* and more probable than `object_mask_threshold` compete for each
    pixel by class probability × mask probability; a query that keeps less than `overlap_threshold` of its own mask is
    dropped; stuff of one class becomes one segment.

    Args:
        class_logits: (Q, K+1).
        mask_logits: (Q, H, W).
        things: for each of the K classes, whether it is countable.
        object_mask_threshold: in [0, 1], exceeded strictly.
        overlap_threshold: in [0, 1]; an equal ratio is kept.

    Returns:
        ids (H, W) int32, 0 where no segment is, and one dict per segment: ``id`` (from 1), contiguous ``category_id``,
        ``isthing``, ``score`` (class probability), ``area`` in pixels.
    """
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > object_mask_threshold)
    scores, labels = scores[kept], labels[kept]
    masks = mask_logits[kept].float().sigmoid()
    ids = torch.zeros(mask_logits.shape[-2:], dtype=torch.int32, device=mask_logits.device)
    segments: list[dict[str, Any]] = []
    if len(scores) == 0:
        return ids, segments
    owner = (scores[:, None, None] * masks).argmax(0)
    assigned = torch.bincount(owner.flatten(), minlength=len(scores)).tolist()
    own = (masks >= 0.5).flatten(1).sum(1).tolist()
    stuff_ids: dict[int, int] = {}
    table = torch.zeros(len(scores), dtype=torch.int32)
    for q, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
        if assigned[q] == 0 or own[q] == 0 or assigned[q] / own[q] < overlap_threshold:
            continue
        if label in stuff_ids:
            table[q] = stuff_ids[label]
            segments[stuff_ids[label] - 1]["area"] += assigned[q]
            continue
        table[q] = len(segments) + 1
        isthing = bool(things[label])
        if not isthing:
            stuff_ids[label] = len(segments) + 1
        segments.append(
            {"id": len(segments) + 1, "category_id": label, "isthing": isthing, "score": score, "area": assigned[q]}
        )
    return table.to(ids.device)[owner], segments


def instances(class_logits: Tensor, mask_logits: Tensor, things: Sequence[bool]) -> dict[str, Tensor]:
    """Scored, possibly overlapping masks of countable objects: one per query whose mask is not empty.

    A query's class is its most likely countable one; its score is that class's probability times the mean mask
    probability inside the mask (mask probability ≥ ½).

    Args:
        class_logits: (Q, K+1).
        mask_logits: (Q, H, W).
        things: for each of the K classes, whether it is countable.

    Returns:
        ``masks`` (N, H, W) bool, ``labels`` (N,) int64, ``scores`` (N,) in [0, 1], best first.
    """
    probability = class_logits.float().softmax(-1)[:, :-1]
    countable = torch.as_tensor(things, dtype=torch.bool, device=probability.device)
    scores, labels = probability.masked_fill(~countable, -1.0).max(-1)
    mask_probability = mask_logits.float().sigmoid()
    masks = mask_probability >= 0.5
    area = masks.flatten(1).sum(1)
    inside = (mask_probability * masks).flatten(1).sum(1) / area.clamp(min=1)
    scores = scores * inside
    order = torch.nonzero((area > 0) & (scores >= 0)).flatten()
    order = order[scores[order].argsort(descending=True, stable=True)]
    return {"masks": masks[order], "labels": labels[order], "scores": scores[order]}


def connected_components(labels: Tensor, things: Sequence[bool]) -> PanopticResult:
    """What a per-pixel model can say about objects: each 4-connected region of a countable class is one of them.

    Args:
        labels: (H, W) int64 contiguous classes.
        things: for each class, whether it is countable.

    Returns:
        As `panoptic_segments`, with ``score`` 1.
    """
    array = labels.cpu().numpy()
    ids = np.zeros(array.shape, dtype=np.int32)
    segments: list[dict[str, Any]] = []
    for label in np.unique(array):
        mask = array == label
        regions = ndimage.label(mask)[0] if things[label] else mask.astype(np.int32)
        ids[mask] = regions[mask] + len(segments)
        category = {"category_id": int(label), "isthing": bool(things[label]), "score": 1.0}
        for area in np.bincount(regions[mask])[1:].tolist():
            segments.append({"id": len(segments) + 1, **category, "area": area})
    return torch.from_numpy(ids).to(labels.device), segments

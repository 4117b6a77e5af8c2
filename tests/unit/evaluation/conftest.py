"""A little data set: four scenes with truth of every kind, and predictions made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from maskformer.data.dataset import Metadata, distinct_colors
from maskformer.evaluation.predictions import encode_masks

CLASSES = ["sky", "grass", "cat", "dog"]
THINGS = [False, False, True, True]
IGNORE = 255


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(
        name="little",
        classes=CLASSES,
        things=THINGS,
        colors=distinct_colors(4),
        ignore_label=IGNORE,
        evaluators=("sem_seg", "panoptic_seg"),
        dataset_ids=[11, 12, 17, 18],
        truth=("sem_seg", "pan_seg"),
    )


def make_sample(number: int) -> dict[str, Any]:
    """48 × 64: sky over grass, a cat, two dogs (one hides part of the other), a corner of void."""
    rng = np.random.default_rng(number)
    ids = np.full((48, 64), 2, dtype=np.int32)
    ids[: 20 + int(rng.integers(8))] = 1
    for segment_id, (top, left) in zip((3, 4, 5), rng.integers(4, 24, (3, 2)), strict=True):
        ids[top : top + 16, left + 4 * segment_id : left + 4 * segment_id + 14] = segment_id
    ids[:6, :6] = 0
    categories = {1: 0, 2: 1, 3: 2, 4: 3, 5: 3}
    segments = [
        {"id": i, "category_id": c, "isthing": THINGS[c], "iscrowd": 0, "area": int((ids == i).sum())}
        for i, c in categories.items()
        if (ids == i).any()
    ]
    table = np.array([IGNORE, 0, 1, 2, 3, 3], dtype=np.int32)
    return {
        "image": torch.from_numpy(rng.integers(0, 255, (3, 48, 64), dtype=np.uint8)),
        "height": 48,
        "width": 64,
        "file_name": f"images/scene_{number}.jpg",
        "image_id": number,
        "pan_seg": (torch.from_numpy(ids), segments),
        "sem_seg": torch.from_numpy(table[ids]),
        "annotations": [
            {
                "category_id": s["category_id"],
                "iscrowd": 0,
                "area": s["area"],
                "segmentation": encode_masks((ids == s["id"])[None])[0],
            }
            for s in segments
            if s["isthing"]
        ],
    }


def true_result(sample: dict[str, Any]) -> dict[str, Any]:
    """The truth as if a model had said it (void filled with class 0)."""
    ids, segments = sample["pan_seg"]
    labels = sample["sem_seg"].long()
    things = [s for s in segments if s["isthing"]]
    masks = torch.stack([ids == s["id"] for s in things])
    kept = [{k: s[k] for k in ("id", "category_id", "isthing", "area")} | {"score": 0.9} for s in segments]
    return {
        "sem_seg_labels": torch.where(labels == IGNORE, 0, labels),
        "panoptic_seg": (ids.clone(), kept),
        "instances": {
            "masks": masks,
            "labels": torch.tensor([s["category_id"] for s in things]),
            "scores": torch.linspace(0.9, 0.5, len(things)),
        },
    }


def spoiled_result(sample: dict[str, Any]) -> dict[str, Any]:
    """The truth moved by some pixels."""
    moved = dict(sample)
    ids, segments = sample["pan_seg"]
    shifted = torch.roll(ids, (1, 2), (0, 1))
    moved["pan_seg"] = (shifted, [s for s in segments if (shifted == s["id"]).any()])
    moved["sem_seg"] = torch.roll(sample["sem_seg"], (1, 2), (0, 1))
    return true_result(moved)


@pytest.fixture
def samples() -> list[dict[str, Any]]:
    return [make_sample(i) for i in range(4)]


@pytest.fixture
def truth() -> Callable[[dict[str, Any]], dict[str, Any]]:
    return true_result


@pytest.fixture
def spoiled() -> Callable[[dict[str, Any]], dict[str, Any]]:
    return spoiled_result

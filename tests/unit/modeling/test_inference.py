"""Inference against measured values and hand-made cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from maskformer.modeling import inference

PARITY = Path(__file__).parents[2] / "data" / "parity"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(PARITY / "inference.npz"))


def test_golden_semantic_scores(golden: dict[str, np.ndarray]) -> None:
    scores = inference.semantic_scores(
        torch.from_numpy(golden["class_logits"]), torch.from_numpy(golden["mask_logits"])
    )
    assert np.abs(scores.numpy() - golden["semantic"]).max() / np.abs(golden["semantic"]).max() <= 1e-5


def test_golden_panoptic_segments(golden: dict[str, np.ndarray]) -> None:
    things = [k in golden["things"] for k in range(10)]
    ids, segments = inference.panoptic_segments(
        torch.from_numpy(golden["class_logits"]),
        torch.from_numpy(golden["mask_logits"]),
        things,
        object_mask_threshold=float(golden["object_mask_threshold"]),
        overlap_threshold=float(golden["overlap_threshold"]),
    )
    assert np.array_equal(ids.numpy(), golden["panoptic"])
    assert [s["id"] for s in segments] == golden["segment_id"].tolist()
    assert [s["category_id"] for s in segments] == golden["segment_category"].tolist()
    assert [s["isthing"] for s in segments] == golden["segment_isthing"].tolist()
    assert [s["area"] for s in segments] == [int((golden["panoptic"] == s["id"]).sum()) for s in segments]


def class_logits(*labels: int, classes: int = 3, confidence: float = 8.0) -> torch.Tensor:
    out = torch.zeros(len(labels), classes + 1)
    out[torch.arange(len(labels)), torch.tensor(labels)] = confidence
    return out


def mask_logits(*rows: str) -> torch.Tensor:
    return torch.tensor([[[8.0 if c == "#" else -8.0 for c in row]] for row in rows])


THRESHOLDS = {"object_mask_threshold": 0.5, "overlap_threshold": 0.5}


def test_stuff_of_one_class_merges_and_things_do_not() -> None:
    masks = mask_logits("##......", "..##....", "....##..", "......##")
    ids, segments = inference.panoptic_segments(class_logits(1, 1, 0, 0), masks, [True, False, False], **THRESHOLDS)
    assert ids[0].tolist() == [1, 1, 1, 1, 2, 2, 3, 3]
    assert [(s["category_id"], s["isthing"], s["area"]) for s in segments] == [
        (1, False, 4),
        (0, True, 2),
        (0, True, 2),
    ]


def test_no_object_and_hidden_queries_leave_no_segment() -> None:
    masks = mask_logits("####....", "####....", "....####")
    masks[1] -= 1.0  # hidden by the first query
    ids, segments = inference.panoptic_segments(class_logits(0, 0, 3), masks, [True] * 3, **THRESHOLDS)
    # Every pixel goes to some kept query, also where its mask probability is low.
    assert len(segments) == 1
    assert set(ids[0, :4].tolist()) == {1}


def test_overlap_ratio_equal_to_the_threshold_is_kept() -> None:
    masks = mask_logits("####", "##..")
    masks[1] += 1.0  # wins two of the four pixels of the first query: ratio ½
    kept = inference.panoptic_segments(class_logits(0, 0), masks, [True] * 3, **THRESHOLDS)[1]
    assert [s["area"] for s in kept] == [2, 2]
    thresholds = THRESHOLDS | {"overlap_threshold": 0.51}
    assert len(inference.panoptic_segments(class_logits(0, 0), masks, [True] * 3, **thresholds)[1]) == 1


def test_nothing_kept_gives_an_empty_map() -> None:
    ids, segments = inference.panoptic_segments(class_logits(3, 3), mask_logits("##", "##"), [True] * 3, **THRESHOLDS)
    assert ids.tolist() == [[0, 0]]
    assert segments == []


def test_instances_score_class_probability_times_mask_quality() -> None:
    masks = mask_logits("##..", "..##", "....")
    masks[1] = masks[1].clamp(max=0.0)  # mask probability exactly ½ inside
    found = inference.instances(class_logits(0, 2, 0), masks, [True, False, True])
    assert found["labels"].tolist() == [0, 2]
    probability = class_logits(0).softmax(-1)[0, 0].item()
    mask_probability = torch.tensor(8.0).sigmoid().item()
    assert found["scores"].tolist() == pytest.approx([probability * mask_probability, probability * 0.5], rel=1e-5)
    assert found["masks"][0].tolist() == [[True, True, False, False]]


def test_instances_are_countable_classes_only() -> None:
    found = inference.instances(class_logits(1), mask_logits("##"), [False, False, True])
    assert found["labels"].tolist() == [2]
    assert len(inference.instances(class_logits(1), mask_logits("##"), [False] * 3)["labels"]) == 0


def test_connected_components_split_things_only() -> None:
    labels = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 0], [2, 1, 2, 2]])
    ids, segments = inference.connected_components(labels, [True, False, False])
    assert sorted((s["category_id"], s["area"]) for s in segments) == [(0, 2), (0, 2), (1, 5), (2, 3)]
    assert len(torch.unique(ids)) == 4


def test_crop_and_resize_cuts_the_padding_first() -> None:
    maps = torch.zeros(1, 4, 6)
    maps[:, :, 4:] = 100.0
    assert inference.crop_and_resize(maps, (4, 4), (8, 8)).max() == 0

"""Criterion and matcher against measured values, hand-computed cases and their own contracts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maskformer.errors import UserError
from maskformer.modeling.criterion import LossNormalizers, MaskCriterion, PixelCriterion
from maskformer.modeling.losses import pairwise_dice_cost, pairwise_focal_cost
from maskformer.modeling.matcher import FixedMatcher, HungarianMatcher
from maskformer.modeling.reference_losses import dice_loss, sigmoid_focal_loss, upsampled_mask_losses
from maskformer.structures import MaskPredictions, PixelPredictions, SegmentMap

PARITY = Path(__file__).parents[2] / "data" / "parity"


def relative_error(value: Tensor, golden: np.ndarray) -> float:
    truth = torch.from_numpy(np.asarray(golden)).double()
    return float((value.double() - truth).abs().max() / truth.abs().max())


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(PARITY / "criterion.npz"))


def make_criterion(num_classes: int = 10, num_queries: int = 20, **changes: object) -> MaskCriterion:
    arguments: dict = {"matcher": HungarianMatcher(), "no_object_weight": 0.1} | changes
    return MaskCriterion(num_classes=num_classes, num_queries=num_queries, **arguments)


def golden_inputs(golden: dict[str, np.ndarray]) -> tuple[MaskPredictions, list[SegmentMap]]:
    predictions = MaskPredictions(
        torch.from_numpy(golden["pred_logits"]).requires_grad_(),
        torch.from_numpy(golden["pred_masks"]).requires_grad_(),
    )
    return predictions, [SegmentMap.from_label_map(torch.from_numpy(m), 255) for m in golden["label_maps"]]


def test_golden_values_matches_and_gradients(golden: dict[str, np.ndarray]) -> None:
    predictions, segments = golden_inputs(golden)
    criterion = make_criterion()
    losses = criterion(predictions, segments)
    total = sum(losses.values())
    assert isinstance(total, Tensor)
    total.backward()
    for name, weight in (("loss_ce", 1.0), ("loss_mask", 20.0), ("loss_dice", 1.0)):
        values = torch.stack([losses[f"{name}_0"], losses[f"{name}_1"], losses[name]]) / weight
        assert relative_error(values.detach(), golden[name]) <= 1e-5
    assert relative_error(total.detach(), golden["total"]) <= 1e-5
    assert relative_error(predictions.class_logits.grad, golden["grad_pred_logits"]) <= 1e-4
    assert relative_error(predictions.mask_logits.grad, golden["grad_pred_masks"]) <= 1e-4
    matches = criterion.matcher(predictions, segments)
    for layer, image in itertools.product(range(3), range(2)):
        queries, targets = matches[layer][image]
        assert queries.tolist() == golden[f"match_query_{layer}_{image}"].tolist()
        assert targets.tolist() == golden[f"match_target_{layer}_{image}"].tolist()


def test_golden_with_one_image_without_segments(golden: dict[str, np.ndarray]) -> None:
    expected = np.load(PARITY / "criterion_one_image_without_segments.npz")
    predictions, segments = golden_inputs(golden)
    empty = SegmentMap(torch.full_like(segments[1].ids, -1), torch.zeros(0, dtype=torch.int64))
    last = MaskPredictions(predictions.class_logits[-1:], predictions.mask_logits[-1:])
    # Matching with the recipes' mask weight, 20; the losses themselves are unweighted.
    criterion = make_criterion(mask_weight=1.0, matcher=HungarianMatcher(mask_weight=20.0))
    losses = criterion(last, [segments[0], empty])
    for name in ("loss_ce", "loss_mask", "loss_dice"):
        assert relative_error(losses[name].detach(), expected[name]) <= 1e-5


def test_focal_and_dice_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0]])
    targets = torch.tensor([[1.0, 0.0]])
    p = 1 / (1 + np.exp(-2.0))
    focal = (0.25 * 0.5**2 * np.log(2) + 0.75 * p**2 * -np.log(1 - p)) / 2
    assert sigmoid_focal_loss(logits, targets).item() == pytest.approx(focal, rel=1e-6)
    assert dice_loss(logits, targets).item() == pytest.approx(1 - (2 * 0.5 + 1) / (0.5 + p + 1 + 1), rel=1e-6)


def test_pairwise_costs_are_the_losses_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 30, generator=generator, dtype=torch.float64) * 4
    targets = (torch.rand(3, 30, generator=generator) > 0.5).double()
    for q, s in itertools.product(range(4), range(3)):
        pair = logits[q : q + 1], targets[s : s + 1]
        assert pairwise_focal_cost(logits, targets)[q, s] == pytest.approx(sigmoid_focal_loss(*pair).item())
        assert pairwise_dice_cost(logits, targets)[q, s] == pytest.approx(dice_loss(*pair).item())


def random_case(segment_counts: list[int], queries: int, seed: int = 0) -> tuple[MaskPredictions, list[SegmentMap]]:
    generator = torch.Generator().manual_seed(seed)
    batch = len(segment_counts)
    predictions = MaskPredictions(
        torch.randn(2, batch, queries, 6, generator=generator),
        torch.randn(2, batch, queries, 8, 8, generator=generator),
    )
    segments = []
    for count in segment_counts:
        ids = torch.randint(-1, max(count, 1), (1, 32, 32), generator=generator).to(torch.int16)
        labels = torch.randint(0, 5, (count,), generator=generator)
        segments.append(SegmentMap(ids if count else torch.full_like(ids, -1), labels))
    return predictions, segments


def test_matching_is_optimal_over_all_permutations() -> None:
    predictions, segments = random_case([4], queries=4)
    matcher = HungarianMatcher()
    cost = matcher.costs(predictions.class_logits[:, 0], predictions.mask_logits[:, 0], segments[0])[0]
    best = min(sum(cost[q, s].item() for s, q in enumerate(order)) for order in itertools.permutations(range(4)))
    queries, matched = matcher(predictions, segments)[0][0]
    assert cost[queries, matched].sum().item() == pytest.approx(best, rel=1e-5)


def test_more_segments_than_queries_matches_all_queries() -> None:
    predictions, segments = random_case([7], queries=3)
    queries, matched = HungarianMatcher()(predictions, segments)[0][0]
    assert queries.tolist() == [0, 1, 2]
    assert len(set(matched.tolist())) == 3
    losses = make_criterion(5, 3)(predictions, segments)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_every_prediction_takes_part_without_any_segment() -> None:
    predictions, segments = random_case([0, 0], queries=5)
    predictions = MaskPredictions(*(p.requires_grad_() for p in predictions))
    losses = make_criterion(5, 5)(predictions, segments)
    assert losses["loss_mask"].item() == 0
    assert losses["loss_dice_0"].item() == 0
    for loss in losses.values():
        assert loss.requires_grad
    torch.stack(list(losses.values())).sum().backward()
    assert predictions.mask_logits.grad is not None
    assert predictions.mask_logits.grad.abs().max() == 0


def test_normalizers_make_the_split_of_a_batch_irrelevant() -> None:
    predictions, segments = random_case([3, 0, 9, 2], queries=5)
    criterion = make_criterion(5, 5)
    whole = criterion(predictions, segments)
    normalizers = LossNormalizers()
    for image in segments:
        normalizers = normalizers.plus(criterion.loss_normalizers([image]))
    parts = [
        criterion(MaskPredictions(*(p[:, b : b + 1] for p in predictions)), segments[b : b + 1], normalizers)
        for b in range(4)
    ]
    for name, value in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-5)


def test_rank_normalizer_divides_classes_by_its_own_weights() -> None:
    predictions, segments = random_case([3], queries=5)
    huge = LossNormalizers(segments=3.0, class_weight=1e6, calls=1.0)
    rank = make_criterion(5, 5, normalizer="rank")
    assert rank(predictions, segments, huge)["loss_ce"] == rank(predictions, segments)["loss_ce"]
    assert make_criterion(5, 5)(predictions, segments, huge)["loss_ce"] < rank(predictions, segments)["loss_ce"] / 1e3


def test_rank_normalizer_is_the_mean_over_the_calls_of_a_step() -> None:
    """Published: DistributedDataParallel averages the processes' losses, masks over at least one segment a process."""
    predictions, segments = random_case([0, 1], queries=5)
    rank = make_criterion(5, 5, normalizer="rank")
    calls = [(MaskPredictions(*(p[:, b : b + 1] for p in predictions)), segments[b : b + 1]) for b in range(2)]
    whole = rank.loss_normalizers(segments[:1]).plus(rank.loss_normalizers(segments[1:]))
    shares = [rank(*call, whole) for call in calls]
    alone = [rank(*call) for call in calls]
    total = {name: sum(share[name].item() for share in shares) for name in shares[0]}
    mean_of_class = sum(losses["loss_ce"].item() for losses in alone) / 2
    assert total["loss_ce"] == pytest.approx(mean_of_class, rel=1e-6)
    # One segment on two processes: each divides by max(1, 1 / 2), and the mean over both halves the sum.
    assert total["loss_mask"] == pytest.approx(alone[1]["loss_mask"].item() / 2, rel=1e-6)
    pixels = PixelPredictions(torch.randn(1, 2, 3, 2, 2))
    truth = torch.randint(0, 3, (2, 8, 8))
    truth[0, :6] = 255
    maps = [SegmentMap.from_label_map(labels, 255) for labels in truth]
    criterion = PixelCriterion(normalizer="rank")
    whole = criterion.loss_normalizers(maps[:1]).plus(criterion.loss_normalizers(maps[1:]))
    parts = [(PixelPredictions(pixels.logits[:, b : b + 1]), maps[b : b + 1]) for b in range(2)]
    shared = sum(criterion(*part, whole)["loss_sem_seg"].item() for part in parts)
    assert shared == pytest.approx(sum(criterion(*part)["loss_sem_seg"].item() for part in parts) / 2, rel=1e-6)
    together = sum(PixelCriterion()(*part, whole)["loss_sem_seg"].item() for part in parts)
    assert together == pytest.approx(PixelCriterion()(pixels, maps)["loss_sem_seg"].item(), rel=1e-6)


def test_costs_that_are_not_finite_still_match_and_show_in_the_loss() -> None:
    predictions, segments = random_case([3], queries=5)
    predictions.mask_logits[0, 0, 2] = float("nan")
    predictions.mask_logits[1, 0, 1] = float("inf")
    matches = HungarianMatcher()(predictions, segments)
    assert all(len(layer[0][0]) == 3 for layer in matches)
    assert 2 not in matches[0][0][0].tolist()
    predictions.mask_logits[:] = float("nan")
    assert torch.isnan(make_criterion(5, 5)(predictions, segments)["loss_mask"])


def test_fixed_matching_pairs_query_and_class() -> None:
    predictions, _ = random_case([1], queries=5)
    labels = torch.tensor([[4, 4, 1], [1, 255, 0]], dtype=torch.uint8)
    segments = SegmentMap.from_label_map(labels, 255)
    queries, matched = FixedMatcher()(predictions, [segments])[1][0]
    assert queries.tolist() == [0, 1, 4]
    assert segments.labels[matched].tolist() == [0, 1, 4]
    twice = SegmentMap(torch.zeros(1, 2, 2, dtype=torch.int16), torch.tensor([3, 3]))
    with pytest.raises(UserError, match="hungarian"):
        FixedMatcher()(predictions, [twice])


def test_pixel_criterion_is_the_mean_over_supervised_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 3, 2, 2, generator=generator, dtype=torch.float64)
    truth = torch.randint(0, 3, (8, 8), generator=generator)
    truth[:3] = 255
    losses = PixelCriterion(ignore_label=255)(PixelPredictions(logits), [SegmentMap.from_label_map(truth, 255)])
    full = torch.nn.functional.interpolate(logits[1], size=(8, 8), mode="bilinear")
    expected = torch.nn.functional.cross_entropy(full, truth[None], ignore_index=255)
    assert losses["loss_sem_seg"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(losses) == {"loss_sem_seg_0", "loss_sem_seg"}


def test_pixel_criterion_without_supervised_pixels_and_with_odd_sizes() -> None:
    logits = torch.zeros(1, 1, 3, 2, 2, requires_grad=True)
    nothing = SegmentMap(torch.full((1, 8, 8), -1, dtype=torch.int16), torch.zeros(0, dtype=torch.int64))
    loss = PixelCriterion()(PixelPredictions(logits), [nothing])["loss_sem_seg"]
    loss.backward()
    assert loss.item() == 0
    with pytest.raises(UserError, match="divisible by 4"):
        PixelCriterion()(PixelPredictions(logits), [nothing.pad(9, 8)])


def test_overlapping_segments_of_several_planes_and_images() -> None:
    """Each matched pair finds its own segment: the losses equal those of the plain formulas, pair by pair."""
    generator = torch.Generator().manual_seed(3)
    segments = [
        SegmentMap.from_masks(torch.rand(4, 16, 16, generator=generator) > 0.4, torch.tensor([0, 1, 1, 4])),
        SegmentMap.from_label_map(torch.randint(0, 3, (16, 16), generator=generator), 255),
        SegmentMap.from_masks(torch.rand(2, 16, 16, generator=generator) > 0.4, torch.tensor([3, 2])),
    ]
    assert segments[0].ids.shape[0] > 1
    predictions = MaskPredictions(
        torch.randn(2, 3, 6, 6, generator=generator), torch.randn(2, 3, 6, 4, 4, generator=generator)
    )
    criterion = make_criterion(5, 6)
    losses = criterion(predictions, segments)
    matches = criterion.matcher(predictions, segments)
    for layer, suffix in ((0, "_0"), (1, "")):
        focal = dice = class_loss = 0.0
        for b, image in enumerate(segments):
            queries, matched = matches[layer][b]
            pair = upsampled_mask_losses(predictions.mask_logits[layer, b, queries], image.masks()[matched])
            focal, dice = focal + pair[0].sum().item(), dice + pair[1].sum().item()
            target = torch.full((6,), 5)
            target[queries] = image.labels[matched]
            weight = torch.tensor([1.0] * 5 + [0.1])
            class_loss += torch.nn.functional.cross_entropy(
                predictions.class_logits[layer, b], target, weight=weight, reduction="sum"
            ).item()
        assert losses["loss_mask" + suffix].item() == pytest.approx(20 * focal / 9, rel=1e-5)
        assert losses["loss_dice" + suffix].item() == pytest.approx(dice / 9, rel=1e-5)
        assert losses["loss_ce" + suffix].item() == pytest.approx(class_loss / (9 + 0.1 * 9), rel=1e-5)

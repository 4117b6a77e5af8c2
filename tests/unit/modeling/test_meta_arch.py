"""What surrounds the network: normalisation, padding, supervision, results at the right size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskformer.modeling.criterion import MaskCriterion, PixelCriterion
from maskformer.modeling.inference import resize_bilinear, semantic_scores
from maskformer.modeling.matcher import HungarianMatcher
from maskformer.modeling.meta_arch import MaskFormer, SemanticSegmentor
from maskformer.structures import MaskPredictions, PixelPredictions, SegmentMap

MEAN, STD = [10.0, 20.0, 30.0], [2.0, 4.0, 5.0]


class FakeMaskNetwork(nn.Module):
    """Constant class logits, mask logits that depend on the image; keeps what it was given."""

    def __init__(self, queries: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.class_logits = nn.Parameter(torch.randn(queries, classes + 1))
        self.weight = nn.Parameter(torch.randn(queries, 3, 1, 1))
        self.seen = torch.empty(0)

    def forward(self, images: Tensor) -> MaskPredictions:
        """(B, 3, H, W) → L = 1."""
        self.seen = images
        masks = nn.functional.conv2d(nn.functional.avg_pool2d(images, 4, ceil_mode=True), self.weight)
        return MaskPredictions(self.class_logits.expand(1, len(images), -1, -1), masks[None])


class FakePixelNetwork(FakeMaskNetwork):
    """Per-pixel logits, one class per query of the fake above."""

    def forward(self, images: Tensor) -> PixelPredictions:  # type: ignore[override]
        """(B, 3, H, W) → L = 1."""
        return PixelPredictions(super().forward(images).mask_logits)


def mask_former(**options: Any) -> MaskFormer:
    torch.manual_seed(0)
    criterion = MaskCriterion(num_classes=3, num_queries=4, matcher=HungarianMatcher())
    common = {"pixel_mean": MEAN, "pixel_std": STD, "size_divisibility": 32, "things": [True, False, True]}
    return MaskFormer(network=FakeMaskNetwork(), criterion=criterion, **{**common, **options})


def make_sample(rows: int, columns: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, rows, columns), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 3, (rows, columns), generator=generator)
    return {"image": image, "segments": SegmentMap.from_label_map(labels, 255), **more}


@pytest.mark.parametrize(("divisibility", "size"), [(32, (64, 64)), (0, (40, 50)), (1, (40, 50)), (16, (48, 64))])
def test_images_are_normalised_then_padded_with_zeros(divisibility: int, size: tuple[int, int]) -> None:
    model = mask_former(size_divisibility=divisibility)
    samples = [make_sample(33, 50), make_sample(40, 20, seed=1)]
    batch = model.image_batch(samples)
    assert tuple(batch.shape) == (2, 3, *size)
    expected = (samples[0]["image"].float() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(batch[0, :, :33, :50], expected)
    assert (batch[0, :, 33:] == 0).all()
    assert (batch[1, :, :, 20:] == 0).all()


def test_training_gives_named_losses_for_images_of_several_sizes() -> None:
    model = mask_former()
    losses = model([make_sample(33, 50), make_sample(40, 20, seed=1)])
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}
    assert all(loss.dim() == 0 and loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize("before", [False, True])
def test_semantic_results_have_the_output_size_and_the_published_order_of_steps(before: bool) -> None:
    model = mask_former(resize_before_inference=before).eval()
    sample = make_sample(30, 41, height=60, width=80)
    (result,) = model([sample])
    predictions = model.network(model.image_batch([sample]))
    logits = resize_bilinear(predictions.mask_logits[0, 0], (32, 64))
    class_logits = predictions.class_logits[0, 0]
    if before:
        expected = semantic_scores(class_logits, resize_bilinear(logits[:, :30, :41], (60, 80)))
    else:
        expected = resize_bilinear(semantic_scores(class_logits, logits)[:, :30, :41], (60, 80))
    torch.testing.assert_close(result["sem_seg"], expected)
    (labels,) = model.infer([sample], semantic="labels")
    assert torch.equal(labels["sem_seg_labels"], expected.argmax(0))
    assert "sem_seg" not in labels


def test_panoptic_mode_resizes_first_and_instances_do_not_change_semantic_scores() -> None:
    sample = make_sample(30, 41, height=60, width=80)
    plain, first = (mask_former(resize_before_inference=b).eval()([sample])[0]["sem_seg"] for b in (False, True))
    panoptic = mask_former(panoptic_on=True).eval()([sample])[0]
    instance = mask_former(instance_on=True).eval()([sample])[0]
    assert torch.equal(panoptic["sem_seg"], first)
    assert torch.equal(instance["sem_seg"], plain)
    assert not torch.equal(first, plain)
    assert panoptic["panoptic_seg"][0].shape == (60, 80)
    assert instance["instances"]["masks"].shape[1:] == (60, 80)


def test_switched_off_results_are_not_returned() -> None:
    model = mask_former(semantic_on=False, panoptic_on=True).eval()
    assert set(model([make_sample(32, 32)])[0]) == {"panoptic_seg"}


def test_per_pixel_results_at_odd_sizes_and_connected_components() -> None:
    torch.manual_seed(0)
    model = SemanticSegmentor(
        network=FakePixelNetwork(),
        criterion=PixelCriterion(ignore_label=255),
        pixel_mean=MEAN,
        pixel_std=STD,
        size_divisibility=0,
        things=[True, False, True, False],
        panoptic_on=True,
    ).eval()
    sample = make_sample(30, 41, height=15, width=20)  # 30 is no multiple of 4: logits × 4 are larger and cropped
    (result,) = model([sample])
    logits = model.network(model.image_batch([sample])).logits[0]
    full = nn.functional.interpolate(logits, scale_factor=4.0, mode="bilinear")[0]
    expected = resize_bilinear(full[:, :30, :41], (15, 20))
    torch.testing.assert_close(result["sem_seg"], expected)
    ids, segments = result["panoptic_seg"]
    assert sum(segment["area"] for segment in segments) == ids.numel()


def test_an_unknown_kind_of_semantic_result_is_refused() -> None:
    with pytest.raises(ValueError, match="'scores' or 'labels'"):
        mask_former().eval().infer([make_sample(32, 32)], semantic="colours")

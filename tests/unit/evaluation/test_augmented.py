"""Test-time augmentation against a plain loop over sizes and mirrors, and cases counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from maskformer import build_model, get_cfg
from maskformer.errors import UserError
from maskformer.evaluation import AugmentedModel, build_augmented_model, check_augmentation
from maskformer.modeling.criterion import MaskCriterion, PixelCriterion
from maskformer.modeling.matcher import HungarianMatcher
from maskformer.modeling.meta_arch import MaskFormer, SemanticSegmentor
from maskformer.structures import MaskPredictions, PixelPredictions

COMMON: dict[str, Any] = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3, "things": [True, False, True]}


class MaskNetwork(nn.Module):
    """Queries that look left, up and at colours, so that mirror images and sizes give other scores."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.class_logits = nn.Parameter(torch.randn(5, 4, generator=generator))
        self.weight = nn.Parameter(torch.randn(5, 3, 3, 3, generator=generator) * 0.05)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> MaskPredictions:
        self.batches.append(len(images))
        masks = nn.functional.conv2d(nn.functional.avg_pool2d(images, 4, ceil_mode=True), self.weight, padding=1)
        return MaskPredictions(self.class_logits.expand(1, len(images), -1, -1), masks[None])


class PixelNetwork(MaskNetwork):
    def forward(self, images: Tensor) -> PixelPredictions:  # type: ignore[override]
        return PixelPredictions(super().forward(images).mask_logits[:, :, :3])


def mask_former(**options: Any) -> MaskFormer:
    criterion = MaskCriterion(num_classes=3, num_queries=5, matcher=HungarianMatcher())
    return MaskFormer(network=MaskNetwork(), criterion=criterion, size_divisibility=32, **COMMON, **options).eval()


def per_pixel(**options: Any) -> SemanticSegmentor:
    criterion = PixelCriterion(ignore_label=255, stride=4)
    return SemanticSegmentor(
        network=PixelNetwork(), criterion=criterion, size_divisibility=0, **COMMON, **options
    ).eval()


def make_sample(rows: int, columns: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (rows // 6 + 1, columns // 6 + 1, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((columns, rows), Image.Resampling.BICUBIC))
    return {"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), **more}


def plain(model: Any, sample: dict[str, Any], sizes: list[tuple[int, int]], mirror: bool) -> Tensor:
    """Mean scores over (width, height) sizes, each form alone; float64."""
    found = []
    output = {"height": sample.get("height", sample["image"].shape[1])}
    output["width"] = sample.get("width", sample["image"].shape[2])
    for size in sizes:
        picture = Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(picture)
        for turned in [False, True] if mirror else [False]:
            image = torch.from_numpy((pixels[:, ::-1] if turned else pixels).transpose(2, 0, 1).copy())
            scores = model.infer([{"image": image, **output}])[0]["sem_seg"].double()
            found.append(torch.flip(scores, dims=[2]) if turned else scores)
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("make", [mask_former, per_pixel])
@pytest.mark.parametrize("mirror", [True, False])
def test_scores_are_the_mean_over_sizes_and_mirror_images(make: Callable[..., Any], mirror: bool) -> None:
    model = make()
    sample = make_sample(30, 60, height=45, width=90)
    # The longer side of the last, 160, exceeds 120: both are rescaled, 80 · 120/160 = 60.
    augmented = AugmentedModel(model, sizes=[24, 40, 80], longest=120, mirror=mirror)
    expected = plain(model, sample, [(48, 24), (80, 40), (120, 60)], mirror)
    result = augmented.infer([sample])[0]
    assert set(result) == {"sem_seg"}
    torch.testing.assert_close(result["sem_seg"].double(), expected, rtol=1e-5, atol=1e-6)
    labels = augmented.infer([sample], semantic="labels")[0]
    assert set(labels) == {"sem_seg_labels"}
    assert torch.equal(labels["sem_seg_labels"], result["sem_seg"].argmax(0))
    # It is worth something: neither one size nor leaving the mirror out is the same.
    assert not torch.allclose(plain(model, sample, [(60, 30)], mirror), expected, atol=1e-3)
    assert not torch.allclose(plain(model, sample, [(48, 24), (80, 40), (120, 60)], not mirror), expected, atol=1e-4)


def test_a_batch_gives_what_its_images_give_alone() -> None:
    model = mask_former()
    samples = [make_sample(32, 48, seed, height=32 + seed, width=50) for seed in range(3)]
    augmented = AugmentedModel(model, sizes=[32, 40], longest=200, mirror=True)
    together = augmented.infer(samples)
    network: Any = model.network
    assert network.batches == [3] * 4
    for sample, result in zip(samples, together, strict=True):
        assert result["sem_seg"].shape == (3, sample["height"], 50)
        torch.testing.assert_close(augmented.infer([sample])[0]["sem_seg"], result["sem_seg"])


def test_a_panoptic_model_gives_semantic_scores_only_and_is_as_it_was_afterwards() -> None:
    model = mask_former(panoptic_on=True, instance_on=True)
    sample = make_sample(32, 48)
    augmented = AugmentedModel(model, sizes=[32], longest=200, mirror=False)
    result = augmented.infer([sample])[0]
    assert set(result) == {"sem_seg"}
    # Its own order of steps: mask logits are resized before they become scores.
    torch.testing.assert_close(result["sem_seg"], model.infer([sample])[0]["sem_seg"])
    assert set(model.infer([sample])[0]) == {"sem_seg", "panoptic_seg", "instances"}


def test_counted_by_hand() -> None:
    """A class that is seen only at the left edge is seen at both with the mirror image, with half of the score."""

    class LeftEdge(nn.Module):
        def forward(self, images: Tensor) -> PixelPredictions:
            logits = torch.zeros(1, len(images), 2, images.shape[2] // 4, images.shape[3] // 4)
            logits[:, :, 1, :, 0] = 8.0
            return PixelPredictions(logits)

    criterion = PixelCriterion(ignore_label=255, stride=1)
    model = SemanticSegmentor(network=LeftEdge(), criterion=criterion, size_divisibility=0, **COMMON).eval()
    sample = {"image": torch.zeros(3, 8, 16, dtype=torch.uint8), "height": 2, "width": 4}
    scores = AugmentedModel(model, sizes=[8], longest=99, mirror=True).infer([sample])[0]["sem_seg"]
    assert scores[1].tolist() == [[4.0, 0.0, 0.0, 4.0]] * 2
    scores = AugmentedModel(model, sizes=[8], longest=99, mirror=False).infer([sample])[0]["sem_seg"]
    assert scores[1].tolist() == [[8.0, 0.0, 0.0, 0.0]] * 2


def test_scores_of_one_form_at_a_time_are_kept() -> None:
    alive: list[int] = []

    class Counting(nn.Module):
        """Notes how many results exist when another one is made."""

        panoptic_on = instance_on = False

        def infer_each(self, samples: Any) -> Any:
            import gc

            for sample in samples:
                gc.collect()
                shape = (7, sample["height"], sample["width"])
                alive.append(sum(torch.is_tensor(o) and o.shape == shape for o in gc.get_objects()))
                yield {"sem_seg": torch.ones(shape)}

    model: Any = Counting()
    samples = [make_sample(16, 16, height=33, width=35)]
    augmented = AugmentedModel(model, sizes=[8, 12, 16, 20], longest=99, mirror=True)
    assert (augmented.infer(samples)[0]["sem_seg"] == 1).all()
    assert len(alive) == 8
    assert max(alive) <= 2  # the sum, and what was added last


def test_the_config_says_sizes_limit_and_mirror() -> None:
    words = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "[32, 48]", "TEST.AUG.MAX_SIZE", "77"]
    cfg = get_cfg(None, [*words, "TEST.AUG.FLIP", "False", "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18"])
    model = build_model(cfg)
    augmented = build_augmented_model(cfg, model)
    assert (augmented.sizes, augmented.longest, augmented.mirror) == ((32, 48), 77, False)
    assert augmented.model is model


def test_a_data_set_without_semantic_truth_is_refused(metadata: Any) -> None:
    from dataclasses import replace

    cfg = get_cfg(None, ["TEST.AUG.ENABLED", "True"])
    check_augmentation(cfg, metadata)
    panoptic = replace(metadata, evaluators=("panoptic_seg",))
    with pytest.raises(UserError, match=r"TEST\.AUG\.ENABLED is True, but .* little measures only panoptic_seg"):
        check_augmentation(cfg, panoptic)
    check_augmentation(get_cfg(None), panoptic)

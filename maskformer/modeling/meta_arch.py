"""What training and evaluation call: a list of samples in, losses or results out.

Everything that surrounds the pure network is here: normalisation and padding, supervision, post-processing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskformer.modeling import inference
from maskformer.modeling.criterion import LossNormalizers, MaskCriterion, PixelCriterion
from maskformer.structures import MaskPredictions, PixelPredictions

Sample = Mapping[str, Any]
Result = dict[str, Any]


class _MetaArchitecture(nn.Module):
    """Normalises and pads images, runs the network, trains or post-processes.

    Args:
        network: (B, 3, H, W) normalised images -> predictions.
        criterion: predictions and segments -> losses.
        pixel_mean: per channel, in the order of the images, 0..255.
        pixel_std: likewise.
        size_divisibility: padded heights and widths are multiples of it; 0 or 1 for no rounding.
        things: for each class, whether it is countable.
        semantic_on, panoptic_on, instance_on: which results evaluation returns.
        channels_last: memory format of the images; changes speed, not numbers.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        criterion: MaskCriterion | PixelCriterion,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        things: Sequence[bool] = (),
        semantic_on: bool = True,
        panoptic_on: bool = False,
        instance_on: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion
        self.size_divisibility = size_divisibility
        self.things = tuple(bool(thing) for thing in things)
        self.semantic_on = semantic_on
        self.panoptic_on = panoptic_on
        self.instance_on = instance_on
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).view(3, 1, 1), False)
        self.to(memory_format=self.memory_format)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.pixel_mean.device

    def image_batch(self, samples: Sequence[Sample]) -> Tensor:
        """Images normalised, then zero-padded right and bottom to the largest, rounded up to `size_divisibility`.

        Args:
            samples: with ``image`` (3, H, W) uint8.

        Returns:
            (B, 3, H', W').
        """
        images = [sample["image"].to(self.device, non_blocking=True) for sample in samples]
        step = max(1, self.size_divisibility)
        height = -(-max(image.shape[1] for image in images) // step) * step
        width = -(-max(image.shape[2] for image in images) // step) * step
        batch = torch.zeros((len(images), 3, height, width), device=self.device)
        batch = batch.contiguous(memory_format=self.memory_format)
        for slot, image in zip(batch, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]] = (image.float() - self.pixel_mean) / self.pixel_std
        return batch

    def loss_normalizers(self, samples: Sequence[Sample]) -> LossNormalizers:
        """What these samples contribute to the divisors of a step's losses (see `LossNormalizers`)."""
        return self.criterion.loss_normalizers([sample["segments"] for sample in samples])

    def forward(
        self, samples: Sequence[Sample], normalizers: LossNormalizers | None = None
    ) -> dict[str, Tensor] | list[Result]:
        """Train or evaluate on a list of B samples, images (3, H, W) uint8 of any sizes.

        Args:
            samples: see the contract of a sample in docs/architecture.md; ``segments`` are needed in training.
            normalizers: of the whole step (training); None means that this call is the whole step.

        Returns:
            In training the weighted scalar losses under their published names, else `infer(samples)`.
        """
        if not self.training:
            return self.infer(samples)
        images = self.image_batch(samples)
        height, width = images.shape[-2:]
        segments = [sample["segments"].to(self.device, non_blocking=True).pad(height, width) for sample in samples]
        return self.criterion(self.network(images), segments, normalizers)

    @torch.no_grad()
    def infer(self, samples: Sequence[Sample], semantic: str = "scores") -> list[Result]:
        """Results of each image at its output size (``height``, ``width`` of the sample, else of the image).

        Args:
            samples: with ``image`` (3, H, W) uint8.
            semantic: "scores" returns ``sem_seg`` (K, H, W), "labels" ``sem_seg_labels`` (H, W) int64 instead.

        Returns:
            Per image a dict with the semantic result, ``panoptic_seg`` and ``instances``, as far as switched on.
        """
        return list(self.infer_each(samples, semantic))

    @torch.no_grad()
    def infer_each(self, samples: Sequence[Sample], semantic: str = "scores") -> Iterator[Result]:
        """As `infer`, but each image's results are made when they are asked for, so that one set need be kept."""
        if semantic not in ("scores", "labels"):
            raise ValueError(f"semantic must be 'scores' or 'labels', not {semantic!r}")
        images = self.image_batch(samples)
        predictions = self.network(images)
        padded_size = (images.shape[2], images.shape[3])
        for b, sample in enumerate(samples):
            image_size = (sample["image"].shape[1], sample["image"].shape[2])
            output_size = (int(sample.get("height", image_size[0])), int(sample.get("width", image_size[1])))
            result = self.image_result(predictions, b, padded_size, image_size, output_size)
            if "sem_seg" in result and semantic == "labels":
                result["sem_seg_labels"] = result.pop("sem_seg").argmax(0)
            yield result

    def image_result(
        self,
        predictions: Any,
        index: int,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> Result:
        """Results of image `index` of a batch, at `output_size`; ``sem_seg`` as scores."""
        raise NotImplementedError("a meta-architecture says how predictions become results")


class MaskFormer(_MetaArchitecture):
    """Mask classification: semantic, panoptic and instance segmentation with one model, loss and training procedure.

    Args:
        object_mask_threshold: class probability above which a query may become a panoptic segment.
        overlap_threshold: share of its mask that a panoptic segment must keep.
        resize_before_inference: crop and resize mask logits before they become semantic scores; always so in panoptic
            mode.
        **common: of every meta-architecture.
    """

    def __init__(
        self,
        *,
        object_mask_threshold: float = 0.0,
        overlap_threshold: float = 0.0,
        resize_before_inference: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.object_mask_threshold = object_mask_threshold
        self.overlap_threshold = overlap_threshold
        self.resize_before_inference = resize_before_inference or self.panoptic_on

    def image_result(
        self,
        predictions: MaskPredictions,
        index: int,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> Result:
        """Results of one image from class logits (L, B, Q, K+1) and mask logits (L, B, Q, h, w)."""
        class_logits = predictions.class_logits[-1, index].float()
        mask_logits = inference.resize_bilinear(predictions.mask_logits[-1, index].float(), padded_size)
        result: Result = {}
        if self.semantic_on and not self.resize_before_inference:
            scores = inference.semantic_scores(class_logits, mask_logits)
            result["sem_seg"] = inference.crop_and_resize(scores, image_size, output_size)
        if self.resize_before_inference or self.instance_on:
            mask_logits = inference.crop_and_resize(mask_logits, image_size, output_size)
        if self.semantic_on and self.resize_before_inference:
            result["sem_seg"] = inference.semantic_scores(class_logits, mask_logits)
        if self.panoptic_on:
            result["panoptic_seg"] = inference.panoptic_segments(
                class_logits,
                mask_logits,
                self.things,
                object_mask_threshold=self.object_mask_threshold,
                overlap_threshold=self.overlap_threshold,
            )
        if self.instance_on:
            result["instances"] = inference.instances(class_logits, mask_logits, self.things)
        return result


class SemanticSegmentor(_MetaArchitecture):
    """Per-pixel classification, the baseline; for its panoptic result each connected region of a thing is one."""

    def image_result(
        self,
        predictions: PixelPredictions,
        index: int,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> Result:
        """Results of one image from logits (L, B, K, h, w): upsampled by exactly the stride, cropped, resized."""
        logits = predictions.logits[-1, index].float()
        assert isinstance(self.criterion, PixelCriterion)
        stride = float(self.criterion.stride)
        full = F.interpolate(logits[None], scale_factor=stride, mode="bilinear", align_corners=False)[0]
        scores = inference.crop_and_resize(full, image_size, output_size)
        result: Result = {}
        if self.semantic_on:
            result["sem_seg"] = scores
        if self.panoptic_on:
            result["panoptic_seg"] = inference.connected_components(scores.argmax(0), self.things)
        return result

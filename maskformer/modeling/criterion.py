"""The training objectives: mask classification (matching, losses of all layers) and per-pixel cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskformer.errors import UserError
from maskformer.modeling.losses import matched_mask_losses
from maskformer.modeling.matcher import Match
from maskformer.structures import MaskPredictions, PixelPredictions, SegmentMap
from maskformer.timing import section

Matcher = Callable[[MaskPredictions, Sequence[SegmentMap]], list[list[Match]]]


class LossNormalizers(NamedTuple):
    """What the losses of a step are divided by, added up over the whole step before its forward pass.

    Attributes:
        segments: number of ground-truth segments, unmatched ones included.
        class_weight: sum of the class weights of all queries.
        pixels: number of supervised pixels (per-pixel models).
        calls: number of forward passes, over all processes and micro-batches.
    """

    segments: float = 0.0
    class_weight: float = 0.0
    pixels: float = 0.0
    calls: float = 0.0

    def plus(self, other: LossNormalizers) -> LossNormalizers:
        """The normalisers of both together."""
        return LossNormalizers(*(a + b for a, b in zip(self, other, strict=True)))


def layer_suffix(layer: int, layers: int) -> str:
    """Published suffix of a layer's losses: none for the last, ``_0 … _{L-2}`` for the earlier ones."""
    return "" if layer == layers - 1 else f"_{layer}"


class MaskCriterion(nn.Module):
    """Class, mask and dice losses of matched queries, for every decoder layer (paper, equation 2 and section 3.3).

    Args:
        num_classes: K; class K is *no object*.
        num_queries: Q.
        matcher: predictions and segments -> matches[layer][image].
        no_object_weight: weight of *no object* in the cross-entropy.
        mask_weight: weight of the focal loss.
        dice_weight: weight of the dice loss.
        normalizer: "global" divides the class loss by the weights of the whole step; "rank", as published, by those of
            this call, and what is returned is this call's share of the mean over all calls of the step.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_queries: int,
        matcher: Matcher,
        no_object_weight: float = 0.1,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        normalizer: str = "global",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.matcher = matcher
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight
        self.normalizer = normalizer
        weight = torch.ones(num_classes + 1)
        weight[-1] = no_object_weight
        self.class_weights: Tensor
        self.register_buffer("class_weights", weight, persistent=False)

    def loss_normalizers(self, segments: Sequence[SegmentMap]) -> LossNormalizers:
        """What these segments contribute; needs no predictions, since matching always pairs min(M, Q) queries."""
        matched = sum(min(len(image), self.num_queries) for image in segments)
        unmatched = len(segments) * self.num_queries - matched
        return LossNormalizers(
            segments=float(sum(len(image) for image in segments)),
            class_weight=matched + self.no_object_weight * unmatched,
            calls=1.0,
        )

    def forward(
        self, predictions: MaskPredictions, segments: Sequence[SegmentMap], normalizers: LossNormalizers | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses under their published names.

        Args:
            predictions: class logits (L, B, Q, K+1) and mask logits (L, B, Q, h, w).
            segments: the segments of each of the B images, on H×W maps of one size.
            normalizers: of the whole step; None means that this call is the whole step.

        Returns:
            ``loss_ce``, ``loss_mask``, ``loss_dice`` of the last layer, with ``_0 … _{L-2}`` of the earlier ones:
            float32 scalars.
        """
        own = self.loss_normalizers(segments)
        whole = own if normalizers is None else normalizers
        if self.normalizer == "global":
            class_normalizer, least_segments = whole.class_weight, 1.0
        else:  # every process divides by at least one segment
            class_normalizer, least_segments = own.class_weight * whole.calls, whole.calls
        mask_normalizer = max(least_segments, whole.segments)
        with section("matching"):
            matches = self.matcher(predictions, segments)
        pairs = _Pairs.collect(matches, segments)
        layers = predictions.class_logits.shape[0]
        losses: dict[str, Tensor] = {}
        with torch.autocast(predictions.class_logits.device.type, enabled=False):
            class_losses = self.class_losses(predictions.class_logits, pairs)
            focal, dice = self.mask_losses(predictions.mask_logits, segments, pairs)
        for layer in range(layers):
            suffix = layer_suffix(layer, layers)
            losses["loss_ce" + suffix] = class_losses[layer] / class_normalizer
            losses["loss_mask" + suffix] = self.mask_weight * focal[layer] / mask_normalizer
            losses["loss_dice" + suffix] = self.dice_weight * dice[layer] / mask_normalizer
        return losses

    def class_losses(self, class_logits: Tensor, pairs: _Pairs) -> Tensor:
        """Weighted cross-entropy of each layer, (L,), summed over all queries, unmatched ones against *no object*.

        Args:
            class_logits: (L, B, Q, K+1).
            pairs: all matched pairs.
        """
        target = torch.full(class_logits.shape[:3], self.num_classes, dtype=torch.int64, device=class_logits.device)
        target[pairs.layer, pairs.image, pairs.query] = pairs.label
        weighted = F.cross_entropy(
            class_logits.float().flatten(0, 2), target.flatten(), weight=self.class_weights, reduction="none"
        )
        return weighted.view(len(target), -1).sum(1)

    def mask_losses(self, mask_logits: Tensor, segments: Sequence[SegmentMap], pairs: _Pairs) -> tuple[Tensor, Tensor]:
        """Focal and dice loss of each layer, (L,) each, summed over matched pairs; all layers and images in one call.

        Args:
            mask_logits: (L, B, Q, h, w).
            segments: the segments of each image.
            pairs: all matched pairs.
        """
        ids = torch.cat([image.ids.to(torch.int32) for image in segments])
        matched = mask_logits[pairs.layer, pairs.image, pairs.query]
        focal, dice = matched_mask_losses(matched, ids, pairs.map, pairs.segment)
        zeros = focal.new_zeros(len(mask_logits))
        return zeros.index_add(0, pairs.layer, focal), zeros.index_add(0, pairs.layer, dice)


class _Pairs(NamedTuple):
    """All N matched pairs of a batch, (N,) int64 each, on the device of the segments.

    Attributes:
        layer, image, query: where the prediction is.
        segment: index of the segment in its image.
        map: which of the id maps of all images and planes, one after another, holds the segment.
        label: contiguous class of the segment.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    segment: Tensor
    map: Tensor
    label: Tensor

    @classmethod
    def collect(cls, matches: Sequence[Sequence[Match]], segments: Sequence[SegmentMap]) -> _Pairs:
        """From ``matches[layer][image]`` on the CPU, with one copy to the device for the whole batch."""
        rows: list[Tensor] = []
        first_map = first_segment = 0
        for b, image in enumerate(segments):
            for layer, of_layer in enumerate(matches):
                queries, matched = of_layer[b]
                where = torch.tensor([[layer], [b], [first_map]]).expand(3, len(queries))
                rows.append(torch.cat([where, queries[None], matched[None], first_segment + matched[None]]))
            first_map += image.ids.shape[0]
            first_segment += len(image)
        index = torch.cat(rows, 1).to(segments[0].ids.device)
        layer_of, image_of, map_of, query, segment, position = index
        planes = torch.cat([image.planes for image in segments])[position]
        labels = torch.cat([image.labels for image in segments])[position]
        return cls(layer_of, image_of, query, segment, map_of + planes, labels)


class PixelCriterion(nn.Module):
    """Cross-entropy of per-pixel classification, logits upsampled by the head's stride (paper, section 3.1).

    Args:
        ignore_label: value of unsupervised pixels in label maps.
        stride: of the logits; images must be divisible by it.
        loss_weight: factor on the loss.
        normalizer: "global" is the mean over the pixels of the whole step; "rank", as published, over those of this
            call, and what is returned is this call's share of the mean over all calls of the step.
    """

    def __init__(
        self, *, ignore_label: int = 255, stride: int = 4, loss_weight: float = 1.0, normalizer: str = "global"
    ) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.ignore_label = ignore_label
        self.stride = stride
        self.loss_weight = loss_weight

    def loss_normalizers(self, segments: Sequence[SegmentMap]) -> LossNormalizers:
        """Number of supervised pixels of a batch."""
        supervised = sum((image.ids >= 0).any(0).sum() for image in segments)
        return LossNormalizers(pixels=float(supervised), calls=1.0)

    def forward(
        self, predictions: PixelPredictions, segments: Sequence[SegmentMap], normalizers: LossNormalizers | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses under their published names.

        Args:
            predictions: logits (L, B, K, h, w).
            segments: the segments of each of the B images, on H×W maps of one size.
            normalizers: of the whole step; None means that this call is the whole step.

        Returns:
            ``loss_sem_seg`` of the last layer, ``loss_sem_seg_0 …`` of the earlier ones: float32 scalars.

        Raises:
            UserError: if H or W is not a multiple of the stride.
        """
        truth = torch.stack([image.label_map(self.ignore_label) for image in segments])
        layers, _, _, height, width = predictions.logits.shape
        if (height * self.stride, width * self.stride) != tuple(truth.shape[-2:]):
            raise UserError(
                f"per-pixel models train on sizes divisible by {self.stride}, not on {truth.shape[-2]}x"
                f"{truth.shape[-1]}; set INPUT.CROP.SIZE and INPUT.SIZE_DIVISIBILITY to multiples of it"
            )
        own = self.loss_normalizers(segments)
        whole = own if normalizers is None else normalizers
        pixels = max(1.0, whole.pixels) if self.normalizer == "global" else max(1.0, own.pixels) * whole.calls
        losses = {}
        with torch.autocast(truth.device.type, enabled=False):
            for layer, logits in enumerate(predictions.logits):
                full = F.interpolate(
                    logits.float(), scale_factor=float(self.stride), mode="bilinear", align_corners=False
                )
                total = self.summed_cross_entropy(full, truth)
                losses["loss_sem_seg" + layer_suffix(layer, layers)] = self.loss_weight * total / pixels
        return losses

    def summed_cross_entropy(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy of (B, K, H, W) logits against (B, H, W) labels, summed over supervised pixels."""
        if truth.is_cuda and torch.are_deterministic_algorithms_enabled():
            # PyTorch's two-dimensional kernel has no deterministic form on CUDA; the one for rows of classes has.
            logits, truth = logits.movedim(1, -1).flatten(0, 2), truth.flatten()
        return F.cross_entropy(logits, truth, ignore_index=self.ignore_label, reduction="sum")

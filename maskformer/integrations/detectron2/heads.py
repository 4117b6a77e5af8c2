"""Our heads in Detectron2's registry: pixel decoder and predictor, with the published names in their state dicts.

Shapes: B batch, L decoder layers, Q queries, K classes, H×W padded image, h×w masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from maskformer.build import build_criterion
from maskformer.errors import UserError
from maskformer.integrations.detectron2.backbones import check_keys, feature_shapes
from maskformer.integrations.detectron2.normalizers import over_all_processes, share_of_mean
from maskformer.integrations.detectron2.pixel_decoders import build_registered, decode
from maskformer.integrations.detectron2.supervision import check_labels
from maskformer.integrations.detectron2.weights import HEAD, PublishedNames, read_first_version
from maskformer.modeling.criterion import PixelCriterion
from maskformer.modeling.heads import MaskClassificationHead, PixelHead, QueryPixelHead
from maskformer.modeling.network import ENCODED, build_head, transformer_input
from maskformer.structures import UNSUPERVISED, MaskPredictions, PixelPredictions, SegmentMap


class _Head(nn.Module):
    """Pixel decoder and predictor.

    Args:
        pixel_decoder: with ``forward_features``.
        predictor: our head.
        transformer_in_feature: the map that the predictor's transformer reads: a name of the backbone's, or
            "transformer_encoder" for the pixel decoder's encoded map.
    """

    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module, transformer_in_feature: str = "res5") -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.transformer_in_feature = transformer_in_feature
        PublishedNames(HEAD).attach(predictor)
        self.register_load_state_dict_pre_hook(read_first_version)

    def predict(self, features: Mapping[str, Tensor]) -> Any:
        """The backbone's maps by name → what the predictor makes of them."""
        decoded = decode(self.pixel_decoder, features)
        if isinstance(self.predictor, PixelHead):
            return self.predictor(decoded.embeddings)
        feature = transformer_input(self.transformer_in_feature, features, decoded)
        return self.predictor(feature, decoded.embeddings)


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(_Head):
    """Mask classification: what the meta-architecture MaskFormer makes losses and results of.

    Args:
        pixel_decoder: with ``forward_features``.
        predictor: a `MaskClassificationHead`.
        transformer_in_feature: as of `_Head`.
    """

    @configurable
    def __init__(
        self, *, pixel_decoder: nn.Module, predictor: MaskClassificationHead, transformer_in_feature: str = "res5"
    ) -> None:
        super().__init__(
            pixel_decoder=pixel_decoder, predictor=predictor, transformer_in_feature=transformer_in_feature
        )

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from a config."""
        return build_parts(cfg, input_shape, cls.__name__)

    def forward(self, features: Mapping[str, Tensor]) -> MaskPredictions:
        """Maps by name, each (B, C_i, h_i, w_i) → class logits (L, B, Q, K+1), mask logits (L, B, Q, h, w)."""
        predictions: MaskPredictions = self.predict(features)
        return predictions


class _PerPixelHead(_Head):
    """A per-pixel head with the interface that Detectron2's `SemanticSegmentor` asks for.

    Args:
        criterion: from predictions and labels to losses.
        **parts: as of `_Head`.

    Attributes:
        ignore_value: label of unsupervised pixels, with which Detectron2 pads labels.
    """

    def __init__(self, *, criterion: PixelCriterion, **parts: Any) -> None:
        super().__init__(**parts)
        self.criterion = criterion
        self.ignore_value = criterion.ignore_label
        self.common_stride = criterion.stride

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from a config."""
        return {**build_parts(cfg, input_shape, cls.__name__), "criterion": build_pixel_criterion(cfg)}

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The backbone's maps by name, in training with (B, H, W) labels.

        Returns:
            In training None and the losses under their published names; else (B, K, H, W) logits and no losses.

        Raises:
            ValueError: in training without labels.
            UserError: if labels are of another size than the images, or outside 0..K-1.
        """
        predictions: PixelPredictions = self.predict(features)
        if not self.training:
            scale = float(self.common_stride)
            logits = predictions.logits[-1].float()
            return F.interpolate(logits, scale_factor=scale, mode="bilinear", align_corners=False), {}
        if targets is None:
            raise ValueError("per-pixel heads train on labels: let the dataset mapper give sem_seg")
        classes = predictions.logits.shape[2]
        self._check(targets, predictions)
        segments = [classes_as_segments(labels, classes, self.ignore_value) for labels in targets]
        own = self.criterion.loss_normalizers(segments)
        return None, share_of_mean(self.criterion(predictions, segments, over_all_processes(own)))

    def _check(self, targets: Tensor, predictions: PixelPredictions) -> None:
        """Refuse labels that cannot be those of the batch, whose files are not known here.

        On CUDA this waits for the device, but the number of supervised pixels, which is read next, does so anyway.
        """
        classes, height, width = predictions.logits.shape[2:]
        size = (height * self.common_stride, width * self.common_stride)
        if any(abs(own - side) >= self.common_stride for own, side in zip(targets.shape[1:], size, strict=True)):
            raise UserError(
                f"the sem_seg of the batch is {targets.shape[1]}x{targets.shape[2]} but its images are "
                f"{size[0]}x{size[1]} (height x width, padded); let the mapper transform both alike"
            )
        supervised = targets.masked_fill(targets == self.ignore_value, 0)
        check_labels(supervised, classes, self.ignore_value, "the batch (sem_seg)")


@SEM_SEG_HEADS_REGISTRY.register()
class PerPixelBaselineHead(_PerPixelHead):
    """Per-pixel classification by a 1×1 convolution.

    Args:
        pixel_decoder: with ``forward_features``.
        predictor: a `PixelHead`.
        criterion: from predictions and labels to losses.
        transformer_in_feature: not read, this head has no transformer.
    """

    @configurable
    def __init__(
        self,
        *,
        pixel_decoder: nn.Module,
        predictor: PixelHead,
        criterion: PixelCriterion,
        transformer_in_feature: str = "res5",
    ) -> None:
        super().__init__(
            pixel_decoder=pixel_decoder,
            predictor=predictor,
            criterion=criterion,
            transformer_in_feature=transformer_in_feature,
        )


@SEM_SEG_HEADS_REGISTRY.register()
class PerPixelBaselinePlusHead(_PerPixelHead):
    """Per-pixel classification with the transformer decoder, one query per class.

    Args:
        pixel_decoder: with ``forward_features``.
        predictor: a `QueryPixelHead`.
        criterion: from predictions and labels to losses.
        transformer_in_feature: as of `_Head`.
    """

    @configurable
    def __init__(
        self,
        *,
        pixel_decoder: nn.Module,
        predictor: QueryPixelHead,
        criterion: PixelCriterion,
        transformer_in_feature: str = "res5",
    ) -> None:
        super().__init__(
            pixel_decoder=pixel_decoder,
            predictor=predictor,
            criterion=criterion,
            transformer_in_feature=transformer_in_feature,
        )


def build_parts(cfg: Any, input_shape: Mapping[str, ShapeSpec], name: str) -> dict[str, Any]:
    """Pixel decoder and predictor of a head, as its arguments.

    Args:
        cfg: Detectron2's, with our keys.
        input_shape: of the backbone's maps.
        name: published name of the head.

    Raises:
        UserError: if a key has a value that cannot be built.
    """
    check_keys(cfg)
    decoder = build_registered(cfg, input_shape)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SEM_SEG_HEAD.NAME = name
    source = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
    needed = [] if name == "PerPixelBaselineHead" or source == ENCODED else [source]
    predictor = build_head(cfg, feature_shapes(input_shape, needed)[0])
    return {"pixel_decoder": decoder, "predictor": predictor, "transformer_in_feature": source}


def build_pixel_criterion(cfg: Any) -> PixelCriterion:
    """The criterion of per-pixel heads, whatever the meta-architecture is called.

    Raises:
        UserError: if results are asked for that Detectron2's meta-architecture of these heads does not give.
    """
    test = cfg.MODEL.MASK_FORMER.TEST
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor" and (test.PANOPTIC_ON or test.INSTANCE_ON):
        raise UserError(
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON or INSTANCE_ON is True, but Detectron2's SemanticSegmentor returns "
            "semantic scores alone: set both to False, or evaluate with tools/train_net.py"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    criterion = build_criterion(cfg)
    assert isinstance(criterion, PixelCriterion)
    return criterion


def classes_as_segments(labels: Tensor, classes: int, ignore_label: int) -> SegmentMap:
    """(H, W) labels as supervision with one segment for every class, absent ones too: nothing has to be searched."""
    ids = labels.masked_fill(labels == ignore_label, UNSUPERVISED).to(torch.int32)
    return SegmentMap(ids[None], torch.arange(classes, device=labels.device))

"""The pure networks: backbone, pixel decoder and head; images in, predictions out.

They know no config, no dict of samples, no data set and no rank; `build_network` alone reads the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from yacs.config import CfgNode

from maskformer.errors import UserError
from maskformer.modeling.backbones import build_backbone
from maskformer.modeling.heads import MaskClassificationHead, PixelHead, QueryPixelHead
from maskformer.modeling.pixel_decoders import FPNPixelDecoder, PixelDecoderOutput, build_pixel_decoder
from maskformer.modeling.transformer import check_width
from maskformer.structures import MaskPredictions, PixelPredictions

ENCODED = "transformer_encoder"
HEADS = {
    "MaskFormer": ("MaskFormerHead",),
    "SemanticSegmentor": ("PerPixelBaselineHead", "PerPixelBaselinePlusHead"),
}


class MaskFormerNetwork(nn.Module):
    """Mask classification: pairs of a class distribution and a binary mask (paper, section 3.4).

    Args:
        backbone: images → feature maps by name.
        pixel_decoder: feature maps → per-pixel embeddings.
        head: feature map and embeddings → predictions.
        transformer_in_feature: which map the head's transformer reads: a name of the backbone's, or
            "transformer_encoder" for the pixel decoder's encoded map.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pixel_decoder: FPNPixelDecoder,
        head: MaskClassificationHead,
        transformer_in_feature: str = "res5",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.head = head
        self.transformer_in_feature = transformer_in_feature

    def forward(self, images: Tensor) -> MaskPredictions:
        """(B, 3, H, W) normalised images → predictions; h, w = ⌈H/4⌉, ⌈W/4⌉; L = 1 in evaluation."""
        features = self.backbone(images)
        decoded = self.pixel_decoder(features)
        feature = transformer_input(self.transformer_in_feature, features, decoded)
        return self.head(feature, decoded.embeddings)


class PerPixelNetwork(nn.Module):
    """Per-pixel classification with the same backbone and pixel decoder: the baselines (paper, section 4.2).

    Args:
        backbone: images → feature maps by name.
        pixel_decoder: feature maps → per-pixel embeddings.
        head: embeddings → predictions, with a feature map first if it has a transformer.
        transformer_in_feature: as of `MaskFormerNetwork`; a `PixelHead` has no transformer to read it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pixel_decoder: FPNPixelDecoder,
        head: PixelHead | QueryPixelHead,
        transformer_in_feature: str = "res5",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.head = head
        self.transformer_in_feature = transformer_in_feature

    def forward(self, images: Tensor) -> PixelPredictions:
        """(B, 3, H, W) normalised images → predictions; h, w = ⌈H/4⌉, ⌈W/4⌉; L = 1 in evaluation."""
        features = self.backbone(images)
        decoded = self.pixel_decoder(features)
        if isinstance(self.head, PixelHead):
            return self.head(decoded.embeddings)
        feature = transformer_input(self.transformer_in_feature, features, decoded)
        return self.head(feature, decoded.embeddings)


def build_network(cfg: CfgNode) -> MaskFormerNetwork | PerPixelNetwork:
    """The network of a config, with random weights, in training mode.

    Raises:
        UserError: if a key has a value that cannot be built.
    """
    _check_architecture(cfg)
    backbone = build_backbone(cfg)
    pixel_decoder = build_pixel_decoder(cfg, backbone.channels, backbone.strides)
    head = build_head(cfg, backbone.channels)
    source = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
    if isinstance(head, MaskClassificationHead):
        return MaskFormerNetwork(backbone, pixel_decoder, head, source)
    return PerPixelNetwork(backbone, pixel_decoder, head, source)


def build_head(cfg: CfgNode, channels: Mapping[str, int]) -> MaskClassificationHead | QueryPixelHead | PixelHead:
    """The head that ``MODEL.SEM_SEG_HEAD.NAME`` names.

    Args:
        cfg: the config.
        channels: channels of each map of the backbone by name.

    Raises:
        UserError: if a key has a value that cannot be built.
    """
    _check_head(cfg)
    head = cfg.MODEL.SEM_SEG_HEAD
    if head.NAME == "PerPixelBaselineHead":
        return PixelHead(num_classes=head.NUM_CLASSES, mask_dim=head.MASK_DIM)
    source = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
    options = _query_head_options(cfg, head.CONVS_DIM if source == ENCODED else channels[source])
    if head.NAME == "PerPixelBaselinePlusHead":
        return QueryPixelHead(**options)
    return MaskClassificationHead(num_queries=cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, **options)


def _query_head_options(cfg: CfgNode, in_channels: int) -> dict[str, Any]:
    head, settings = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    return {
        "in_channels": in_channels,
        "num_classes": head.NUM_CLASSES,
        "mask_dim": head.MASK_DIM,
        "hidden_dim": settings.HIDDEN_DIM,
        "num_heads": settings.NHEADS,
        "feedforward": settings.DIM_FEEDFORWARD,
        "enc_layers": settings.ENC_LAYERS,
        "dec_layers": settings.DEC_LAYERS,
        "dropout": settings.DROPOUT,
        "pre_norm": settings.PRE_NORM,
        "deep_supervision": settings.DEEP_SUPERVISION,
        "enforce_input_projection": settings.ENFORCE_INPUT_PROJ,
    }


def _check_architecture(cfg: CfgNode) -> None:
    """Refuse, before anything is built, a head that the meta-architecture cannot have, and what `build_head` would."""
    head, architecture = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.META_ARCHITECTURE
    if architecture not in HEADS:
        raise UserError(f"MODEL.META_ARCHITECTURE {architecture!r} is unknown: choose one of {', '.join(HEADS)}")
    if head.NAME not in HEADS[architecture]:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.NAME {head.NAME!r} does not fit MODEL.META_ARCHITECTURE {architecture!r}: "
            f"choose {' or '.join(HEADS[architecture])}"
        )
    _check_head(cfg)


def _check_head(cfg: CfgNode) -> None:
    """Refuse what a head cannot be built from."""
    head, settings = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    if head.NUM_CLASSES < 1:
        raise UserError(f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES}: set it to 1 or more")
    if head.NAME == "PerPixelBaselineHead":
        return
    check_width("MODEL.MASK_FORMER.HIDDEN_DIM", settings.HIDDEN_DIM, settings.NHEADS)
    for key, least in {"NUM_OBJECT_QUERIES": 1, "DEC_LAYERS": 1, "ENC_LAYERS": 0}.items():
        if settings[key] < least:
            raise UserError(f"MODEL.MASK_FORMER.{key} is {settings[key]}: set it to {least} or more")
    if not 0 <= settings.DROPOUT < 1:
        raise UserError(f"MODEL.MASK_FORMER.DROPOUT is {settings.DROPOUT}: set it to at least 0 and less than 1")
    if head.NAME == "PerPixelBaselinePlusHead" and settings.NUM_OBJECT_QUERIES != head.NUM_CLASSES:
        raise UserError(
            f"MODEL.MASK_FORMER.NUM_OBJECT_QUERIES is {settings.NUM_OBJECT_QUERIES}, but each query of "
            f"PerPixelBaselinePlusHead is one class: set it to MODEL.SEM_SEG_HEAD.NUM_CLASSES, {head.NUM_CLASSES}"
        )
    if settings.TRANSFORMER_IN_FEATURE == ENCODED and head.PIXEL_DECODER_NAME == "BasePixelDecoder":
        raise UserError(
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE 'transformer_encoder' needs "
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME 'TransformerEncoderPixelDecoder', not 'BasePixelDecoder': "
            "change the decoder or set the feature to res5"
        )


def transformer_input(source: str, features: Mapping[str, Tensor], decoded: PixelDecoderOutput) -> Tensor:
    """The map that the transformer decoder reads: (B, C, h', w')."""
    if source != ENCODED:
        return features[source]
    if decoded.encoded is None:
        raise ValueError("this pixel decoder has no transformer encoder whose map the head could read")
    return decoded.encoded

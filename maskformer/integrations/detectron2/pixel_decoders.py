"""Our pixel decoders in Detectron2's registry of heads, and any head with the same interface as a pixel decoder.

The interface is ``forward_features(features) -> (mask features, encoder features or None)``; what a third party returns
beyond these two is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from maskformer.errors import UserError
from maskformer.integrations.detectron2.backbones import check_keys, feature_shapes
from maskformer.integrations.detectron2.weights import PIXEL_DECODER, PublishedNames
from maskformer.modeling.pixel_decoders import FPNPixelDecoder, PixelDecoderOutput, build_pixel_decoder


class NativePixelDecoder(nn.Module):
    """One of our pixel decoders with the published interface, and the published names in its state dict.

    Args:
        native: ours.
    """

    def __init__(self, native: FPNPixelDecoder) -> None:
        super().__init__()
        self.native = native
        PublishedNames(PIXEL_DECODER, "native.").attach(self)

    def forward_features(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Feature maps by name, each (B, C_i, h_i, w_i) → per-pixel embeddings (B, C, h, w), and the encoded map."""
        decoded = self.native(features)
        return decoded.embeddings, decoded.encoded

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """As `forward_features`: maps (B, C_i, h_i, w_i) → embeddings (B, C, h, w), encoded map (B, C, h', w')."""
        return self.forward_features(features)


@SEM_SEG_HEADS_REGISTRY.register()
class BasePixelDecoder(NativePixelDecoder):
    """The plain feature pyramid.

    Args:
        native: an `FPNPixelDecoder`.
    """

    @configurable
    def __init__(self, native: FPNPixelDecoder) -> None:
        super().__init__(native)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from a config."""
        return {"native": build_native(cfg, input_shape, cls.__name__)}


@SEM_SEG_HEADS_REGISTRY.register()
class TransformerEncoderPixelDecoder(NativePixelDecoder):
    """The pyramid over a coarsest map that has passed a transformer encoder.

    Args:
        native: our class of the same name.
    """

    @configurable
    def __init__(self, native: FPNPixelDecoder) -> None:
        super().__init__(native)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from a config."""
        return {"native": build_native(cfg, input_shape, cls.__name__)}


def build_native(cfg: Any, input_shape: Mapping[str, ShapeSpec], name: str) -> FPNPixelDecoder:
    """One of our pixel decoders over a backbone of Detectron2.

    Args:
        cfg: Detectron2's, with our keys.
        input_shape: of the backbone's maps.
        name: published name of the decoder.

    Raises:
        UserError: if a key has a value that cannot be built.
    """
    check_keys(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = name
    return build_pixel_decoder(cfg, *feature_shapes(input_shape, cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES))


def build_registered(cfg: Any, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The pixel decoder that ``MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`` names in Detectron2's registry.

    Raises:
        UserError: if there is none of this name, or it lacks the interface of a pixel decoder.
    """
    name = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    if name not in SEM_SEG_HEADS_REGISTRY:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME {name!r} is not registered in SEM_SEG_HEADS_REGISTRY: import its "
            "module before the model is built, or name BasePixelDecoder or TransformerEncoderPixelDecoder"
        )
    decoder: nn.Module = SEM_SEG_HEADS_REGISTRY.get(name)(cfg, input_shape)
    if not hasattr(decoder, "forward_features"):
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME {name!r} has no forward_features(features), which makes the "
            "per-pixel embeddings: name a pixel decoder"
        )
    return decoder


def decode(decoder: Any, features: Mapping[str, Tensor]) -> PixelDecoderOutput:
    """What any registered pixel decoder makes of the backbone's maps, in our own type."""
    embeddings, encoded, *_ = decoder.forward_features(features)
    return PixelDecoderOutput(embeddings, encoded)

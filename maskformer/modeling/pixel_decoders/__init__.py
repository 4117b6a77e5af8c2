"""Pixel decoders: a dict of feature maps in, per-pixel embeddings out."""

from maskformer.modeling.pixel_decoders.build import build_pixel_decoder
from maskformer.modeling.pixel_decoders.fpn import FPNPixelDecoder, PixelDecoderOutput
from maskformer.modeling.pixel_decoders.transformer_fpn import TransformerEncoderPixelDecoder

__all__ = ["FPNPixelDecoder", "PixelDecoderOutput", "TransformerEncoderPixelDecoder", "build_pixel_decoder"]

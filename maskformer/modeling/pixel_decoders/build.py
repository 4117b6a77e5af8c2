"""From config to pixel decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from maskformer.errors import UserError
from maskformer.modeling.layers import GROUPS, NORMS
from maskformer.modeling.pixel_decoders.fpn import FPNPixelDecoder
from maskformer.modeling.pixel_decoders.transformer_fpn import TransformerEncoderPixelDecoder
from maskformer.modeling.transformer import check_width

OUTPUT_STRIDE = 4


def build_pixel_decoder(cfg: CfgNode, channels: Mapping[str, int], strides: Mapping[str, int]) -> FPNPixelDecoder:
    """The pixel decoder that ``MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`` names.

    ``TRANSFORMER_ENC_LAYERS`` belongs to `TransformerEncoderPixelDecoder` alone: published recipes with the plain
    decoder name it too.

    Args:
        cfg: the config.
        channels: channels of each map of the backbone by name.
        strides: stride of each map.

    Raises:
        UserError: if a key has a value that cannot be built.
    """
    head, settings = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    names = sorted(set(head.IN_FEATURES), key=lambda name: strides[name])
    _check(cfg, strides[names[0]])
    options: dict[str, Any] = {
        "channels": {name: channels[name] for name in names},
        "conv_dim": head.CONVS_DIM,
        "mask_dim": head.MASK_DIM,
        "norm": head.NORM,
    }
    if head.PIXEL_DECODER_NAME == "BasePixelDecoder":
        return FPNPixelDecoder(**options)
    check_width("MODEL.SEM_SEG_HEAD.CONVS_DIM", head.CONVS_DIM, settings.NHEADS)
    return TransformerEncoderPixelDecoder(
        **options,
        enc_layers=head.TRANSFORMER_ENC_LAYERS,
        num_heads=settings.NHEADS,
        feedforward=settings.DIM_FEEDFORWARD,
        dropout=settings.DROPOUT,
        pre_norm=settings.PRE_NORM,
    )


def _check(cfg: CfgNode, finest_stride: int) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    decoders = ("BasePixelDecoder", "TransformerEncoderPixelDecoder")
    if head.PIXEL_DECODER_NAME not in decoders:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME {head.PIXEL_DECODER_NAME!r} is unknown: "
            f"choose one of {', '.join(decoders)}"
        )
    if head.NORM not in ("", *NORMS):
        raise UserError(f"MODEL.SEM_SEG_HEAD.NORM {head.NORM!r} is unknown: choose one of '', {', '.join(NORMS)}")
    if head.NORM == "GN" and head.CONVS_DIM % GROUPS:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.CONVS_DIM {head.CONVS_DIM} cannot be split into the {GROUPS} groups of "
            f"MODEL.SEM_SEG_HEAD.NORM 'GN': choose a multiple of {GROUPS} or another norm"
        )
    if head.TRANSFORMER_ENC_LAYERS < 0:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS is {head.TRANSFORMER_ENC_LAYERS}: set it to 0 or more"
        )
    if finest_stride != OUTPUT_STRIDE:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES {list(head.IN_FEATURES)} begins with a map of stride {finest_stride}, but "
            f"masks are predicted at stride {OUTPUT_STRIDE}: add res2 (and keep MODEL.SWIN.PATCH_SIZE {OUTPUT_STRIDE})"
        )

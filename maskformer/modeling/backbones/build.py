"""From config to backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from yacs.config import CfgNode

from maskformer.errors import UserError
from maskformer.modeling.backbones.recomputation import check_recomputation, recompute_activations
from maskformer.modeling.backbones.swin import SwinBackbone
from maskformer.modeling.backbones.timm import RESNET_BLOCKS, STRIDES, TimmBackbone, make_resnet, make_timm_pyramid
from maskformer.modeling.layers import NORMS

STEMS = ("basic", "deeplab")
HEADS_WITH_TRANSFORMER = ("MaskFormerHead", "PerPixelBaselinePlusHead")


def build_backbone(cfg: CfgNode) -> TimmBackbone | SwinBackbone:
    """The backbone that ``MODEL.BACKBONE.NAME`` names, with random weights (timm's own if ``MODEL.TIMM.PRETRAINED``).

    It makes only the maps that something reads, so that every parameter has a gradient; the stages up to
    ``MODEL.BACKBONE.FREEZE_AT`` are not trained.

    Raises:
        UserError: if a key has a value that cannot be built.
    """
    makers: dict[str, Callable[[CfgNode, list[str]], TimmBackbone | SwinBackbone]] = {
        "build_resnet_backbone": _build_resnet,
        "build_resnet_deeplab_backbone": _build_resnet,
        "D2SwinTransformer": _build_swin,
        "timm": _build_timm,
    }
    name = cfg.MODEL.BACKBONE.NAME
    if name not in makers:
        raise UserError(f"MODEL.BACKBONE.NAME {name!r} is unknown: choose one of {', '.join(makers)}")
    backbone = makers[name](cfg, needed_features(cfg))
    if cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING:
        _recompute(cfg, backbone)
    _freeze(cfg, backbone)
    return backbone


def _freeze(cfg: CfgNode, backbone: TimmBackbone | SwinBackbone) -> None:
    """Freeze the first stages; of a model that is not ours to know, see that its maps no longer train anything."""
    count = cfg.MODEL.BACKBONE.FREEZE_AT
    backbone.freeze(count)
    if count < 2 or cfg.MODEL.BACKBONE.NAME != "timm":
        return
    training = backbone.training
    maps = backbone.eval()(torch.zeros(1, 3, 64, 96))
    backbone.train(training)
    trained = [name for name, feature in maps.items() if backbone.strides[name] <= 2**count and feature.requires_grad]
    if trained:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT {count} cannot be told for MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME!r}, whose "
            f"{trained[0]} depends on modules after those that make it: set the key to 0 or 5, or choose another model"
        )


def _recompute(cfg: CfgNode, backbone: TimmBackbone | SwinBackbone) -> None:
    """Gradient checkpointing; models that are not ours to know are tried out."""
    if cfg.MODEL.BACKBONE.NAME != "timm":
        recompute_activations(backbone)
        return
    try:
        check_recomputation(backbone)
    except Exception as error:  # whatever such a model raises when it is run twice
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"MODEL.BACKBONE.GRADIENT_CHECKPOINTING does not work with MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME!r} "
            f"({reason}): set it to False or choose another model"
        ) from error


def needed_features(cfg: CfgNode) -> list[str]:
    """Names of the maps that the pixel decoder or the transformer reads, finest first.

    Raises:
        UserError: if there is no map of a name.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    named = [("MODEL.SEM_SEG_HEAD.IN_FEATURES", name) for name in head.IN_FEATURES]
    transformer_in = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
    if head.NAME in HEADS_WITH_TRANSFORMER and transformer_in != "transformer_encoder":
        named.append(("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", transformer_in))
    for key, name in named:
        if name not in STRIDES:
            extra = " or transformer_encoder" if key.endswith("TRANSFORMER_IN_FEATURE") else ""
            raise UserError(f"{key} names {name!r}, which no backbone has: use {', '.join(STRIDES)}{extra}")
    if not head.IN_FEATURES:
        raise UserError(f"MODEL.SEM_SEG_HEAD.IN_FEATURES is empty: name at least one of {', '.join(STRIDES)}")
    return [name for name in STRIDES if name in {name for _, name in named}]


def _build_resnet(cfg: CfgNode, features: list[str]) -> TimmBackbone:
    resnets = cfg.MODEL.RESNETS
    _check_resnet(cfg)
    return make_resnet(
        depth=resnets.DEPTH,
        norm=resnets.NORM,
        deep_stem=resnets.STEM_TYPE == "deeplab",
        res4_dilation=resnets.RES4_DILATION,
        res5_dilation=resnets.RES5_DILATION,
        res5_multi_grid=resnets.RES5_MULTI_GRID,
        out_features=features,
    )


def _check_resnet(cfg: CfgNode) -> None:
    resnets, name = cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.NAME
    stem, grid = resnets.STEM_TYPE, list(resnets.RES5_MULTI_GRID)
    _check_choice("MODEL.RESNETS.DEPTH", resnets.DEPTH, RESNET_BLOCKS)
    _check_choice("MODEL.RESNETS.NORM", resnets.NORM, NORMS)
    _check_choice("MODEL.RESNETS.STEM_TYPE", stem, STEMS)
    if name == "build_resnet_backbone" and (stem != "basic" or any(g != 1 for g in grid)):
        raise UserError(
            f"MODEL.BACKBONE.NAME {name!r} has no STEM_TYPE {stem!r} with RES5_MULTI_GRID {grid} (MODEL.RESNETS): "
            "set the name to build_resnet_deeplab_backbone"
        )
    blocks = RESNET_BLOCKS[resnets.DEPTH][-1]
    if any(g != 1 for g in grid) and len(grid) != blocks:
        raise UserError(
            f"MODEL.RESNETS.RES5_MULTI_GRID {grid} needs one number for each of the {blocks} blocks of res5 "
            f"of a ResNet-{resnets.DEPTH}"
        )
    for key in ("RES4_DILATION", "RES5_DILATION"):
        _check_choice(f"MODEL.RESNETS.{key}", resnets[key], (1, 2, 4))


def _build_swin(cfg: CfgNode, features: list[str]) -> SwinBackbone:
    swin = cfg.MODEL.SWIN
    if len(swin.DEPTHS) != 4 or len(swin.NUM_HEADS) != 4:
        raise UserError(
            f"MODEL.SWIN.DEPTHS {list(swin.DEPTHS)} and MODEL.SWIN.NUM_HEADS {list(swin.NUM_HEADS)} "
            "need four numbers each, one for each stage"
        )
    for i, heads in enumerate(swin.NUM_HEADS):
        width = swin.EMBED_DIM * 2**i
        if heads < 1 or width % heads:
            raise UserError(
                f"MODEL.SWIN.NUM_HEADS {list(swin.NUM_HEADS)} does not divide the {width} channels of stage {i + 1} "
                f"(MODEL.SWIN.EMBED_DIM {swin.EMBED_DIM}): choose a divisor of {width} for it"
            )
    if min(swin.DEPTHS) < 1 or swin.WINDOW_SIZE < 1:
        raise UserError(
            f"MODEL.SWIN.DEPTHS {list(swin.DEPTHS)} and MODEL.SWIN.WINDOW_SIZE {swin.WINDOW_SIZE} must be at least 1"
        )
    return SwinBackbone(
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS,
        num_heads=swin.NUM_HEADS,
        window_size=swin.WINDOW_SIZE,
        patch_size=swin.PATCH_SIZE,
        mlp_ratio=swin.MLP_RATIO,
        qkv_bias=swin.QKV_BIAS,
        qk_scale=swin.QK_SCALE,
        drop_rate=swin.DROP_RATE,
        attn_drop_rate=swin.ATTN_DROP_RATE,
        drop_path_rate=swin.DROP_PATH_RATE,
        ape=swin.APE,
        patch_norm=swin.PATCH_NORM,
        pretrain_image_size=swin.PRETRAIN_IMG_SIZE,
        out_features=features,
    )


def _build_timm(cfg: CfgNode, features: list[str]) -> TimmBackbone:
    return make_timm_pyramid(cfg.MODEL.TIMM.NAME, pretrained=cfg.MODEL.TIMM.PRETRAINED, out_features=features)


def _check_choice(key: str, value: object, choices: Iterable[object]) -> None:
    known = list(choices)
    if value not in known:
        raise UserError(f"{key} {value!r} cannot be built: choose one of {', '.join(map(str, known))}")

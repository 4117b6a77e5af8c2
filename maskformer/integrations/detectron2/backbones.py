"""Backbones both ways: ours as Detectron2's, and Detectron2's (or a third party's) as ours."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import detectron2.modeling
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from maskformer.errors import UserError
from maskformer.integrations.detectron2.weights import BACKBONE, PublishedNames
from maskformer.modeling.backbones import Backbone, build_backbone
from maskformer.modeling.backbones.freezing import Part
from maskformer.modeling.backbones.timm import STRIDES

DEEPLAB = "build_resnet_deeplab_backbone"
OUR_HEADS = ("MaskFormerHead", "PerPixelBaselineHead", "PerPixelBaselinePlusHead")

# The project registers the ResNets with a deep stem; whoever asks for one without it is told by `detectron2_backbone`.
with contextlib.suppress(ImportError):
    importlib.import_module("detectron2.projects.deeplab")


class NativeBackbone(detectron2.modeling.Backbone):
    """One of our backbones as Detectron2's, with the published names in its state dict.

    Args:
        native: ours.
    """

    def __init__(self, native: Backbone) -> None:
        super().__init__()
        self.native = native
        PublishedNames(BACKBONE, "native.").attach(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images → maps (B, C_i, H/s, W/s) by name, finest first."""
        features: dict[str, Tensor] = self.native(images)
        return features

    @property
    def size_divisibility(self) -> int:
        """What image sides should be a multiple of; 0: anything."""
        return self.native.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The same, as `ImageList` takes it."""
        return {"size_divisibility": self.native.size_divisibility}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        strides = self.native.strides
        return {name: ShapeSpec(channels=c, stride=strides[name]) for name, c in self.native.channels.items()}


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(NativeBackbone):
    """Swin as ``MODEL.SWIN`` describes it.

    Args:
        native: a `SwinBackbone`.
    """

    @configurable
    def __init__(self, native: Backbone) -> None:
        super().__init__(native)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from a config."""
        return {"native": build_native(cfg, "D2SwinTransformer")}


@BACKBONE_REGISTRY.register()
class TimmBackbone(NativeBackbone):
    """Any feature pyramid of timm, ``MODEL.TIMM.NAME``.

    Args:
        native: our `TimmBackbone`.
    """

    @configurable
    def __init__(self, native: Backbone) -> None:
        super().__init__(native)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from a config."""
        return {"native": build_native(cfg, "timm")}


@BACKBONE_REGISTRY.register()
def timm(cfg: Any, input_shape: ShapeSpec) -> TimmBackbone:
    """`TimmBackbone` under the name that it has in our own configs."""
    return TimmBackbone(cfg, input_shape)


def build_native(cfg: Any, name: str) -> Backbone:
    """One of our backbones for a model of Detectron2: the maps that our heads read, or all four for other heads.

    Args:
        cfg: Detectron2's, with our keys.
        name: as ``MODEL.BACKBONE.NAME`` has it in our configs.

    Raises:
        UserError: if our keys are missing, or one has a value that cannot be built.
    """
    check_keys(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.NAME = name
    head = cfg.MODEL.SEM_SEG_HEAD
    if head.NAME not in OUR_HEADS or not set(head.IN_FEATURES) <= set(STRIDES):
        head.NAME, head.IN_FEATURES = "PerPixelBaselineHead", list(STRIDES)
    return build_backbone(cfg)


def check_keys(cfg: Any) -> None:
    """Refuse a config that lacks our keys.

    Raises:
        UserError: if `add_maskformer_config` was not called.
    """
    if "MASK_FORMER" not in cfg.MODEL or "LOSS_NORMALIZER" not in cfg.SOLVER:
        raise UserError(
            "the config lacks MODEL.MASK_FORMER or other keys of ours: call add_maskformer_config(cfg) before "
            "a config file is merged"
        )


def detectron2_backbone(cfg: Any) -> detectron2.modeling.Backbone:
    """The backbone that ``MODEL.BACKBONE.NAME`` names in Detectron2's registry.

    Raises:
        UserError: if it is the one of Detectron2's DeepLab project, which is not there, or cannot do what is asked.
    """
    if cfg.MODEL.BACKBONE.NAME == DEEPLAB and DEEPLAB not in BACKBONE_REGISTRY:
        raise UserError(
            f"MODEL.BACKBONE.NAME {DEEPLAB} is part of Detectron2's DeepLab project, which cannot be imported: install "
            "Detectron2 with its projects, or import theirs before"
        )
    backbone = detectron2.modeling.build_backbone(cfg)
    if cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING and not isinstance(backbone, NativeBackbone):
        raise UserError(
            f"MODEL.BACKBONE.GRADIENT_CHECKPOINTING is True, but MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} is "
            "Detectron2's own or a third party's, which we cannot tell to: set it to False, or choose timm or "
            "D2SwinTransformer"
        )
    return backbone


class Detectron2Backbone(Backbone):
    """Any backbone of Detectron2 (its own, with or without FPN, or a third party's) as one of ours.

    Args:
        body: Detectron2's.
        features: names of the maps to return; None: all of them.

    Attributes:
        channels, strides, size_divisibility: as of every backbone of ours.
        square_size: side of the square that images should be padded to; 0: none.

    Raises:
        UserError: if the backbone has no map of a name.
    """

    def __init__(self, body: nn.Module, features: Sequence[str] | None = None) -> None:
        super().__init__()
        self.body = body
        self.channels, self.strides = feature_shapes(output_shape(body), features)
        constraints: Mapping[str, int] = getattr(body, "padding_constraints", {})
        # A property of Detectron2's class, which a third party's need not be.
        own = getattr(body, "size_divisibility", 0)
        self.size_divisibility = int(constraints.get("size_divisibility", 0) or own)
        self.square_size = int(constraints.get("square_size", 0))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images → maps (B, C_i, H/s, W/s) by name, finest first."""
        features = self.body(images)
        return {name: features[name] for name in self.channels}

    def first_stages(self, count: int) -> Part:
        """Detectron2's backbones freeze themselves when they are built."""
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT {count} must be obeyed by Detectron2's backbone itself: build it with its config"
        )


def output_shape(body: nn.Module) -> dict[str, ShapeSpec]:
    """Shapes of a backbone's maps by name."""
    shape: dict[str, ShapeSpec] = body.output_shape()  # type: ignore[operator]
    return shape


def feature_shapes(
    shapes: Mapping[str, ShapeSpec], features: Sequence[str] | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Channels and strides by name, finest first.

    Args:
        shapes: of a backbone's maps.
        features: which of them; None: all.

    Raises:
        UserError: if there is no map of a name.
    """
    wanted = list(shapes) if features is None else list(features)
    for name in wanted:
        if name not in shapes:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES or MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE names {name!r}, but the "
                f"backbone has {', '.join(shapes)}: name some of these (MODEL.RESNETS.OUT_FEATURES of a ResNet)"
            )
    ordered = sorted(set(wanted), key=lambda name: shapes[name].stride)
    return {n: shapes[n].channels for n in ordered}, {n: shapes[n].stride for n in ordered}

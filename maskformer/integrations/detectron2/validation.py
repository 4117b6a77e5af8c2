"""The native checks of config values, on our keys in a config of Detectron2."""

from __future__ import annotations

from typing import Any

from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

from maskformer.config import get_cfg, validate
from maskformer.config.ranges import CHOICES, STEM_CHANNELS
from maskformer.config.tree import flatten
from maskformer.data.dataset import nearest
from maskformer.errors import UserError
from maskformer.integrations.detectron2.backbones import DEEPLAB, check_keys

# Names that Detectron2 looks up, so that others may stand there than those that are built natively.
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": SEM_SEG_HEADS_REGISTRY,
}
# Where a name is none of ours, these need not fit it either.
ALONG = {
    "MODEL.META_ARCHITECTURE": ("MODEL.SEM_SEG_HEAD.NAME", "MODEL.KEYPOINT_ON"),
    "MODEL.BACKBONE.NAME": (
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "MODEL.RESNETS.STEM_TYPE"),
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE",
    ),
    "MODEL.SEM_SEG_HEAD.NAME": (
        *("MODEL.META_ARCHITECTURE", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "MODEL.SEM_SEG_HEAD.IN_FEATURES"),
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
    ),
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": (
        *("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE"),
        "MODEL.SEM_SEG_HEAD.IN_FEATURES",
    ),
}
# Nothing obeys these natively, Detectron2 does: its ResNets, and the masks of its mappers and detectors.
OBEYED = (
    *("MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP", "MODEL.RESNETS.STRIDE_IN_1X1"),
    *("MODEL.RESNETS.OUT_FEATURES", "MODEL.RESNETS.STEM_OUT_CHANNELS", "MODEL.RESNETS.RES2_OUT_CHANNELS"),
    *("MODEL.MASK_ON", "INPUT.MASK_FORMAT"),
)
MORE_CHOICES = {
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "MODEL.RESNETS.NORM": ("nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN", ""),
}
"""Further values of Detectron2 for keys whose values are listed natively."""


def check_values(cfg: Any) -> None:
    """Refuse values of our keys that cannot work, as a native config does, but not what Detectron2 obeys.

    Args:
        cfg: Detectron2's, with our keys.

    Raises:
        UserError: the first value that cannot work.
    """
    check_keys(cfg)
    checked = get_cfg()
    values, defaults = dict(flatten(cfg)), dict(flatten(checked))
    exempt = set(OBEYED)
    for key, registry in REGISTRIES.items():
        if values[key] in CHOICES[key]:
            continue
        if values[key] not in registry:
            known = dict(registry)
            raise UserError(
                f"{key} is {values[key]!r}, which is not registered in Detectron2's registry {registry._name}: import "
                f"its module before, or mend the name, {nearest(str(values[key]), known)}"
            )
        exempt |= {key, *ALONG[key]}
    exempt |= {key for key, choices in MORE_CHOICES.items() if values[key] in choices}
    for key in defaults:
        if key not in exempt:
            _set(checked, key, values[key])
    if "MODEL.RESNETS.STEM_TYPE" not in exempt:
        checked.MODEL.RESNETS.STEM_OUT_CHANNELS = STEM_CHANNELS.get(checked.MODEL.RESNETS.STEM_TYPE, 64)
    validate(checked)
    _check_shallow_resnet(cfg)


def _set(cfg: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        cfg = cfg[section]
    cfg[name] = value


def _check_shallow_resnet(cfg: Any) -> None:
    """Natively the width follows the depth; Detectron2's ResNets insist on being told."""
    resnet = cfg.MODEL.RESNETS
    if cfg.MODEL.BACKBONE.NAME not in ("build_resnet_backbone", DEEPLAB):
        return
    if resnet.DEPTH in (18, 34) and resnet.RES2_OUT_CHANNELS != 64:
        raise UserError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnet.RES2_OUT_CHANNELS}, but Detectron2's ResNet-{resnet.DEPTH} "
            "needs 64: set it to 64"
        )

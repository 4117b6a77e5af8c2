"""Values that cannot work, in a config of Detectron2: the sentence that a native config gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import detectron2.config

import maskformer
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import add_maskformer_config
from maskformer.integrations.detectron2.command import build_config
from maskformer.integrations.detectron2.training import check_config
from maskformer.integrations.detectron2.validation import check_values

CONFIGS = Path(maskformer.__file__).parents[1] / "configs"
RECIPE = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"
OURS_ALONE = ("quickstart", "camvid")  # written for our defaults
CPU = ["MODEL.DEVICE", "cpu"]
PYRAMID = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "p5"),
]


def config(our_defaults: bool, path: Path, *words: Any) -> Any:
    cfg = detectron2.config.get_cfg()
    add_maskformer_config(cfg, our_defaults=our_defaults)
    cfg.merge_from_file(str(path))
    cfg.merge_from_list([*CPU, *words])
    return cfg


def test_detectron2_config_of_every_recipe_is_accepted() -> None:
    recipes = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("Base-"))
    assert len(recipes) >= 32
    for path in recipes:
        for our_defaults in (True,) if path.parent.name in OURS_ALONE else (True, False):
            check_values(config(our_defaults, path))


WRONG = [
    ("SOLVER.LOSS_NORMALIZER", "globl", "must be 'global' or 'rank'"),
    ("INPUT.RANDOM_FLIP", "none", "may only be 'horizontal'"),
    ("SOLVER.BIAS_LR_FACTOR", 2.0, "may only be 1.0"),
    ("SOLVER.WEIGHT_DECAY_BIAS", 0.1, "may only be None"),
    ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8, "must be 4"),
    ("MODEL.MASK_FORMER.MASK_WEIGHT", -1.0, "must be 0 or more"),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "foo", "must be 'choice' or 'range'"),
    ("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 3.0, "must be between 0 and 1"),
    ("SOLVER.AMP.DTYPE", "foo", "must be 'auto' or"),
    ("VIS_PERIOD", 5, "may only be 0"),
    ("SOLVER.MAX_ITER", 0, "must be greater than 0"),
    ("SOLVER.IMS_PER_BATCH", 0, "must be greater than 0"),
    ("LOG_PERIOD", 0, "must be greater than 0"),
    ("SOLVER.CHECKPOINT_PERIOD", 0, "must be greater than 0"),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupPoly", "must be 'WarmupMultiStepLR' or"),
    ("MODEL.PIXEL_MEAN", [1.0, 2.0], "must have 3 values"),
    ("MODEL.LOAD_PROPOSALS", True, "may only be False"),
    ("MODEL.WEIGHTS_MIN_FIT", 1.5, "must be between 0 and 1"),
    ("MODEL.RESNETS.DEPTH", 51, "must be 18 or 34"),
    ("MODEL.RESNETS.DEPTH", 18, "ResNet-18 needs 64: set it to 64"),
    ("MODEL.META_ARCHITECTURE", "MaskFormr", r"registry META_ARCH: .* did you mean 'MaskFormer'"),
    ("MODEL.BACKBONE.NAME", "D2SwinTransfomer", r"registry BACKBONE: .* did you mean 'D2SwinTransformer'"),
    ("MODEL.SEM_SEG_HEAD.NAME", "MaskFormrHead", r"registry SEM_SEG_HEADS: .* did you mean 'MaskFormerHead'"),
    ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecodr", r"did you mean 'BasePixelDecoder'"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_detectron2_config_with_a_value_that_cannot_work_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"MODEL\.RESNETS\..*{message}|{key} .*{message}"):
        build_config(RECIPE, [*CPU, key, value])


@pytest.mark.parametrize(("key", "value", "message"), WRONG[:3])
def test_detectron2_trainer_of_a_project_refuses_it_too(key: str, value: Any, message: str) -> None:
    cfg = config(False, CONFIGS.parent / RECIPE, key, value)
    with pytest.raises(UserError, match=rf"{key} .*{message}"):
        check_config(cfg, 1)


@pytest.mark.parametrize(
    "words",
    [
        ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.STRIDE_IN_1X1", True],
        ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
        ["MODEL.RESNETS.NORM", "nnSyncBN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 32],
        ["MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"],
        ["MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", "resnet10t"],
        PYRAMID,
        [*PYRAMID, "MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"],
        ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"],
    ],
)
def test_detectron2_config_of_what_detectron2_obeys_is_accepted(words: list[Any]) -> None:
    build_config(RECIPE, [*CPU, *words])

"""Values that cannot work are refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from maskformer.config import get_cfg
from maskformer.config.defaults import DEFAULTS
from maskformer.config.ranges import CHOICES, LENGTHS, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, RATES, SHARES
from maskformer.config.tree import flatten
from maskformer.data.recipes import recipe_task
from maskformer.errors import UserError

CROP = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE"]
PER_PIXEL = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"]
DEEPLAB = ["MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone", "MODEL.RESNETS.STEM_TYPE", "deeplab"]
CANVAS = ["INPUT.SIZE_DIVISIBILITY", "512"]
DETR = ["INPUT.DATASET_MAPPER_NAME", "detr_panoptic"]
PLUS = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselinePlusHead"]


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("MODEL.META_ARCHITECTURE", ["MODEL.META_ARCHITECTURE", "MaskRCNN"]),
        ("MODEL.DEVICE", ["MODEL.DEVICE", "gpu"]),
        ("MODEL.DEVICE", ["MODEL.DEVICE", "cuda:x"]),
        ("MODEL.PIXEL_MEAN", ["MODEL.PIXEL_MEAN", "[1.0]"]),
        ("MODEL.PIXEL_STD", ["MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"]),
        ("MODEL.RESNETS.DEPTH", ["MODEL.RESNETS.DEPTH", "51"]),
        ("MODEL.RESNETS.STEM_TYPE", ["MODEL.RESNETS.STEM_TYPE", "deeplab"]),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", ["MODEL.RESNETS.STEM_OUT_CHANNELS", "128"]),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", [*DEEPLAB, "MODEL.RESNETS.STEM_OUT_CHANNELS", "64"]),
        ("MODEL.RESNETS.RES2_OUT_CHANNELS", ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]),
        (
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            ["MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
        ),
        ("MODEL.TIMM.NAME", ["MODEL.BACKBONE.NAME", "timm"]),
        ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", ["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "149"]),
        ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", [*PER_PIXEL, "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "0"]),
        ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "847"]),
        ("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", ["MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", "0.0"]),
        (
            "MODEL.SWIN.NUM_HEADS",
            ["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.NUM_HEADS", "[3, 6, 12, 23]"],
        ),
        ("MODEL.SWIN.DEPTHS", ["MODEL.SWIN.DEPTHS", "[2, 2]"]),
        ("MODEL.SEM_SEG_HEAD.NAME", ["MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"]),
        ("MODEL.SEM_SEG_HEAD.NAME", ["MODEL.META_ARCHITECTURE", "SemanticSegmentor"]),
        ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res3', 'res2']"]),
        ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["MODEL.SEM_SEG_HEAD.IN_FEATURES", "[]"]),
        ("MODEL.MASK_FORMER.HIDDEN_DIM", ["MODEL.MASK_FORMER.NHEADS", "7"]),
        (
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
            ["MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder"],
        ),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", ["MODEL.MASK_FORMER.MATCHER", "fixed"]),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", PLUS),
        ("MODEL.MASK_FORMER.DROPOUT", ["MODEL.MASK_FORMER.DROPOUT", "1.0"]),
        ("MODEL.MASK_FORMER.TEST.INSTANCE_ON", [*PER_PIXEL, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", "True"]),
        ("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", ["MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", "80.0"]),
        ("TEST.AUG.ENABLED", ["TEST.AUG.ENABLED", "True", "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "False"]),
        ("TEST.AUG.MIN_SIZES", ["TEST.AUG.MIN_SIZES", "[]"]),
        ("TEST.AUG.MIN_SIZES", ["TEST.AUG.MIN_SIZES", "[400, 0]"]),
        ("TEST.AUG.MAX_SIZE", ["TEST.AUG.MAX_SIZE", "0"]),
        ("INPUT.MIN_SIZE_TRAIN", ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"]),
        ("INPUT.MIN_SIZE_TRAIN", ["INPUT.MIN_SIZE_TRAIN", "[]"]),
        ("INPUT.MIN_SIZE_TRAIN", ["INPUT.MIN_SIZE_TRAIN", "[0]"]),
        ("INPUT.CROP.SIZE", [*CROP, "relative", "INPUT.CROP.SIZE", "(512, 512)"]),
        ("INPUT.CROP.SIZE", [*CROP, "absolute", "INPUT.CROP.SIZE", "(0.5, 0.5)"]),
        ("INPUT.CROP.SIZE", [*CROP, "absolute_range", "INPUT.CROP.SIZE", "(600, 384)"]),
        ("INPUT.CROP.SIZE", ["INPUT.CROP.SIZE", "(512,)"]),
        (
            "INPUT.SIZE_DIVISIBILITY",
            [*CROP, "absolute", "INPUT.CROP.SIZE", "(64, 128)", "INPUT.SIZE_DIVISIBILITY", "96"],
        ),
        ("INPUT.SIZE_DIVISIBILITY", ["INPUT.MIN_SIZE_TRAIN", "[800]", "INPUT.SIZE_DIVISIBILITY", "512"]),
        ("INPUT.SIZE_DIVISIBILITY", ["INPUT.MIN_SIZE_TRAIN", "[256, 513]", "INPUT.SIZE_DIVISIBILITY", "512"]),
        ("INPUT.SIZE_DIVISIBILITY", [*CROP, "absolute_range", "INPUT.CROP.SIZE", "(384, 600)", *CANVAS]),
        (
            "INPUT.SIZE_DIVISIBILITY",
            [*CROP, "relative_range", "INPUT.CROP.SIZE", "(0.9, 0.7)", "INPUT.MIN_SIZE_TRAIN", "[800]", *CANVAS],
        ),
        ("SOLVER.STEPS", ["SOLVER.STEPS", "(20, 10)"]),
        ("SOLVER.BASE_LR", ["SOLVER.BASE_LR", "0.0"]),
        ("SOLVER.BASE_LR", ["SOLVER.BASE_LR", float("nan")]),
        ("SOLVER.BASE_LR", ["SOLVER.BASE_LR", "1e999"]),
        ("SOLVER.OPTIMIZER", ["SOLVER.OPTIMIZER", "adamw"]),
        ("SOLVER.NESTEROV", ["SOLVER.OPTIMIZER", "SGD", "SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0.0"]),
        ("DATALOADER.NUM_WORKERS", ["DATALOADER.NUM_WORKERS", "-1"]),
        ("OUTPUT_DIR", ["OUTPUT_DIR", ""]),
        ("LOG_PERIOD", ["LOG_PERIOD", "0"]),
    ],
)
def test_refused_in_one_sentence(key: str, overrides: list[Any]) -> None:
    with pytest.raises(UserError) as caught:
        get_cfg(None, overrides)
    text = str(caught.value)
    origin = "command line: " if key in overrides else ""
    assert text.startswith(f"{origin}{key} is ")
    assert ": " in text.removeprefix(origin)
    assert "\n" not in text


@pytest.mark.parametrize(
    "overrides",
    [
        PER_PIXEL,
        [*PLUS, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "150"],
        ["MODEL.MASK_FORMER.MATCHER", "fixed", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "100"],
        ["MODEL.BACKBONE.NAME", "timm", "MODEL.TIMM.NAME", "convnext_tiny"],
        ["MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone", "MODEL.RESNETS.STEM_TYPE", "deeplab"],
        [*CROP, "absolute", "INPUT.CROP.SIZE", "(512, 1024)"],
        [*CROP, "relative", "INPUT.CROP.SIZE", "(1, 0.5)"],
        ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(256, 512)"],
        ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "11", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "11"],  # as CamVid
        [*DEEPLAB, "MODEL.RESNETS.STEM_OUT_CHANNELS", "128"],
        ["MODEL.RESNETS.DEPTH", "34", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
        # Canvases that hold every image, or may do so, depending on their proportions.
        ["INPUT.MIN_SIZE_TRAIN", "[512]", *CANVAS],
        ["INPUT.MIN_SIZE_TRAIN", "[800]", "INPUT.MAX_SIZE_TRAIN", "512", *CANVAS],
        [*CROP, "absolute", "INPUT.CROP.SIZE", "(512, 512)", *CANVAS],
        [*CROP, "absolute", "INPUT.CROP.SIZE", "(600, 600)", "INPUT.MAX_SIZE_TRAIN", "512", *CANVAS],
        [*CROP, "relative", "INPUT.CROP.SIZE", "(0.9, 0.6)", "INPUT.MIN_SIZE_TRAIN", "[800]", *CANVAS],
        [*CROP, "absolute_range", "INPUT.CROP.SIZE", "(384, 600)", *CANVAS, *DETR],
        ["INPUT.MIN_SIZE_TRAIN", "[800]", *CANVAS, *DETR],
        ["MODEL.DEVICE", "cuda:3"],
        ["SOLVER.BACKBONE_MULTIPLIER", "0.0", "INPUT.MIN_SIZE_TEST", "0"],
    ],
)
def test_accepted(overrides: list[str]) -> None:
    get_cfg(None, overrides)


NEEDED_BY_CHOICES: dict[Any, list[str]] = {
    "SemanticSegmentor": PER_PIXEL,
    "PerPixelBaselineHead": PER_PIXEL,
    "PerPixelBaselinePlusHead": [*PLUS, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "150"],
    "timm": ["MODEL.TIMM.NAME", "resnet50"],
    "deeplab": DEEPLAB,
    "transformer_encoder": ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder"],
    "fixed": ["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "150"],
    "range": ["INPUT.MIN_SIZE_TRAIN", "(256, 512)"],
    "RepeatFactorTrainingSampler": ["DATALOADER.REPEAT_THRESHOLD", "0.001"],
}


@pytest.mark.parametrize(
    "pairs", ["[['a']]", "[['a', 'b']]", "[[1, 0.5]]", "[['', 0.5]]", "[['a', -1.0]]", "[['a', 1.0, 2.0]]"]
)
def test_learning_rate_multipliers_are_pairs(pairs: str) -> None:
    with pytest.raises(UserError, match=r"SOLVER.LR_MULTIPLIERS is .*pairs of a part's name and a factor"):
        get_cfg(None, ["SOLVER.LR_MULTIPLIERS", pairs])


def test_early_stopping_needs_a_metric_and_evaluations() -> None:
    patience = ["SOLVER.EARLY_STOPPING.PATIENCE", "2", "DATASETS.TEST", "('a',)"]
    metric = ["CHECKPOINT.BEST_METRIC", "sem_seg/mIoU"]
    with pytest.raises(UserError, match=r"set CHECKPOINT\.BEST_METRIC"):
        get_cfg(None, [*patience, "TEST.EVAL_PERIOD", "5"])
    with pytest.raises(UserError, match=r"set TEST\.EVAL_PERIOD"):
        get_cfg(None, [*patience, *metric])
    with pytest.raises(UserError, match=r"name a data set in DATASETS\.TEST"):
        get_cfg(None, metric)
    assert get_cfg(None, [*patience, *metric, "TEST.EVAL_PERIOD", "5"]).SOLVER.EARLY_STOPPING.PATIENCE == 2


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CHOICES.items() for value in values])
def test_every_choice_is_accepted(key: str, value: Any) -> None:
    assert dict(flatten(get_cfg(None, [*NEEDED_BY_CHOICES.get(value, []), key, value])))[key] == value


@pytest.mark.parametrize("key", CHOICES)
def test_no_other_choice_is_accepted(key: str) -> None:
    other = "of_another_kind" if isinstance(CHOICES[key][0], str) else 7
    with pytest.raises(UserError, match=rf"^command line: {key} is {other!r} but must be .*: choose one of them$"):
        get_cfg(None, [key, other])


def test_the_recipes_that_can_be_chosen_are_those_there_are() -> None:
    choices = CHOICES["INPUT.DATASET_MAPPER_NAME"]
    assert set(choices) == {"mask_former_semantic", "mask_former_panoptic", "mask_former_instance", "detr_panoptic"}
    tasks = [recipe_task(get_cfg(None, ["INPUT.DATASET_MAPPER_NAME", name])) for name in choices]
    assert sorted(tasks) == ["instance", "panoptic", "panoptic", "semantic"]


def test_tables_name_existing_keys() -> None:
    known = {key for key, _ in flatten(DEFAULTS)}
    named = {*CHOICES, *LENGTHS, *POSITIVE, *NOT_NEGATIVE, *SHARES, *RATES, *NOT_EMPTY}
    assert named <= known


def test_every_number_has_a_bound() -> None:
    free = {
        "MODEL.PIXEL_MEAN",
        "MODEL.SWIN.QK_SCALE",
        "SEED",
        "INPUT.SIZE_DIVISIBILITY",
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY",
    }
    numbers = {
        key
        for key, value in flatten(DEFAULTS)
        for item in [value[0] if isinstance(value, (list, tuple)) and value else value]
        if isinstance(item, (int, float)) and not isinstance(item, bool)
    }
    assert numbers - {*CHOICES, *POSITIVE, *NOT_NEGATIVE, *SHARES, *RATES} - free == set()

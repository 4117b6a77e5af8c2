"""Values that cannot work, found from the config alone before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from maskformer.config.compat import check_unread
from maskformer.config.ranges import (
    CHOICES,
    LENGTHS,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    RATES,
    SHARES,
    STEM_CHANNELS,
)
from maskformer.errors import UserError


class _Checker:
    """The flat values with the one way to refuse them."""

    def __init__(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        self.values = values
        self.origins = origins

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise the one sentence: where, key, value, and why with the remedy."""
        raise UserError(f"{self.origins.get(key, '')}{key} is {self.values[key]!r}{why}")

    def bound(self, keys: tuple[str, ...], holds: Callable[[float], bool], words: str) -> None:
        """Refuse a number, or an element of a list, for which ``holds`` is false."""
        for key in keys:
            value = self.values[key]
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if not all(holds(number) for number in numbers):
                self.refuse(key, f" but must be {words}: change it")


def validate_values(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuse values that cannot work.

    Args:
        values: flat config, dotted key to value, of the right types.
        origins: where a key was set, as it should stand in front of a message; keys may be missing.

    Raises:
        UserError: the first value that cannot work.
    """
    check_unread(values, origins)
    checker = _Checker(values, origins)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            checker.refuse(key, f" but must be {' or '.join(map(repr, choices))}: choose one of them")
    for key, length in LENGTHS.items():
        if len(values[key]) != length:
            checker.refuse(key, f" but must have {length} values: give {length}")
    for key in NOT_EMPTY:
        if not values[key]:
            checker.refuse(key, " but must not be empty: give a value")
    for key, value in values.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            checker.refuse(key, " but must be finite: give an ordinary number")
    checker.bound(POSITIVE, lambda number: number > 0, "greater than 0")
    checker.bound(NOT_NEGATIVE, lambda number: number >= 0, "0 or more")
    checker.bound(SHARES, lambda number: 0 <= number <= 1, "between 0 and 1")
    checker.bound(RATES, lambda number: 0 <= number < 1, "at least 0 and less than 1")
    _check_model(checker)
    _check_transformer(checker)
    _check_input(checker)
    _check_solver(checker)
    _check_sampler(checker)
    if values["TEST.AUG.ENABLED"] and not values["MODEL.MASK_FORMER.TEST.SEMANTIC_ON"]:
        checker.refuse(
            "TEST.AUG.ENABLED",
            " but averages semantic scores, and MODEL.MASK_FORMER.TEST.SEMANTIC_ON is False: switch one of them",
        )


def _check_model(cfg: _Checker) -> None:
    """Device, and names that must fit each other."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", cfg["MODEL.DEVICE"]):
        cfg.refuse("MODEL.DEVICE", " but must be auto, cpu, cuda, cuda:N or mps: choose one of them")
    per_pixel = cfg["MODEL.META_ARCHITECTURE"] == "SemanticSegmentor"
    if per_pixel != (cfg["MODEL.SEM_SEG_HEAD.NAME"] != "MaskFormerHead"):
        cfg.refuse(
            "MODEL.SEM_SEG_HEAD.NAME",
            f" which does not fit MODEL.META_ARCHITECTURE {cfg['MODEL.META_ARCHITECTURE']}:"
            " MaskFormer goes with MaskFormerHead, SemanticSegmentor with the per-pixel heads",
        )
    if per_pixel and cfg["MODEL.MASK_FORMER.TEST.INSTANCE_ON"]:
        cfg.refuse(
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON",
            " but a SemanticSegmentor predicts no instances: set MODEL.META_ARCHITECTURE MaskFormer",
        )
    if cfg["MODEL.BACKBONE.NAME"] == "timm" and not cfg["MODEL.TIMM.NAME"]:
        cfg.refuse("MODEL.TIMM.NAME", " but MODEL.BACKBONE.NAME is timm: name a timm model such as resnet50")
    if cfg["MODEL.BACKBONE.NAME"].startswith("build_resnet"):
        _check_resnet(cfg)
    if cfg["MODEL.BACKBONE.NAME"] == "D2SwinTransformer":
        for stage, heads in enumerate(cfg["MODEL.SWIN.NUM_HEADS"]):
            if (cfg["MODEL.SWIN.EMBED_DIM"] << stage) % heads:
                cfg.refuse(
                    "MODEL.SWIN.NUM_HEADS",
                    f" but stage {stage + 1} has {cfg['MODEL.SWIN.EMBED_DIM'] << stage} channels: give divisors",
                )
    classes = cfg["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]
    if cfg["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"] < classes:
        cfg.refuse(
            "MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
            f" but labels 0 to {classes - 1} are classes: set it to that of unsupervised pixels, {classes} or more",
        )
    features = cfg["MODEL.SEM_SEG_HEAD.IN_FEATURES"]
    if list(features) != sorted(set(features)) or not set(features) <= {"res2", "res3", "res4", "res5"}:
        cfg.refuse(
            "MODEL.SEM_SEG_HEAD.IN_FEATURES", " but must name some of res2, res3, res4, res5 in this order: mend it"
        )


def _check_resnet(cfg: _Checker) -> None:
    """The stem's type follows the backbone's name; its width, and the width of res2, must be those that are built."""
    stem, deeplab = cfg["MODEL.RESNETS.STEM_TYPE"], cfg["MODEL.BACKBONE.NAME"] == "build_resnet_deeplab_backbone"
    if stem == "deeplab" and not deeplab:
        cfg.refuse(
            "MODEL.RESNETS.STEM_TYPE",
            " but needs another backbone: set MODEL.BACKBONE.NAME build_resnet_deeplab_backbone",
        )
    width = STEM_CHANNELS[stem]
    if cfg["MODEL.RESNETS.STEM_OUT_CHANNELS"] != width:
        cfg.refuse("MODEL.RESNETS.STEM_OUT_CHANNELS", f" but a {stem} stem has {width} channels: set it to {width}")
    depth = cfg["MODEL.RESNETS.DEPTH"]
    # The default, 256, stands in every config that does not name the key, so it is no contradiction to depth 18.
    if cfg["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 64 and depth > 34:
        cfg.refuse("MODEL.RESNETS.RES2_OUT_CHANNELS", f" but res2 of a ResNet-{depth} has 256 channels: leave it out")


def _check_transformer(cfg: _Checker) -> None:
    """Sizes of the transformer, and the number of queries where it must equal the number of classes."""
    head = cfg["MODEL.SEM_SEG_HEAD.NAME"]
    if head == "PerPixelBaselineHead":
        return
    hidden, heads = cfg["MODEL.MASK_FORMER.HIDDEN_DIM"], cfg["MODEL.MASK_FORMER.NHEADS"]
    if hidden % heads or hidden % 4:
        cfg.refuse(
            "MODEL.MASK_FORMER.HIDDEN_DIM", f" but must be a multiple of 4 and of NHEADS {heads}: change one of them"
        )
    encoder = cfg["MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE"] == "transformer_encoder"
    if encoder and cfg["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"] != "TransformerEncoderPixelDecoder":
        cfg.refuse(
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
            " but the pixel decoder has no encoder: set MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"
            " TransformerEncoderPixelDecoder",
        )
    fixed = cfg["MODEL.MASK_FORMER.MATCHER"] == "fixed" and head == "MaskFormerHead"
    if fixed or head == "PerPixelBaselinePlusHead":
        classes, reason = cfg["MODEL.SEM_SEG_HEAD.NUM_CLASSES"], "the fixed matcher" if fixed else head
        if cfg["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"] != classes:
            cfg.refuse(
                "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
                f" but {reason} needs one query per class: set it to MODEL.SEM_SEG_HEAD.NUM_CLASSES, {classes}",
            )


def _check_input(cfg: _Checker) -> None:
    """Sizes of training images and crops."""
    sizes = cfg["INPUT.MIN_SIZE_TRAIN"]
    if cfg["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        cfg.refuse("INPUT.MIN_SIZE_TRAIN", " but MIN_SIZE_TRAIN_SAMPLING is range: give the two ends, smaller first")
    if cfg["INPUT.CROP.ENABLED"]:
        _check_crop(cfg)
    _check_canvas(cfg)


def _check_crop(cfg: _Checker) -> None:
    """The crop's size fits its type."""
    crop, kind = cfg["INPUT.CROP.SIZE"], cfg["INPUT.CROP.TYPE"]
    if kind.startswith("relative") and max(crop) > 1:
        cfg.refuse("INPUT.CROP.SIZE", f" but INPUT.CROP.TYPE {kind} takes shares up to 1: set INPUT.CROP.TYPE absolute")
    if kind.startswith("absolute") and any(side != int(side) for side in crop):
        cfg.refuse("INPUT.CROP.SIZE", f" but INPUT.CROP.TYPE {kind} takes pixels: give whole numbers")
    if kind == "absolute_range" and crop[0] > crop[1]:
        cfg.refuse("INPUT.CROP.SIZE", " but INPUT.CROP.TYPE absolute_range takes two ends: give the smaller first")


def _check_canvas(cfg: _Checker) -> None:
    """The training canvas holds what resizing and cropping leave, as far as that is known without the images."""
    canvas, longest = cfg["INPUT.SIZE_DIVISIBILITY"], cfg["INPUT.MAX_SIZE_TRAIN"]
    if not 0 < canvas < longest or cfg["INPUT.DATASET_MAPPER_NAME"] == "detr_panoptic":  # which has no canvas
        return
    shorter = max(cfg["INPUT.MIN_SIZE_TRAIN"])
    if not cfg["INPUT.CROP.ENABLED"]:
        if canvas < shorter:
            cfg.refuse(
                "INPUT.SIZE_DIVISIBILITY",
                f" but images are resized to a shorter side of up to {shorter} (INPUT.MIN_SIZE_TRAIN) and not cropped:"
                " make the canvas at least as large, set it to -1, or enable INPUT.CROP",
            )
        return
    crop, kind = cfg["INPUT.CROP.SIZE"], cfg["INPUT.CROP.TYPE"]
    if kind.startswith("absolute"):
        if canvas < max(crop):
            cfg.refuse(
                "INPUT.SIZE_DIVISIBILITY",
                f" but INPUT.CROP.SIZE is up to {max(crop):g} pixels a side: make the canvas at least as large",
            )
        return
    # Of the longer side, which is no shorter than this, whichever side of the crop it is.
    least = int(min(shorter, longest) * min(crop) + 0.5)
    if canvas < least:
        cfg.refuse(
            "INPUT.SIZE_DIVISIBILITY",
            f" but crops can be {least} pixels or more a side (INPUT.MIN_SIZE_TRAIN times INPUT.CROP.SIZE):"
            " make the canvas at least as large, or crop less",
        )


def _check_solver(cfg: _Checker) -> None:
    """Order of the steps, and combinations that torch refuses."""
    steps = list(cfg["SOLVER.STEPS"])
    if steps != sorted(steps):
        cfg.refuse("SOLVER.STEPS", " but must ascend: sort it")
    if cfg["SOLVER.OPTIMIZER"] == "SGD" and cfg["SOLVER.NESTEROV"] and cfg["SOLVER.MOMENTUM"] == 0:
        cfg.refuse("SOLVER.NESTEROV", " but SOLVER.MOMENTUM is 0: set a momentum or switch it off")
    _check_multipliers(cfg)
    if cfg["SOLVER.EARLY_STOPPING.PATIENCE"]:
        if not cfg["CHECKPOINT.BEST_METRIC"]:
            cfg.refuse("SOLVER.EARLY_STOPPING.PATIENCE", " but no metric is named: set CHECKPOINT.BEST_METRIC")
        if not cfg["TEST.EVAL_PERIOD"]:
            cfg.refuse("SOLVER.EARLY_STOPPING.PATIENCE", " but evaluations come at the end only: set TEST.EVAL_PERIOD")
    if cfg["CHECKPOINT.BEST_METRIC"] and not cfg["DATASETS.TEST"]:
        cfg.refuse("CHECKPOINT.BEST_METRIC", " but there is nothing to evaluate on: name a data set in DATASETS.TEST")


def _check_multipliers(cfg: _Checker) -> None:
    """Pairs of a part of the model and a factor."""
    for pair in cfg["SOLVER.LR_MULTIPLIERS"]:
        good = len(pair) == 2 and isinstance(pair[0], str) and pair[0] and isinstance(pair[1], (int, float))
        if not good or pair[1] < 0 or not math.isfinite(pair[1]):
            cfg.refuse(
                "SOLVER.LR_MULTIPLIERS",
                " but must hold pairs of a part's name and a factor of 0 or more:"
                " write it like [['sem_seg_head.pixel_decoder', 0.5]]",
            )


def _check_sampler(cfg: _Checker) -> None:
    """Repeating needs both the sampler and a threshold."""
    repeats = cfg["DATALOADER.SAMPLER_TRAIN"] == "RepeatFactorTrainingSampler"
    threshold = cfg["DATALOADER.REPEAT_THRESHOLD"]
    if repeats and threshold == 0:
        cfg.refuse(
            "DATALOADER.SAMPLER_TRAIN",
            " but with DATALOADER.REPEAT_THRESHOLD 0 nothing would be repeated: set it, such as to 0.001",
        )
    if threshold > 0 and not repeats:
        cfg.refuse(
            "DATALOADER.REPEAT_THRESHOLD",
            " but has no effect with DATALOADER.SAMPLER_TRAIN TrainingSampler: set it to 0, or"
            " DATALOADER.SAMPLER_TRAIN to RepeatFactorTrainingSampler",
        )

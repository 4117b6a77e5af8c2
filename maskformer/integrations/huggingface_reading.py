"""Hugging Face's ``config.json`` and ``preprocessor_config.json`` in our words.

Whatever would make another function of the same weights is read, or refused with file, key and value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskformer.checkpoint.metadata import CONFIG_SECTION
from maskformer.config import get_cfg
from maskformer.config.loading import Setting
from maskformer.config.tree import flatten, merge
from maskformer.config.validation import validate_values
from maskformer.errors import UserError
from maskformer.integrations.huggingface_config import DECODER, KEPT, KEPT_SECTION, RESNETS, STAGES, SWIN, WEIGHTS

# What these keys must be; where a file leaves one out, the first is what transformers takes.
_SWIN_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "layer_norm_eps": (1e-5,),
    "num_channels": (3,),
    "use_absolute_embeddings": (False,),
}
_RESNET_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("relu",),
    "num_channels": (3,),
    "out_features": (STAGES, None),
    "downsample_in_first_stage": (False,),
    "downsample_in_bottleneck": (False,),
}
_DECODER_FIXED: dict[str, tuple[Any, ...]] = {"model_type": ("detr",), "activation_function": ("relu",)}
_BILINEAR = 2  # as PIL numbers it
# Of the published panoptic models; 0, our default, would keep every query.
_PUBLISHED_THRESHOLD = 0.8


def settings_of(config: Mapping[str, Any], path: Path) -> list[Setting]:
    """Our keys and values for a ``config.json``, each with the place it comes from.

    Raises:
        UserError: it is no MaskFormer, or has parts that ours does not have; `path` is named.
    """
    if config.get("model_type") != "maskformer":
        raise UserError(f"{path} describes a {config.get('model_type')!r}, not a maskformer: name a MaskFormer model")
    decoder = _section(config, "decoder_config", path)
    _refuse_other(decoder, "decoder_config", _DECODER_FIXED, path)
    settings = _backbone_settings(_section(config, "backbone_config", path), path)
    for ours, theirs, default in DECODER:
        where = f"{path}, decoder_config.{theirs}: "
        settings.append(Setting(f"MODEL.MASK_FORMER.{ours}", decoder.get(theirs, default), where))
    for ours, default in WEIGHTS:
        theirs = ours.lower()
        settings.append(Setting(f"MODEL.MASK_FORMER.{ours}", config.get(theirs, default), f"{path}, {theirs}: "))
    for ours, theirs in {"CONVS_DIM": "fpn_feature_size", "MASK_DIM": "mask_feature_size"}.items():
        settings.append(Setting(f"MODEL.SEM_SEG_HEAD.{ours}", config.get(theirs, 256), f"{path}, {theirs}: "))
    classes = len(class_names_of(config, path))
    settings.append(Setting("MODEL.SEM_SEG_HEAD.NUM_CLASSES", classes, f"{path}, id2label: "))
    return settings + _kept_settings(config, classes, path)


def _kept_settings(config: Mapping[str, Any], classes: int, path: Path) -> list[Setting]:
    """What our own section says; for folders of others, what the published models have."""
    section = config.get(CONFIG_SECTION)
    kept = section.get(KEPT_SECTION) if isinstance(section, Mapping) else None
    if kept is None:
        kept = {
            "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": max(255, classes),
            "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": _PUBLISHED_THRESHOLD,
            "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": _PUBLISHED_THRESHOLD,
        }
    where = f"{path}, {CONFIG_SECTION}.{KEPT_SECTION}"
    if not isinstance(kept, Mapping):
        raise UserError(f"{where} is {kept!a:.60} where keys and values belong: download or copy the file again")
    for key in kept:
        if key not in KEPT:
            raise UserError(f"{where} has the key {key!a:.60}, which is none of those kept there: remove it")
    return [Setting(key, value, f"{where}: ") for key, value in kept.items()]


def class_names_of(config: Mapping[str, Any], path: Path) -> list[str]:
    """Names of the classes in their order; ``LABEL_0`` and so on where only ``num_labels`` is given.

    Raises:
        UserError: there are none, or their numbers have gaps.
    """
    table = config.get("id2label")
    if table is None:
        count = config.get("num_labels", 2)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"{path}: num_labels is {count!a:.60} where a number of classes belongs: correct it")
        return [f"LABEL_{i}" for i in range(count)]
    try:
        names = {int(number): str(name) for number, name in table.items()}
    except (AttributeError, ValueError) as error:
        raise UserError(f"{path} has a damaged id2label: download or copy it again") from error
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{path}: the numbers of id2label do not run from 0 without a gap: correct them")
    return [names[i] for i in range(len(names))]


def image_settings(preprocessor: Mapping[str, Any], path: Path) -> list[Setting]:
    """Our keys and values for a ``preprocessor_config.json``: what images go through.

    A pixel x in 0-255 becomes (rescale_factor x - image_mean) / image_std there and (x - PIXEL_MEAN) / PIXEL_STD here.

    Raises:
        UserError: a value is damaged, or asks for what ours does not do; `path` is named.
    """
    factor = _number(preprocessor, "rescale_factor", 1 / 255, path) if _flag(preprocessor, "do_rescale", path) else 1.0
    normalised = _flag(preprocessor, "do_normalize", path)
    mean = _triple(preprocessor, "image_mean", (0.485, 0.456, 0.406), path) if normalised else [0.0] * 3
    std = _triple(preprocessor, "image_std", (0.229, 0.224, 0.225), path) if normalised else [1.0] * 3
    settings = [
        Setting("MODEL.PIXEL_MEAN", [round(value / factor, 6) for value in mean], f"{path}, image_mean: "),
        Setting("MODEL.PIXEL_STD", [round(value / factor, 6) for value in std], f"{path}, image_std: "),
    ]
    return settings + _size_settings(preprocessor, path)


def _size_settings(preprocessor: Mapping[str, Any], path: Path) -> list[Setting]:
    if not _flag(preprocessor, "do_resize", path):
        return [Setting("INPUT.MIN_SIZE_TEST", 0, f"{path}, do_resize: ")]
    _refuse_other(preprocessor, "", {"resample": (_BILINEAR, None)}, path)
    size = preprocessor.get("size")
    sides: Any = {} if size is None else size if isinstance(size, Mapping) else {"shortest_edge": size}
    if sides and "shortest_edge" not in sides:
        raise UserError(
            f"{path}: size is {size!a:.60} but images are resized by their shorter side here: "
            f"write shortest_edge and longest_edge"
        )
    longest = sides.get("longest_edge") or preprocessor.get("max_size")
    settings = []
    if sides:
        settings.append(Setting("INPUT.MIN_SIZE_TEST", sides["shortest_edge"], f"{path}, size: "))
    if longest is not None:
        settings.append(Setting("INPUT.MAX_SIZE_TEST", longest, f"{path}, size: "))
    return settings


def check_settings(settings: Sequence[Setting]) -> None:
    """Refuse values of a wrong type or out of range, naming the file and the key that they come from.

    Raises:
        UserError: the first such value.
    """
    cfg = get_cfg()
    origins = merge(cfg, settings)
    validate_values(dict(flatten(cfg)), origins)


def _backbone_settings(backbone: Mapping[str, Any], path: Path) -> list[Setting]:
    kind, where = backbone.get("model_type"), f"{path}, backbone_config"
    if kind in ("swin", "maskformer-swin"):
        _refuse_other(backbone, "backbone_config", _SWIN_FIXED, path)
        return [
            Setting("MODEL.BACKBONE.NAME", "D2SwinTransformer", f"{where}: "),
            *(
                Setting(f"MODEL.SWIN.{ours}", backbone.get(theirs, default), f"{where}.{theirs}: ")
                for ours, theirs, default in SWIN
            ),
        ]
    if kind == "resnet":
        _refuse_other(backbone, "backbone_config", _RESNET_FIXED, path)
        _, depths, widths = RESNETS[50]
        layout = (
            backbone.get("layer_type", "bottleneck"),
            backbone.get("depths", depths),
            backbone.get("hidden_sizes", widths),
        )
        depth = next((known for known, each in RESNETS.items() if each == layout), None)
        if depth is None or backbone.get("embedding_size", 64) != 64:
            raise UserError(f"{path}: its backbone_config is a ResNet of other depths or widths than ours have")
        return [
            Setting("MODEL.BACKBONE.NAME", "build_resnet_backbone", f"{where}: "),
            Setting("MODEL.RESNETS.DEPTH", depth, f"{where}.depths: "),
        ]
    raise UserError(f"{path}: backbone_config is a {kind!r}: only resnet and swin backbones can be read")


def _section(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise UserError(f"{path} has no {name}: save the model again with a current version of transformers")
    return section


def _refuse_other(section: Mapping[str, Any], name: str, fixed: Mapping[str, tuple[Any, ...]], path: Path) -> None:
    """Refuse values that would make another function of the same weights."""
    for key, possible in fixed.items():
        if key in section and section[key] not in possible:
            raise UserError(
                f"{path}: {f'{name}.' if name else ''}{key} is {section[key]!a:.60} but only {possible[0]!r} can be "
                f"read: use this model with transformers"
            )


def _flag(preprocessor: Mapping[str, Any], key: str, path: Path) -> bool:
    value = preprocessor.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!a:.60} where true or false belongs: correct it")
    return value is not False


def _number(preprocessor: Mapping[str, Any], key: str, default: float, path: Path) -> float:
    value = preprocessor.get(key)
    if value is None:
        return default
    if not _is_finite(value) or value <= 0:
        raise UserError(f"{path}: {key} is {value!a:.60} where a number above 0 belongs: correct it")
    return float(value)


def _triple(preprocessor: Mapping[str, Any], key: str, default: Sequence[float], path: Path) -> list[float]:
    """Three numbers, one for each channel; the default where the file does not have the key."""
    value = preprocessor.get(key, list(default))
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_finite, value)):
        raise UserError(f"{path}: {key} is {value!a:.60} where three numbers belong, for R, G and B: correct it")
    return [float(number) for number in value]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

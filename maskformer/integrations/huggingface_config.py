"""Configs in Hugging Face's words: ours to theirs, theirs to ours, and what theirs cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from maskformer.checkpoint.metadata import CONFIG_SECTION
from maskformer.data.dataset import Metadata
from maskformer.errors import UserError

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_RESNETS = {
    18: ("basic", [2, 2, 2, 2], [64, 128, 256, 512]),
    34: ("basic", [3, 4, 6, 3], [64, 128, 256, 512]),
    50: ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
    101: ("bottleneck", [3, 4, 23, 3], [256, 512, 1024, 2048]),
    152: ("bottleneck", [3, 8, 36, 3], [256, 512, 1024, 2048]),
}
# Our key (below MODEL.SWIN), theirs, what they take where a file does not say.
_SWIN: tuple[tuple[str, str, Any], ...] = (
    ("PRETRAIN_IMG_SIZE", "image_size", 224),
    ("PATCH_SIZE", "patch_size", 4),
    ("EMBED_DIM", "embed_dim", 96),
    ("DEPTHS", "depths", [2, 2, 6, 2]),
    ("NUM_HEADS", "num_heads", [3, 6, 12, 24]),
    ("WINDOW_SIZE", "window_size", 7),
    ("MLP_RATIO", "mlp_ratio", 4.0),
    ("QKV_BIAS", "qkv_bias", True),
    ("DROP_RATE", "hidden_dropout_prob", 0.0),
    ("ATTN_DROP_RATE", "attention_probs_dropout_prob", 0.0),
    ("DROP_PATH_RATE", "drop_path_rate", 0.1),
)
# The same below MODEL.MASK_FORMER, in their decoder_config.
_DECODER: tuple[tuple[str, str, Any], ...] = (
    ("HIDDEN_DIM", "d_model", 256),
    ("NUM_OBJECT_QUERIES", "num_queries", 100),
    ("NHEADS", "decoder_attention_heads", 8),
    ("DEC_LAYERS", "decoder_layers", 6),
    ("DIM_FEEDFORWARD", "decoder_ffn_dim", 2048),
    ("DROPOUT", "dropout", 0.1),
)
_WEIGHTS = (("NO_OBJECT_WEIGHT", 0.1), ("DICE_WEIGHT", 1.0), ("MASK_WEIGHT", 20.0))


def check_expressible(cfg: CfgNode) -> None:
    """Refuse a model that Hugging Face's MaskFormer has no part for.

    Raises:
        UserError: naming the first such part, its key, and what to do instead.
    """
    model, head, settings = cfg.MODEL, cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    needed: list[tuple[str, Any, tuple[Any, ...], str]] = [
        ("SEM_SEG_HEAD.NAME", head.NAME, ("MaskFormerHead",), "per-pixel heads"),
        (
            "SEM_SEG_HEAD.PIXEL_DECODER_NAME",
            head.PIXEL_DECODER_NAME,
            ("BasePixelDecoder",),
            "transformer encoder in its pixel decoder",
        ),
        ("SEM_SEG_HEAD.NORM", head.NORM, ("GN",), "other norm in its pixel decoder"),
        ("SEM_SEG_HEAD.IN_FEATURES", list(head.IN_FEATURES), (["res2", "res3", "res4", "res5"],), "choice of maps"),
        ("MASK_FORMER.TRANSFORMER_IN_FEATURE", settings.TRANSFORMER_IN_FEATURE, ("res5",), "choice of maps"),
        ("MASK_FORMER.ENC_LAYERS", settings.ENC_LAYERS, (0,), "transformer encoder"),
        ("MASK_FORMER.PRE_NORM", settings.PRE_NORM, (False,), "norms before the sub-layers"),
        ("MASK_FORMER.ENFORCE_INPUT_PROJ", settings.ENFORCE_INPUT_PROJ, (False,), "enforced input projection"),
        ("BACKBONE.NAME", model.BACKBONE.NAME, _backbones(), "such backbone"),
    ]
    if model.BACKBONE.NAME == "D2SwinTransformer":
        needed += [
            ("SWIN.APE", model.SWIN.APE, (False,), "like absolute position embeddings"),
            ("SWIN.PATCH_NORM", model.SWIN.PATCH_NORM, (True,), "patch embedding without a norm"),
            ("SWIN.QK_SCALE", model.SWIN.QK_SCALE, (None,), "scale of queries"),
        ]
    else:
        resnets = model.RESNETS
        needed += [
            ("RESNETS.STEM_TYPE", resnets.STEM_TYPE, ("basic",), "deep stem in its ResNet"),
            ("RESNETS.NORM", resnets.NORM, ("FrozenBN", "BN", "SyncBN"), "other norm in its ResNet"),
            ("RESNETS.RES4_DILATION", resnets.RES4_DILATION, (1,), "dilation in its ResNet"),
            ("RESNETS.RES5_DILATION", resnets.RES5_DILATION, (1,), "dilation in its ResNet"),
            ("RESNETS.RES5_MULTI_GRID", set(resnets.RES5_MULTI_GRID), ({1},), "dilation in its ResNet"),
        ]
    for key, value, possible, what in needed:
        if value not in possible:
            raise UserError(
                f"Hugging Face's MaskFormer has no {what} (MODEL.{key} {value!r}): "
                f"convert it with --to published or --to maskformer"
            )
    if cfg.INPUT.FORMAT != "RGB":
        raise UserError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r} but Hugging Face's MaskFormer gets RGB images: keep ours"
        )


def _backbones() -> tuple[str, ...]:
    return ("build_resnet_backbone", "build_resnet_deeplab_backbone", "D2SwinTransformer")


def model_config(cfg: CfgNode, metadata: Metadata) -> dict[str, Any]:
    """The ``config.json`` of a model that passes `check_expressible`."""
    head, settings = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        swin = cfg.MODEL.SWIN
        # transformers itself turns "swin" into its variant with norms for each map.
        backbone: dict[str, Any] = {"model_type": "swin", **{theirs: _plain(swin[ours]) for ours, theirs, _ in _SWIN}}
    else:
        kind, depths, widths = _RESNETS[cfg.MODEL.RESNETS.DEPTH]
        backbone = {"model_type": "resnet", "layer_type": kind, "depths": depths, "hidden_sizes": widths}
        backbone |= {"embedding_size": 64, "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    decoder = {theirs: settings[ours] for ours, theirs, _ in _DECODER}
    kept = ("name", "classes", "things", "colors", "ignore_label", "evaluators", "dataset_ids", "truth")
    return {
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "model_type": "maskformer",
        "backbone_config": {**backbone, "out_features": _STAGES},
        "decoder_config": {"model_type": "detr", **decoder},
        "fpn_feature_size": head.CONVS_DIM,
        "mask_feature_size": head.MASK_DIM,
        "num_attention_heads": settings.NHEADS,
        "num_hidden_layers": settings.DEC_LAYERS,
        **{key.lower(): settings[key] for key, _ in _WEIGHTS},
        "cross_entropy_weight": 1.0,
        "use_auxiliary_loss": False,
        "id2label": {str(i): name for i, name in enumerate(metadata.classes)},
        "label2id": {name: i for i, name in enumerate(metadata.classes)},
        "dtype": "float32",
        CONFIG_SECTION: {key: getattr(metadata, key) for key in kept},
    }


def preprocessor_config(cfg: CfgNode, metadata: Metadata) -> dict[str, Any]:
    """The ``preprocessor_config.json``: what images go through."""
    return {
        "image_processor_type": "MaskFormerImageProcessor",
        "do_resize": cfg.INPUT.MIN_SIZE_TEST > 0,
        "size": {"shortest_edge": cfg.INPUT.MIN_SIZE_TEST or 800, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        "size_divisor": 32,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value / 255, 6) for value in cfg.MODEL.PIXEL_MEAN],
        "image_std": [round(value / 255, 6) for value in cfg.MODEL.PIXEL_STD],
        "ignore_index": metadata.ignore_label,
        "do_reduce_labels": False,
        "num_labels": metadata.num_classes,
    }


def settings_of(config: Mapping[str, Any], preprocessor: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Our keys and values for a ``config.json`` (and what images go through).

    Raises:
        UserError: it is no MaskFormer, or has parts that ours does not have; `path` is named.
    """
    if config.get("model_type") != "maskformer":
        raise UserError(f"{path} describes a {config.get('model_type')!r}, not a maskformer: name a MaskFormer model")
    decoder = _section(config, "decoder_config", path)
    if decoder.get("model_type", "detr") != "detr":
        raise UserError(f"{path}: decoder_config is a {decoder['model_type']!r}, which MaskFormer here has no part for")
    settings: dict[str, Any] = _backbone_settings(_section(config, "backbone_config", path), path)
    for ours, theirs, default in _DECODER:
        settings[f"MODEL.MASK_FORMER.{ours}"] = decoder.get(theirs, default)
    for key, default in _WEIGHTS:
        settings[f"MODEL.MASK_FORMER.{key}"] = config.get(key.lower(), default)
    settings["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] = len(class_names_of(config, path))
    settings["MODEL.SEM_SEG_HEAD.CONVS_DIM"] = config.get("fpn_feature_size", 256)
    settings["MODEL.SEM_SEG_HEAD.MASK_DIM"] = config.get("mask_feature_size", 256)
    for key, name in {"PIXEL_MEAN": "image_mean", "PIXEL_STD": "image_std"}.items():
        if name in preprocessor:
            settings[f"MODEL.{key}"] = [round(255 * value, 4) for value in preprocessor[name]]
    size = preprocessor.get("size", {})
    sides = size if isinstance(size, Mapping) else {"shortest_edge": size}
    longest = sides.get("longest_edge", preprocessor.get("max_size"))
    if "shortest_edge" in sides:
        settings["INPUT.MIN_SIZE_TEST"] = sides["shortest_edge"]
    if longest is not None:
        settings["INPUT.MAX_SIZE_TEST"] = longest
    return settings


def class_names_of(config: Mapping[str, Any], path: Path) -> list[str]:
    """Names of the classes in their order.

    Raises:
        UserError: there are none, or their numbers have gaps.
    """
    table = config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"})
    try:
        names = {int(number): str(name) for number, name in table.items()}
    except (AttributeError, ValueError) as error:
        raise UserError(f"{path} has a damaged id2label: download or copy it again") from error
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{path}: the numbers of id2label do not run from 0 without a gap: correct them")
    return [names[i] for i in range(len(names))]


def _backbone_settings(backbone: Mapping[str, Any], path: Path) -> dict[str, Any]:
    kind = backbone.get("model_type")
    if kind in ("swin", "maskformer-swin"):
        if backbone.get("use_absolute_embeddings", False):
            raise UserError(f"{path}: use_absolute_embeddings has another meaning here: such a model cannot be read")
        settings = {f"MODEL.SWIN.{ours}": backbone.get(theirs, default) for ours, theirs, default in _SWIN}
        return {"MODEL.BACKBONE.NAME": "D2SwinTransformer", **settings}
    if kind == "resnet":
        _, depths, widths = _RESNETS[50]
        layout = (
            backbone.get("layer_type", "bottleneck"),
            backbone.get("depths", depths),
            backbone.get("hidden_sizes", widths),
        )
        depth = next((known for known, each in _RESNETS.items() if each == layout), None)
        moved = [key for key in ("downsample_in_first_stage", "downsample_in_bottleneck") if backbone.get(key, False)]
        if depth is not None and not moved and backbone.get("embedding_size", 64) == 64:
            return {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.RESNETS.DEPTH": depth}
        raise UserError(f"{path}: its backbone_config is a ResNet of other depths, widths or strides than ours have")
    raise UserError(f"{path}: backbone_config is a {kind!r}: only resnet and swin backbones can be read")


def _section(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise UserError(f"{path} has no {name}: save the model again with a current version of transformers")
    return section


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value

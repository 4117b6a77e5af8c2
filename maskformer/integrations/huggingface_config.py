"""Our configs in Hugging Face's words, and what theirs cannot say; `huggingface_reading` is the way back."""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

from maskformer.checkpoint.metadata import CONFIG_SECTION
from maskformer.config.tree import flatten
from maskformer.data.dataset import Metadata
from maskformer.errors import UserError

STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNETS = {
    18: ("basic", [2, 2, 2, 2], [64, 128, 256, 512]),
    34: ("basic", [3, 4, 6, 3], [64, 128, 256, 512]),
    50: ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
    101: ("bottleneck", [3, 4, 23, 3], [256, 512, 1024, 2048]),
    152: ("bottleneck", [3, 8, 36, 3], [256, 512, 1024, 2048]),
}
# Our key (below MODEL.SWIN), theirs, what they take where a file does not say.
SWIN: tuple[tuple[str, str, Any], ...] = (
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
DECODER: tuple[tuple[str, str, Any], ...] = (
    ("HIDDEN_DIM", "d_model", 256),
    ("NUM_OBJECT_QUERIES", "num_queries", 100),
    ("NHEADS", "decoder_attention_heads", 8),
    ("DEC_LAYERS", "decoder_layers", 6),
    ("DIM_FEEDFORWARD", "decoder_ffn_dim", 2048),
    ("DROPOUT", "dropout", 0.1),
)
WEIGHTS = (("NO_OBJECT_WEIGHT", 0.1), ("DICE_WEIGHT", 1.0), ("MASK_WEIGHT", 20.0))
# Theirs has no word for these, which results depend on; they are kept in a section of ours.
KEPT_SECTION = "config"
KEPT = (
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY",
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON",
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON",
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON",
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD",
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD",
    "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE",
)


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
        ("BACKBONE.NAME", model.BACKBONE.NAME, _backbones(), "such backbone"),
    ]
    if model.BACKBONE.NAME in _backbones() and _res5_channels(cfg) == settings.HIDDEN_DIM:
        # Of other channels they project as well, asked or not.
        enforced = settings.ENFORCE_INPUT_PROJ
        needed.append(("MASK_FORMER.ENFORCE_INPUT_PROJ", enforced, (False,), "input projection that changes no width"))
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


def _res5_channels(cfg: CfgNode) -> int:
    if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        return int(cfg.MODEL.SWIN.EMBED_DIM) * 8
    return RESNETS[cfg.MODEL.RESNETS.DEPTH][2][-1]


def _backbones() -> tuple[str, ...]:
    return ("build_resnet_backbone", "build_resnet_deeplab_backbone", "D2SwinTransformer")


def model_config(cfg: CfgNode, metadata: Metadata) -> dict[str, Any]:
    """The ``config.json`` of a model that passes `check_expressible`."""
    head, settings = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        swin = cfg.MODEL.SWIN
        # transformers itself turns "swin" into its variant with norms for each map.
        backbone: dict[str, Any] = {"model_type": "swin", **{theirs: _plain(swin[ours]) for ours, theirs, _ in SWIN}}
    else:
        kind, depths, widths = RESNETS[cfg.MODEL.RESNETS.DEPTH]
        backbone = {"model_type": "resnet", "layer_type": kind, "depths": depths, "hidden_sizes": widths}
        backbone |= {"embedding_size": 64, "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    decoder = {theirs: settings[ours] for ours, theirs, _ in DECODER}
    kept = ("name", "classes", "things", "colors", "ignore_label", "evaluators", "dataset_ids", "truth")
    return {
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "model_type": "maskformer",
        "backbone_config": {**backbone, "out_features": STAGES},
        "decoder_config": {"model_type": "detr", **decoder},
        "fpn_feature_size": head.CONVS_DIM,
        "mask_feature_size": head.MASK_DIM,
        "num_attention_heads": settings.NHEADS,
        "num_hidden_layers": settings.DEC_LAYERS,
        **{key.lower(): settings[key] for key, _ in WEIGHTS},
        "cross_entropy_weight": 1.0,
        "use_auxiliary_loss": False,
        "id2label": {str(i): name for i, name in enumerate(metadata.classes)},
        "label2id": {name: i for i, name in enumerate(metadata.classes)},
        "dtype": "float32",
        CONFIG_SECTION: {
            **{key: getattr(metadata, key) for key in kept},
            KEPT_SECTION: {key: value for key, value in flatten(cfg) if key in KEPT},
        },
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
        "image_mean": [round(value / 255, 10) for value in cfg.MODEL.PIXEL_MEAN],
        "image_std": [round(value / 255, 10) for value in cfg.MODEL.PIXEL_STD],
        "ignore_index": metadata.ignore_label,
        "do_reduce_labels": False,
        "num_labels": metadata.num_classes,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value

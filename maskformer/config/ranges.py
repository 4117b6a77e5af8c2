"""What values each key may have, as far as one key alone decides it."""

from __future__ import annotations

from typing import Any

CHOICES: dict[str, tuple[Any, ...]] = {
    "MODEL.META_ARCHITECTURE": ("MaskFormer", "SemanticSegmentor"),
    "MODEL.BACKBONE.NAME": ("build_resnet_backbone", "build_resnet_deeplab_backbone", "D2SwinTransformer", "timm"),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.STEM_TYPE": ("basic", "deeplab"),
    "MODEL.RESNETS.NORM": ("FrozenBN", "BN", "SyncBN", "GN"),
    "MODEL.SEM_SEG_HEAD.NORM": ("GN", "BN", "SyncBN", "FrozenBN", ""),
    "MODEL.SEM_SEG_HEAD.NAME": ("MaskFormerHead", "PerPixelBaselineHead", "PerPixelBaselinePlusHead"),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": (4,),
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": ("BasePixelDecoder", "TransformerEncoderPixelDecoder"),
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": ("res2", "res3", "res4", "res5", "transformer_encoder"),
    "MODEL.MASK_FORMER.MATCHER": ("hungarian", "fixed"),
    "INPUT.DATASET_MAPPER_NAME": (
        "mask_former_semantic",
        "mask_former_panoptic",
        "mask_former_instance",
        "detr_panoptic",
    ),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.CROP.TYPE": ("absolute", "absolute_range", "relative", "relative_range"),
    "SOLVER.OPTIMIZER": ("ADAMW", "SGD"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupPolyLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "value", "norm"),
    "SOLVER.LOSS_NORMALIZER": ("global", "rank"),
    "SOLVER.AMP.DTYPE": ("auto", "float16", "bfloat16"),
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
}

LENGTHS: dict[str, int] = {
    "MODEL.PIXEL_MEAN": 3,
    "MODEL.PIXEL_STD": 3,
    "MODEL.SWIN.DEPTHS": 4,
    "MODEL.SWIN.NUM_HEADS": 4,
    "INPUT.CROP.SIZE": 2,
}

STEM_CHANNELS = {"basic": 64, "deeplab": 128}
"""Channels after the stem of a ResNet by its type."""

# Bounds hold for every element of a list.
POSITIVE = (
    *("MODEL.PIXEL_STD", "MODEL.RESNETS.RES4_DILATION", "MODEL.RESNETS.RES5_DILATION", "MODEL.RESNETS.RES5_MULTI_GRID"),
    *("MODEL.SWIN.PRETRAIN_IMG_SIZE", "MODEL.SWIN.PATCH_SIZE", "MODEL.SWIN.EMBED_DIM", "MODEL.SWIN.DEPTHS"),
    *("MODEL.SWIN.NUM_HEADS", "MODEL.SWIN.WINDOW_SIZE", "MODEL.SWIN.MLP_RATIO"),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "MODEL.SEM_SEG_HEAD.MASK_DIM"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "MODEL.MASK_FORMER.NHEADS"),
    # Without a weight for "no object", the class loss of a batch without segments would be 0 / 0.
    *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", "MODEL.MASK_FORMER.DEC_LAYERS", "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT"),
    *("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST", "INPUT.CROP.SIZE"),
    *("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", "DATALOADER.PREFETCH_FACTOR"),
    *("SOLVER.BASE_LR", "SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.GAMMA"),
    *("SOLVER.POLY_LR_POWER", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "SOLVER.CLIP_GRADIENTS.NORM_TYPE"),
    *("SOLVER.CHECKPOINT_PERIOD", "TEST.IMS_PER_BATCH", "LOG_PERIOD", "DISTRIBUTED_TIMEOUT"),
)
NOT_NEGATIVE = (
    *("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    *("MODEL.MASK_FORMER.DICE_WEIGHT", "MODEL.MASK_FORMER.MASK_WEIGHT"),
    *("MODEL.MASK_FORMER.ENC_LAYERS", "INPUT.MIN_SIZE_TEST", "DATALOADER.NUM_WORKERS"),
    *("SOLVER.BACKBONE_MULTIPLIER", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_EMBED"),
    *("SOLVER.WARMUP_ITERS", "TEST.EVAL_PERIOD", "TEST.PICTURES", "CHECKPOINT.KEEP_LAST"),
    *("SOLVER.MAX_IMS_PER_DEVICE", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.EARLY_STOPPING.PATIENCE"),
    "SOLVER.EARLY_STOPPING.MIN_DELTA",
)
SHARES = (  # [0, 1]
    *("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD"),
    *("SOLVER.POLY_LR_CONSTANT_ENDING", "SOLVER.WARMUP_FACTOR", "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA"),
    "DATALOADER.REPEAT_THRESHOLD",
)
RATES = (  # [0, 1)
    *("MODEL.SWIN.DROP_RATE", "MODEL.SWIN.ATTN_DROP_RATE", "MODEL.SWIN.DROP_PATH_RATE", "MODEL.MASK_FORMER.DROPOUT"),
    *("SOLVER.MOMENTUM", "SOLVER.EMA.DECAY"),
)
NOT_EMPTY = (
    *("MODEL.RESNETS.RES5_MULTI_GRID", "MODEL.SEM_SEG_HEAD.IN_FEATURES"),
    *("INPUT.MIN_SIZE_TRAIN", "OUTPUT_DIR"),
)

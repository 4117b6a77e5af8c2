"""Every key of a config that the code reads, with its default.

Keys marked *published* have the spelling, meaning and default of the published recipes' framework; where the recipes
always name a key themselves, the default is their common value. Keys marked *ours* exist only here. Published keys that
nothing reads live in :mod:`maskformer.config.compat`. A range is stated as in mathematics: ``[0, 1)`` excludes 1.
"""

from __future__ import annotations

from typing import Any

RESNETS: dict[str, Any] = {
    "DEPTH": 50,  # 18, 34, 50, 101 or 152 layers. Published.
    "STEM_TYPE": "basic",  # "basic": one 7x7 convolution; "deeplab": three 3x3 (R101c). Published.
    "NORM": "FrozenBN",  # "FrozenBN" (batch norm with constant statistics and scales), "BN", "SyncBN", "GN". Published.
    "RES4_DILATION": 1,  # dilation of res4's 3x3 convolutions; 1 keeps stride 16. Published.
    "RES5_DILATION": 1,  # dilation of res5's 3x3 convolutions; 1 keeps stride 32. Published.
    "RES5_MULTI_GRID": [1, 1, 1],  # dilations of res5's three blocks, [1, 2, 4] for R101c. Published.
}

SWIN: dict[str, Any] = {
    "PRETRAIN_IMG_SIZE": 224,  # side in pixels of the pre-training images; sizes the APE table. Published.
    "PATCH_SIZE": 4,  # side of a patch in pixels. Published.
    "EMBED_DIM": 96,  # channels of the first stage, doubled at every next one. Published.
    "DEPTHS": [2, 2, 6, 2],  # blocks of each of the four stages. Published.
    "NUM_HEADS": [3, 6, 12, 24],  # attention heads of each stage. Published.
    "WINDOW_SIZE": 7,  # side of an attention window in patches. Published.
    "MLP_RATIO": 4.0,  # width of a block's MLP over its channels, > 0. Published.
    "QKV_BIAS": True,  # biases on query, key and value. Published.
    "QK_SCALE": None,  # factor on the queries; None: head width to the power -1/2. Published.
    "DROP_RATE": 0.0,  # dropout after embedding, projections and MLP, [0, 1). Published.
    "ATTN_DROP_RATE": 0.0,  # dropout on attention weights, [0, 1). Published.
    "DROP_PATH_RATE": 0.3,  # stochastic depth of the last block (rises linearly from 0), [0, 1). Published.
    "APE": False,  # absolute position embeddings. Published.
    "PATCH_NORM": True,  # LayerNorm after the patch embedding. Published.
}

TIMM: dict[str, Any] = {
    "NAME": "",  # a timm model with features_only, for MODEL.BACKBONE.NAME "timm". Ours.
    "PRETRAINED": False,  # start from timm's pre-trained weights (downloads them). Ours.
}

SEM_SEG_HEAD: dict[str, Any] = {
    "NAME": "MaskFormerHead",  # "MaskFormerHead", "PerPixelBaselineHead", "PerPixelBaselinePlusHead". Published.
    "IN_FEATURES": ["res2", "res3", "res4", "res5"],  # maps the pixel decoder joins, finest first. Published.
    "IGNORE_VALUE": 255,  # label of unsupervised pixels in label maps, no class. Published.
    "NUM_CLASSES": 150,  # K, classes without "no object"; > 0. Published.
    "COMMON_STRIDE": 4,  # stride of the logits over the image; 4 is the one there is. Published.
    "LOSS_WEIGHT": 1.0,  # weight of the per-pixel cross-entropy, >= 0. Published.
    "CONVS_DIM": 256,  # channels inside the pixel decoder. Published.
    "MASK_DIM": 256,  # channels of per-pixel and mask embeddings. Published.
    "NORM": "GN",  # pixel decoder's: "GN" (32 groups), "BN", "SyncBN", "FrozenBN", "" (none, but biases). Published.
    "PIXEL_DECODER_NAME": "BasePixelDecoder",  # "BasePixelDecoder" (FPN), "TransformerEncoderPixelDecoder". Published.
    "TRANSFORMER_ENC_LAYERS": 0,  # layers of TransformerEncoderPixelDecoder's encoder. Published.
}

MASK_FORMER: dict[str, Any] = {
    "TRANSFORMER_IN_FEATURE": "res5",  # map the transformer reads: "res2" ... "res5", "transformer_encoder". Published.
    "DEEP_SUPERVISION": True,  # a loss after every decoder layer. Published.
    "NO_OBJECT_WEIGHT": 0.1,  # weight of "no object" in the class loss, > 0. Published.
    "DICE_WEIGHT": 1.0,  # weight of the dice loss and of its matching cost, >= 0. Published.
    "MASK_WEIGHT": 20.0,  # weight of the focal loss and of its matching cost, >= 0. Published.
    "MATCHER": "hungarian",  # "hungarian": cheapest assignment; "fixed": query i explains class i (Q = K). Ours.
    "HIDDEN_DIM": 256,  # channels of the transformer. Published.
    "NUM_OBJECT_QUERIES": 100,  # Q, > 0. Published.
    "NHEADS": 8,  # attention heads; divides HIDDEN_DIM. Published.
    "DROPOUT": 0.1,  # in the transformer, [0, 1). Published.
    "DIM_FEEDFORWARD": 2048,  # width of the transformer's feed-forward layers. Published.
    "ENC_LAYERS": 0,  # encoder layers before the transformer decoder. Published.
    "DEC_LAYERS": 6,  # decoder layers, >= 1. Published.
    "PRE_NORM": False,  # normalise before (True) or after (False) each transformer sub-layer. Published.
    "ENFORCE_INPUT_PROJ": False,  # 1x1 projection before the transformer even if channels fit. Published.
    "SIZE_DIVISIBILITY": 32,  # batches are padded to a multiple; 0: not at all, -1: the backbone's own. Published.
    "TEST": {
        "SEMANTIC_ON": True,  # return semantic scores. Ours.
        "PANOPTIC_ON": False,  # return a panoptic segmentation (per-pixel models: connected regions). Published.
        "INSTANCE_ON": False,  # return instances. Ours.
        "OBJECT_MASK_THRESHOLD": 0.0,  # panoptic: queries at or below this class probability are left out. Published.
        "OVERLAP_THRESHOLD": 0.0,  # panoptic: share of a mask that must stay visible, [0, 1]. Published.
        "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,  # resize mask logits instead of scores. Published.
    },
}

MODEL: dict[str, Any] = {
    "DEVICE": "auto",  # "auto" (CUDA or else CPU), "cpu", "cuda", "cuda:N", "mps". Published, "auto" is ours.
    "WEIGHTS": "",  # file, folder or address to start from, "" for random weights. Published.
    "WEIGHTS_MIN_FIT": 0.9,  # share of a part that must fit, or WEIGHTS is refused; 0: takes what fits. Ours.
    "META_ARCHITECTURE": "MaskFormer",  # "MaskFormer", "SemanticSegmentor" (per-pixel baselines). Published.
    "CHANNELS_LAST": True,  # convolutions in channels-last memory; same numbers but for rounding. Ours.
    "PIXEL_MEAN": [123.675, 116.28, 103.53],  # subtracted per channel, in INPUT.FORMAT order, 0-255. Published.
    "PIXEL_STD": [58.395, 57.12, 57.375],  # divided by per channel, > 0. Published.
    "SYNC_BN": False,  # batch norms in training use the statistics of all processes (CUDA). Ours.
    "BACKBONE": {
        "NAME": "build_resnet_backbone",  # also "build_resnet_deeplab_backbone", "D2SwinTransformer", "timm" (ours).
        "FREEZE_AT": 0,  # parts not trained: 0 none, 1 the stem, 2 also res2, ... 5 all of it. Published.
        "GRADIENT_CHECKPOINTING": False,  # compute activations again in the backward pass, to save memory. Ours.
    },
    "RESNETS": RESNETS,
    "SWIN": SWIN,
    "TIMM": TIMM,
    "SEM_SEG_HEAD": SEM_SEG_HEAD,
    "MASK_FORMER": MASK_FORMER,
}

INPUT: dict[str, Any] = {
    "DATASET_MAPPER_NAME": "mask_former_semantic",  # "mask_former_panoptic", "detr_panoptic", or one of ours,
    # ^ "mask_former_instance". Published.
    "FORMAT": "RGB",  # order of the image's channels: "RGB" or "BGR". Published.
    "MIN_SIZE_TRAIN": [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024],
    # ^ shorter side in pixels: choices, or two ends of a range. Published.
    "MIN_SIZE_TRAIN_SAMPLING": "choice",  # "choice": one of the sizes; "range": between the two, inclusive. Published.
    "MAX_SIZE_TRAIN": 1333,  # limit of the longer side in pixels. Published.
    "MIN_SIZE_TEST": 800,  # shorter side in pixels; 0: not resized. Published.
    "MAX_SIZE_TEST": 1333,  # limit of the longer side in pixels. Published.
    "CROP": {
        "ENABLED": False,  # random crop in training. Published.
        "TYPE": "relative_range",  # "absolute", "absolute_range", "relative", "relative_range". Published.
        "SIZE": [0.9, 0.9],  # (height, width): pixels if absolute, else shares of the image in (0, 1]. Published.
        "SINGLE_CATEGORY_MAX_AREA": 1.0,  # try again if one class covers as much, (0, 1]; 1: never. Published.
    },
    "COLOR_AUG_SSD": False,  # SSD's colour distortion. Published.
    "SIZE_DIVISIBILITY": -1,  # side in pixels of the square training canvas; not positive: none. Published.
    "KEEP_EMPTY_SEGMENTS": False,  # train on segments that a crop left without pixels, as published. Ours.
}

DATASETS: dict[str, Any] = {
    "TRAIN": (),  # names of the data sets to train on. Published.
    "TEST": (),  # names of the data sets to evaluate on. Published.
}

DATALOADER: dict[str, Any] = {
    "NUM_WORKERS": 4,  # worker processes per training process; 0: none. Published.
    "PREFETCH_FACTOR": 2,  # batches that each worker prepares ahead, >= 1. Ours.
    "FILTER_EMPTY_ANNOTATIONS": True,  # train without images whose record lists no segment but crowds. Published.
    "ASPECT_RATIO_GROUPING": True,  # batches of landscape or of other images only. Published.
    "SAMPLER_TRAIN": "TrainingSampler",  # "RepeatFactorTrainingSampler": rare classes come more often. Published.
    "REPEAT_THRESHOLD": 0.0,  # share of images below which a class counts as rare, [0, 1]. Published.
}

SOLVER: dict[str, Any] = {
    "OPTIMIZER": "ADAMW",  # "ADAMW" or "SGD". Published.
    "BASE_LR": 0.0001,  # learning rate after warm-up, > 0. Published.
    "BACKBONE_MULTIPLIER": 0.1,  # factor on the backbone's learning rate, >= 0. Published.
    "MOMENTUM": 0.9,  # of SGD, [0, 1). Published.
    "NESTEROV": False,  # Nesterov momentum in SGD. Published.
    "WEIGHT_DECAY": 0.0001,  # of all parameters but those below, >= 0. Published.
    "WEIGHT_DECAY_NORM": 0.0,  # of normalisation layers, >= 0. Published.
    "WEIGHT_DECAY_EMBED": 0.0,  # of embeddings (the queries), >= 0. Published.
    "LR_MULTIPLIERS": [],  # [[part of the model, factor >= 0], ...] on learning rates; factors multiply. Ours.
    "IMS_PER_BATCH": 16,  # images per iteration over all processes, > 0. Published.
    "MAX_IMS_PER_DEVICE": 0,  # images in one forward pass of a process; more are accumulated. 0: no limit. Ours.
    "REFERENCE_WORLD_SIZE": 0,  # processes that batch, lr, lengths are meant for; scaled to others. 0: no. Published.
    "MAX_ITER": 160000,  # iterations, > 0. Published.
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",  # "WarmupMultiStepLR" or "WarmupPolyLR". Published.
    "STEPS": (30000,),  # iterations at which the rate is multiplied by GAMMA, ascending. Published.
    "GAMMA": 0.1,  # of WarmupMultiStepLR, > 0. Published.
    "POLY_LR_POWER": 0.9,  # exponent of WarmupPolyLR, > 0. Published.
    "POLY_LR_CONSTANT_ENDING": 0.0,  # WarmupPolyLR never falls below this share of the rate, [0, 1]. Published.
    "WARMUP_METHOD": "linear",  # "linear" or "constant". Published.
    "WARMUP_FACTOR": 1.0,  # the rate's factor at iteration 0, [0, 1]. Published.
    "WARMUP_ITERS": 0,  # iterations of warm-up, >= 0. Published.
    "CLIP_GRADIENTS": {
        "ENABLED": True,  # clip gradients. Published.
        "CLIP_TYPE": "full_model",  # "full_model": norm of all gradients; "value", "norm": per parameter. Published.
        "CLIP_VALUE": 0.01,  # the limit, > 0. Published.
        "NORM_TYPE": 2.0,  # p of the norm, > 0. Published.
    },
    "AMP": {
        "ENABLED": False,  # mixed precision. Published.
        "DTYPE": "auto",  # "float16", "bfloat16", "auto" (float16 on CUDA, bfloat16 elsewhere). Ours.
    },
    "EMA": {
        "ENABLED": False,  # keep a moving average of the weights, evaluate it and save it beside them. Ours.
        "DECAY": 0.9998,  # of the average in each iteration (less in the first ones), [0, 1). Ours.
    },
    "EARLY_STOPPING": {
        "PATIENCE": 0,  # stop after so many evaluations without a better CHECKPOINT.BEST_METRIC; 0: never. Ours.
        "MIN_DELTA": 0.0,  # how much better counts as better, >= 0. Ours.
    },
    "CHECKPOINT_PERIOD": 5000,  # iterations between checkpoints, > 0. Published.
    "LOSS_NORMALIZER": "global",  # sums over "global" (all processes, micro-batches) or "rank" (as published). Ours.
}

TEST: dict[str, Any] = {
    "EVAL_PERIOD": 0,  # iterations between evaluations; 0: only at the end. Published.
    "IMS_PER_BATCH": 1,  # images per evaluation step; only equal sizes share one. Ours.
    "PICTURES": 4,  # truth | prediction pictures that each evaluation saves, >= 0. Ours.
    "PQ_STUFF": True,  # also measure PQ^St of semantic results: each class of an image is one segment. Ours.
    "AUG": {
        "ENABLED": False,  # the last evaluation also averages semantic scores over scales and mirrors. Published.
        "MIN_SIZES": [400, 500, 600, 700, 800, 900, 1000, 1100, 1200],  # shorter sides in pixels. Published.
        "MAX_SIZE": 4000,  # limit of the longer side in pixels. Published.
        "FLIP": True,  # each size mirrored too. Published.
    },
}

DEFAULTS: dict[str, Any] = {
    "MODEL": MODEL,
    "INPUT": INPUT,
    "DATASETS": DATASETS,
    "DATALOADER": DATALOADER,
    "SOLVER": SOLVER,
    "TEST": TEST,
    "CHECKPOINT": {
        "KEEP_LAST": 0,  # how many periodic checkpoints stay; 0: all. Ours.
        "BEST_METRIC": "",  # score whose best weights are kept as model_best.pth, such as "sem_seg/mIoU". Ours.
    },
    "OUTPUT_DIR": "./output",  # everything a run writes goes here. Published.
    "SEED": -1,  # of weights, order and augmentation; negative: drawn anew. Published.
    "DETERMINISTIC": False,  # same bits on CUDA at the price of speed. Ours.
    "CUDNN_BENCHMARK": False,  # let cuDNN time its algorithms; pays for fixed sizes. Published.
    "LOG_PERIOD": 20,  # iterations between log lines, > 0. Ours.
    "WANDB_PROJECT": "",  # Weights & Biases project that curves and pictures also go to; "": none. Ours.
    "DISTRIBUTED_TIMEOUT": 1800,  # seconds that a process waits for the others before the run ends, > 0. Ours.
}

# What a key may hold where its default does not show it.
TYPE_WHERE_NONE: dict[str, type] = {"MODEL.SWIN.QK_SCALE": float, "SOLVER.WEIGHT_DECAY_BIAS": float}
ELEMENT_TYPE_WHERE_EMPTY: dict[str, type] = {
    "DATASETS.TRAIN": str,
    "DATASETS.TEST": str,
    "TEST.EXPECTED_RESULTS": list,
    "SOLVER.LR_MULTIPLIERS": list,
}

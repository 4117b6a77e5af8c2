"""The quickstart as a LazyConfig of Detectron2: every part of the model named, none of them read from YAML keys.

Run with ``tools/lazyconfig_train_net.py`` of Detectron2's source, see docs/detectron2.md.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.modeling.backbone.resnet import BasicStem, ResNet

from maskformer.data.recipes import ResizeCropMirror, TestRecipe, TrainingRecipe
from maskformer.data.transforms import ResizeRule
from maskformer.engine.schedule import poly, warmup
from maskformer.evaluation import PanopticEvaluator, SemSegEvaluator
from maskformer.integrations.detectron2 import (
    BasePixelDecoder,
    MaskFormer,
    MaskFormerEvaluator,
    MaskFormerHead,
    MaskFormerMapper,
)
from maskformer.integrations.detectron2.catalog import get_metadata
from maskformer.integrations.detectron2.lazy import ClippingAdamW, IterationFactor, list_records, optimizer_groups
from maskformer.modeling.criterion import MaskCriterion
from maskformer.modeling.heads import MaskClassificationHead
from maskformer.modeling.matcher import HungarianMatcher
from maskformer.modeling.pixel_decoders import FPNPixelDecoder

QUERIES, MASK_DIM, SIDE = 20, 64, 128
TRAIN, TEST = "shapes_panoptic_train", "shapes_panoptic_val"
ITERATIONS = 900
BASE_LR = 0.0007
CLASSES = get_metadata(TRAIN)  # comes with the package; no picture is drawn for it

model = L(MaskFormer)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
        stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
        out_features=["res2", "res3", "res4", "res5"],
    ),
    sem_seg_head=L(MaskFormerHead)(
        pixel_decoder=L(BasePixelDecoder)(
            native=L(FPNPixelDecoder)(
                channels={"res2": 64, "res3": 128, "res4": 256, "res5": 512}, conv_dim=64, mask_dim=MASK_DIM
            )
        ),
        predictor=L(MaskClassificationHead)(
            in_channels=256,
            num_classes=CLASSES.num_classes,
            num_queries=QUERIES,
            hidden_dim=128,
            mask_dim=MASK_DIM,
            num_heads=4,
            feedforward=512,
            dec_layers=3,
            dropout=0.0,
        ),
        transformer_in_feature="res4",
    ),
    criterion=L(MaskCriterion)(
        num_classes=CLASSES.num_classes,
        num_queries=QUERIES,
        matcher=L(HungarianMatcher)(mask_weight=20.0, dice_weight=1.0),
        mask_weight=20.0,
        dice_weight=1.0,
    ),
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    size_divisibility=32,
    things=CLASSES.things,
    panoptic_on=True,
    object_mask_threshold=0.5,
    overlap_threshold=0.5,
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(list_records)(name=TRAIN, count=2000),
        mapper=L(MaskFormerMapper)(
            recipe=L(TrainingRecipe)(
                task="panoptic",
                metadata=L(get_metadata)(name=TRAIN),
                image_format="RGB",
                plan=L(ResizeCropMirror)(resize=L(ResizeRule)(sizes=[SIDE], longest=SIDE), crop=None),
                colors=False,
                canvas=SIDE,
                keep_empty=False,
            )
        ),
        total_batch_size=16,
        num_workers=1,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(list_records)(name=TEST),
        mapper=L(MaskFormerMapper)(
            recipe=L(TestRecipe)(metadata=L(get_metadata)(name=TEST), image_format="RGB", shorter=SIDE, longest=SIDE)
        ),
        num_workers=1,
    ),
    "evaluator": L(MaskFormerEvaluator)(
        evaluators=[
            L(SemSegEvaluator)(class_names=CLASSES.classes, ignore_label=CLASSES.ignore_label),
            L(PanopticEvaluator)(class_names=CLASSES.classes, things=CLASSES.things),
        ],
        records=L(list_records)(name=TEST),
    ),
}

optimizer = L(ClippingAdamW)(
    # Detectron2's script puts the model here.
    params=L(optimizer_groups)(base_lr=BASE_LR, backbone_multiplier=1.0, weight_decay=0.0001),
    lr=BASE_LR,
    clip_norm=0.01,
)

lr_multiplier = L(IterationFactor)(
    factor=L(poly)(
        max_iterations="${train.max_iter}",
        power=0.9,
        constant_ending=0.0,
        warmup_at=L(warmup)(method="linear", factor=0.01, iterations=50),
    ),
    iterations="${train.max_iter}",
)

train = {
    "output_dir": "./output/quickstart_lazy",
    "init_checkpoint": "",
    "max_iter": ITERATIONS,
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 300, "max_to_keep": 100},
    "eval_period": 0,
    "log_period": 20,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "seed": 1,
}

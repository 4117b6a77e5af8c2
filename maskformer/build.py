"""The one place that joins config, data-set metadata and modules: `build_model` and `load_model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from maskformer.checkpoint import checkpoint_metadata, load_weights
from maskformer.config import get_cfg
from maskformer.data.catalog import Metadata, get_metadata
from maskformer.device import resolve_device
from maskformer.distributed import world_size
from maskformer.errors import UserError
from maskformer.modeling.criterion import MaskCriterion, PixelCriterion
from maskformer.modeling.layers import synchronize_batch_norms, trained_batch_norms
from maskformer.modeling.matcher import FixedMatcher, HungarianMatcher
from maskformer.modeling.meta_arch import MaskFormer, SemanticSegmentor
from maskformer.modeling.network import build_network


def build_matcher(cfg: CfgNode) -> HungarianMatcher | FixedMatcher:
    """The matcher that ``MODEL.MASK_FORMER.MATCHER`` names.

    Raises:
        UserError: if fixed matching is asked for and there is not one query per class.
    """
    settings = cfg.MODEL.MASK_FORMER
    if settings.MATCHER == "hungarian":
        return HungarianMatcher(mask_weight=settings.MASK_WEIGHT, dice_weight=settings.DICE_WEIGHT)
    queries, classes = settings.NUM_OBJECT_QUERIES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if queries != classes:
        raise UserError(
            "MODEL.MASK_FORMER.MATCHER 'fixed' needs one query per class, but MODEL.MASK_FORMER.NUM_OBJECT_QUERIES "
            f"is {queries} and MODEL.SEM_SEG_HEAD.NUM_CLASSES is {classes}; make them equal"
        )
    return FixedMatcher()


def build_criterion(cfg: CfgNode) -> MaskCriterion | PixelCriterion:
    """The training objective of ``MODEL.META_ARCHITECTURE``."""
    head = cfg.MODEL.SEM_SEG_HEAD
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        return PixelCriterion(
            ignore_label=head.IGNORE_VALUE,
            stride=head.COMMON_STRIDE,
            loss_weight=head.LOSS_WEIGHT,
            normalizer=cfg.SOLVER.LOSS_NORMALIZER,
        )
    settings = cfg.MODEL.MASK_FORMER
    return MaskCriterion(
        num_classes=head.NUM_CLASSES,
        num_queries=settings.NUM_OBJECT_QUERIES,
        matcher=build_matcher(cfg),
        no_object_weight=settings.NO_OBJECT_WEIGHT,
        mask_weight=settings.MASK_WEIGHT,
        dice_weight=settings.DICE_WEIGHT,
        normalizer=cfg.SOLVER.LOSS_NORMALIZER,
    )


def thing_flags(cfg: CfgNode, metadata: Metadata | None) -> tuple[bool, ...]:
    """Which classes are countable, from the data set that the model is trained on.

    Raises:
        UserError: if panoptic or instance results are asked for and nothing says which classes are countable.
    """
    test = cfg.MODEL.MASK_FORMER.TEST
    if metadata is None and cfg.DATASETS.TRAIN:
        metadata = get_metadata(cfg.DATASETS.TRAIN[0])
    if metadata is not None:
        return tuple(metadata.things)
    if test.PANOPTIC_ON or test.INSTANCE_ON:
        raise UserError(
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON or INSTANCE_ON needs to know which classes are things; "
            "name the training data set in DATASETS.TRAIN"
        )
    return ()


def build_model(cfg: CfgNode, metadata: Metadata | None = None) -> MaskFormer | SemanticSegmentor:
    """The meta-architecture of a config with random weights, on ``cfg.MODEL.DEVICE``, in training mode.

    Args:
        cfg: see `maskformer.get_cfg`.
        metadata: of the data set; None takes the catalog's, by ``cfg.DATASETS.TRAIN[0]`` (class tables, no images
            needed).

    Raises:
        UserError: if the config or the data set cannot make a model.
    """
    return assemble_model(cfg, metadata).to(resolve_device(cfg.MODEL.DEVICE))


def assemble_model(cfg: CfgNode, metadata: Metadata | None = None) -> MaskFormer | SemanticSegmentor:
    """As `build_model`, on torch's default device: under ``torch.device("meta")`` it costs neither memory nor time."""
    things = thing_flags(cfg, metadata)
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if things and len(things) != classes:
        name = cfg.DATASETS.TRAIN[0] if metadata is None else metadata.name
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {classes}, but {name} has {len(things)} classes; "
            f"set the key to {len(things)}"
        )
    network = build_network(cfg)
    divisibility = _backbone_divisibility(network)
    model: MaskFormer | SemanticSegmentor
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        model = SemanticSegmentor(network=network, size_divisibility=divisibility, **_common_options(cfg, things))
    else:
        model = MaskFormer(network=network, **mask_former_options(cfg, things, divisibility))
    return model


def mask_former_options(cfg: CfgNode, things: Sequence[bool], backbone_divisibility: int) -> dict[str, Any]:
    """What the config says of a `MaskFormer`, as its arguments: all but the network.

    Args:
        cfg: see `maskformer.get_cfg`.
        things: for each class, whether it is countable.
        backbone_divisibility: what the backbone's image sides should be a multiple of.

    Raises:
        UserError: if the criterion cannot be built.
    """
    test, divisibility = cfg.MODEL.MASK_FORMER.TEST, cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    return {
        "size_divisibility": backbone_divisibility if divisibility < 0 else divisibility,
        "object_mask_threshold": test.OBJECT_MASK_THRESHOLD,
        "overlap_threshold": test.OVERLAP_THRESHOLD,
        "resize_before_inference": test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE,
        **_common_options(cfg, things),
    }


def _common_options(cfg: CfgNode, things: Sequence[bool]) -> dict[str, Any]:
    test = cfg.MODEL.MASK_FORMER.TEST
    return {
        "criterion": build_criterion(cfg),
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "things": things,
        "semantic_on": test.SEMANTIC_ON,
        "panoptic_on": test.PANOPTIC_ON,
        "instance_on": test.INSTANCE_ON,
        "channels_last": cfg.MODEL.CHANNELS_LAST,
    }


def synchronize_norms(cfg: CfgNode, model: nn.Module, device: torch.device) -> None:
    """Make trained batch norms use the images of all processes, as ``MODEL.SYNC_BN`` says.

    For training: one process, and evaluation, have nothing to synchronise.

    Args:
        cfg: of the run.
        model: changed in place; names stay.
        device: where it trains.

    Raises:
        UserError: if batch norms are to be synchronised where torch cannot.
    """
    if world_size() == 1:
        return
    if cfg.MODEL.SYNC_BN:
        synchronize_batch_norms(model)
    synchronized = [name for name, n in trained_batch_norms(model).items() if isinstance(n, nn.SyncBatchNorm)]
    if synchronized and device.type != "cuda":
        if cfg.MODEL.SYNC_BN:
            key, remedy = "MODEL.SYNC_BN True", "set it to False"
        else:
            part = "RESNETS" if "backbone" in synchronized[0].split(".") else "SEM_SEG_HEAD"
            key, remedy = f"MODEL.{part}.NORM 'SyncBN'", "use BN or GN"
        raise UserError(
            f"{key} cannot synchronise the batch norms of {world_size()} processes on MODEL.DEVICE {device.type}: "
            f"{remedy}, or train on GPUs"
        )


def build_model_to_fill(cfg: CfgNode, metadata: Metadata | None = None) -> MaskFormer | SemanticSegmentor:
    """As `build_model`, for a model that gets all its weights from a file: pretrained ones are not fetched first."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False
    return build_model(cfg, metadata)


def _backbone_divisibility(network: nn.Module) -> int:
    backbone: Any = network.backbone
    return int(backbone.size_divisibility)


def load_model(
    config_file: str, weights: str | None = None, overrides: Sequence[str] = ()
) -> MaskFormer | SemanticSegmentor:
    """A model ready to predict: config, weights and evaluation mode.

    Which classes are things comes from the weight file if it is a checkpoint, so that its data set need not be there.

    Args:
        config_file: a YAML file, or the path of one that comes with the package, such as
            ``configs/ade20k-150/maskformer_R50_bs16_160k.yaml``.
        weights: path or address of a weight file of any family that `load_weights` reads; None takes ``MODEL.WEIGHTS``.
        overrides: ``KEY, VALUE, …`` as on the command line.

    Raises:
        UserError: if config or weights cannot be used.
    """
    cfg = get_cfg(config_file, overrides)
    source = weights or cfg.MODEL.WEIGHTS
    if not source:
        raise UserError(f"load_model got no weights and MODEL.WEIGHTS of {config_file} is empty; name a weight file")
    model = build_model_to_fill(cfg, checkpoint_metadata(source))
    load_weights(model, source, strict=True)
    return model.eval()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trained and of frozen parameters (buffers such as frozen batch norm are neither)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained

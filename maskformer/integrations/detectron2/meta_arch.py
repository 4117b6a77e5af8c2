"""The meta-architecture MaskFormer of Detectron2: ours, with parts from Detectron2's registries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_sem_seg_head
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import Tensor, nn

from maskformer.build import mask_former_options, thing_flags
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import catalog
from maskformer.integrations.detectron2.backbones import (
    Detectron2Backbone,
    check_keys,
    detectron2_backbone,
    output_shape,
)
from maskformer.integrations.detectron2.heads import PerPixelBaselineHead, PerPixelBaselinePlusHead
from maskformer.integrations.detectron2.normalizers import over_all_processes, share_of_mean
from maskformer.integrations.detectron2.results import to_detectron2
from maskformer.integrations.detectron2.supervision import segment_map
from maskformer.integrations.detectron2.weights import rename_native
from maskformer.modeling import meta_arch
from maskformer.modeling.criterion import LossNormalizers
from maskformer.structures import MaskPredictions

Sample = Mapping[str, Any]
PER_PIXEL = (PerPixelBaselineHead, PerPixelBaselinePlusHead, SemSegFPNHead)


class BackboneAndHead(nn.Module):
    """The pure network that Detectron2's two parts make together.

    Args:
        backbone: Detectron2's interface.
        sem_seg_head: feature maps → predictions.
    """

    def __init__(self, backbone: nn.Module, sem_seg_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head

    def forward(self, images: Tensor) -> MaskPredictions:
        """(B, 3, H, W) normalised images → predictions."""
        predictions: MaskPredictions = self.sem_seg_head(self.backbone(images))
        return predictions


@META_ARCH_REGISTRY.register()
class MaskFormer(meta_arch.MaskFormer):
    """Our meta-architecture at Detectron2's border: its samples in, its results out, published names in state dicts.

    Args:
        backbone: Detectron2's interface.
        sem_seg_head: feature maps → `MaskPredictions`.
        ignore_label: value of unsupervised pixels in ``sem_seg`` of samples.
        keep_empty: train on instances without pixels as empty masks.
        square_size: side of the square that batches are padded to; 0: none.
        **options: of our class, all but ``network``.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        ignore_label: int = 255,
        keep_empty: bool = False,
        square_size: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(network=BackboneAndHead(backbone, sem_seg_head), **options)
        self.ignore_label = ignore_label
        self.keep_empty = keep_empty
        self.square_size = square_size
        # Detectron2 and its users know the two parts as the model's own. The network stays at hand but is no part, so
        # that each weight has one name.
        network = self._modules.pop("network")
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.__dict__["network"] = network
        self.register_load_state_dict_pre_hook(_before_loading)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Arguments from a config."""
        check_keys(cfg)
        backbone = detectron2_backbone(cfg)
        head = build_sem_seg_head(cfg, output_shape(backbone))
        if isinstance(head, PER_PIXEL):
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.NAME {cfg.MODEL.SEM_SEG_HEAD.NAME!r} does not fit MODEL.META_ARCHITECTURE "
                "'MaskFormer': choose MaskFormerHead, or set the architecture to SemanticSegmentor"
            )
        adapted = Detectron2Backbone(backbone)
        return {
            "backbone": backbone,
            "sem_seg_head": head,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "keep_empty": cfg.INPUT.KEEP_EMPTY_SEGMENTS,
            "square_size": adapted.square_size,
            **mask_former_options(cfg, things_of(cfg), adapted.size_divisibility),
        }

    def image_batch(self, samples: Sequence[Sample]) -> Tensor:
        """As ours; on a square where the backbone insists on it."""
        images = super().image_batch(samples)
        height, width = images.shape[-2:]
        return F.pad(images, (0, max(0, self.square_size - width), 0, max(0, self.square_size - height)))

    def loss_normalizers(self, samples: Sequence[Sample]) -> LossNormalizers:
        """What these samples contribute to the divisors of a step's losses."""
        return super().loss_normalizers(self.supervised(samples))

    def supervised(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their truth, in whatever form it is, as ``segments``.

        Raises:
            UserError: if it cannot be used, is of another size than the image, or has classes that the model has not.
        """
        criterion: Any = self.criterion
        options = (self.ignore_label, self.keep_empty, criterion.num_classes)
        return [{**sample, "segments": segment_map(sample, *options)} for sample in samples]

    def forward(
        self, samples: Sequence[Sample], normalizers: LossNormalizers | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Train or evaluate on a list of samples in Detectron2's standard format.

        Args:
            samples: with ``image`` (3, H, W), 0..255 in ``INPUT.FORMAT``; in training with ``segments``, ``instances``
                or ``sem_seg``; in evaluation ``height`` and ``width`` of the results, else of the image.
            normalizers: of the whole step, for a loop of ours, which adds up losses over the processes; None: of
                Detectron2's loop, which averages them, so that they are added up here.

        Returns:
            In training the weighted losses under their published names, else per image a dict with ``sem_seg`` scores
            (K, H, W), ``panoptic_seg`` (ids, segments_info) and ``instances``, as far as switched on.
        """
        if not self.training:
            return [to_detectron2(result) for result in self.infer(samples)]
        samples = self.supervised(samples)
        if normalizers is not None:
            return super().forward(samples, normalizers)
        whole = over_all_processes(super().loss_normalizers(samples))
        losses = super().forward(samples, whole)
        assert isinstance(losses, dict)
        return share_of_mean(losses)


def _before_loading(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    rename_native(state, prefix)


def things_of(cfg: Any) -> tuple[bool, ...]:
    """Which classes are countable, from what `catalog` knows of the first training set.

    Raises:
        UserError: if that has no one list of classes or things beyond ``NUM_CLASSES``, or if panoptic or instance
            results are asked for and nothing says which classes are countable.
    """
    if not cfg.DATASETS.TRAIN:
        return thing_flags(cfg, None)
    classes, name = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.DATASETS.TRAIN[0]
    known = catalog.known_things(name)
    test = cfg.MODEL.MASK_FORMER.TEST
    if known is None and (test.PANOPTIC_ON or test.INSTANCE_ON):
        raise UserError(
            f"MODEL.MASK_FORMER.TEST.PANOPTIC_ON or INSTANCE_ON needs to know which classes are things, but {name} "
            f"does not say: switch both off, or set MetadataCatalog.get({name!r}).thing_dataset_id_to_contiguous_id "
            "and no thing_classes other than its stuff_classes"
        )
    if known is None:
        return ()
    last = max((label for label, thing in enumerate(known) if thing), default=-1)
    if last >= classes:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {classes}, but {name} has a thing of class {last}: set the key to the "
            "number of its things and stuff"
        )
    return (*known, *[False] * classes)[:classes]

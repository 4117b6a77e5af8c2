"""Whether data sets fit each other and the config, found before anything is read or trained."""

from __future__ import annotations

from yacs.config import CfgNode

from maskformer.data.dataset import Metadata
from maskformer.data.recipes import recipe_task
from maskformer.errors import UserError

_NEEDED = {"semantic": ("sem_seg", "pan_seg"), "panoptic": ("pan_seg",), "instance": ("annotations",)}
_KIND = {"sem_seg": "semantic", "pan_seg": "panoptic", "annotations": "instance"}


def check_dataset_against_config(cfg: CfgNode, metadata: Metadata, training: bool = True) -> None:
    """Refuses a data set that the configured model cannot learn or be measured on.

    Args:
        cfg: reads ``MODEL.SEM_SEG_HEAD.{NUM_CLASSES, IGNORE_VALUE}, INPUT.DATASET_MAPPER_NAME``.
        metadata: of the data set.
        training: also check that it has the labels that the recipe trains on.

    Raises:
        UserError: naming both values, the key and the remedy.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    if metadata.num_classes != head.NUM_CLASSES:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES} but data set {metadata.name!r} has "
            f"{metadata.num_classes} classes: set MODEL.SEM_SEG_HEAD.NUM_CLASSES {metadata.num_classes} or choose "
            "another data set"
        )
    if not training:
        return
    reads_label_maps = recipe_task(cfg) == "semantic"
    if reads_label_maps and metadata.ignore_label != head.IGNORE_VALUE:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE} but data set {metadata.name!r} ignores label "
            f"{metadata.ignore_label}: set MODEL.SEM_SEG_HEAD.IGNORE_VALUE {metadata.ignore_label}"
        )
    needed = _NEEDED[recipe_task(cfg)]
    if not set(needed) & set(metadata.truth):
        has = " and ".join(_KIND[field] for field in metadata.truth)
        raise UserError(
            f"INPUT.DATASET_MAPPER_NAME {cfg.INPUT.DATASET_MAPPER_NAME!r} needs {_KIND[needed[0]]} labels but data "
            f"set {metadata.name!r} has only {has} ones: choose another recipe or data set"
        )


def check_same_classes(first: Metadata, other: Metadata) -> None:
    """Refuses data sets that cannot be trained on together.

    Raises:
        UserError: if class names, things or ignore labels differ.
    """
    what = _class_difference(first, other)
    if what is None and first.ignore_label != other.ignore_label:
        what = f"different ignore labels ({first.ignore_label} and {other.ignore_label})"
    if what is not None:
        raise UserError(
            f"data sets {first.name!r} and {other.name!r} in DATASETS.TRAIN have {what}: train on data sets with the "
            "same classes"
        )


def check_test_classes(trained: Metadata, tested: Metadata) -> None:
    """Refuses a test set whose labels mean other classes than the model's; its ignore label may differ.

    Args:
        trained: of the data set that the model is or was trained on.
        tested: of the test set.

    Raises:
        UserError: if class names or things differ.
    """
    what = _class_difference(trained, tested)
    if what is not None:
        raise UserError(
            f"the model's training set {trained.name!r} and the test set {tested.name!r} in DATASETS.TEST have {what}, "
            "so its scores would mean nothing: test on a data set with the same classes in the same order"
        )


def _class_difference(first: Metadata, other: Metadata) -> str | None:
    """The first difference of class names and things in words, None if there is none."""
    if len(first.classes) != len(other.classes):
        return f"{len(first.classes)} and {len(other.classes)} classes"
    for i, names in enumerate(zip(first.classes, other.classes, strict=True)):
        if names[0] != names[1]:
            return f"different names for class {i} ({names[0]!r} and {names[1]!r})"
    for name, flags in zip(first.classes, zip(first.things, other.things, strict=True), strict=True):
        if bool(flags[0]) != bool(flags[1]):
            return f"class {name!r} once as thing and once as stuff"
    return None

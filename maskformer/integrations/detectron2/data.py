"""Our recipes as Detectron2's dataset mappers, and the loaders that the `Trainer` reads from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import configurable
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm

from maskformer.data.dataset import Metadata
from maskformer.data.loading import TrainLoader
from maskformer.data.loading import build_train_loader as build_native_train_loader
from maskformer.data.recipes import Sample, TestRecipe, TrainingRecipe, build_recipe
from maskformer.data.samplers import sample_rng
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import catalog

POSITION = "position"
"""Key of a record that says which place of the training stream it is for."""


class MaskFormerMapper:
    """Record -> sample by the recipe that ``INPUT.DATASET_MAPPER_NAME`` names: for Detectron2's loaders.

    Made from a config, ``MaskFormerMapper(cfg, is_train)``, or from a recipe. All chance of a sample comes from one
    source: that of (seed, position) where the record says its position, as in our own loader, which then gives the
    same sample; else NumPy's global generator, which Detectron2's loaders seed for each worker.

    Args:
        recipe: what reads and augments a record.
        seed: of the sources of (seed, position).
        ignore_label: of the ``sem_seg`` that training samples also get; None for none, as `MaskFormer` needs none.
    """

    @configurable
    def __init__(self, *, recipe: TrainingRecipe | TestRecipe, seed: int = 0, ignore_label: int | None = None) -> None:
        self.recipe = recipe
        self.seed = seed
        self.ignore_label = ignore_label

    @classmethod
    def from_config(cls, cfg: Any, is_train: bool = True, dataset_name: str | None = None) -> dict[str, Any]:
        """The arguments of the constructor.

        Args:
            cfg: reads ``INPUT``, ``DATASETS``, ``SEED`` (negative: 0), ``MODEL.META_ARCHITECTURE``,
                ``MODEL.SEM_SEG_HEAD.IGNORE_VALUE``.
            is_train: the training recipe, else that of testing.
            dataset_name: where the records come from; None for those that ``DATASETS`` names.

        Raises:
            UserError: if a value of ``INPUT`` makes no sense, or the data sets' labels mean different things.
        """
        part = "TRAIN" if is_train else "TEST"
        names = tuple(cfg.DATASETS[part]) if dataset_name is None else (dataset_name,)
        metadata = _one_meaning([catalog.get_metadata(name) for name in names], part)
        return {
            "recipe": build_recipe(cfg, metadata, is_train),
            "seed": max(0, int(cfg.SEED)),
            "ignore_label": label_to_ignore(cfg) if is_train else None,
        }

    def __call__(self, record: Mapping[str, Any]) -> Sample:
        """A sample, see `TrainingRecipe` and `TestRecipe`.

        Args:
            record: of Detectron2's standard format; not changed.

        Raises:
            UserError: if a file cannot be read or does not fit.
        """
        sample = self.recipe(catalog.with_image_id(record), self._rng(record))
        return sample if self.ignore_label is None else with_labels(sample, self.ignore_label)

    def _rng(self, record: Mapping[str, Any]) -> np.random.Generator:
        if POSITION in record:
            return sample_rng(self.seed, int(record[POSITION]))
        return np.random.default_rng(np.random.randint(2**32, size=4, dtype=np.uint32))


def label_to_ignore(cfg: Any) -> int | None:
    """The ignore label of the ``sem_seg`` that a model trains on; None where it trains on ``segments``.

    Detectron2's own meta-architectures, `SemanticSegmentor` of the per-pixel recipes among them, know label maps alone.
    """
    return None if cfg.MODEL.META_ARCHITECTURE == "MaskFormer" else int(cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)


def with_labels(sample: Sample, ignore_label: int) -> Sample:
    """The training sample with its segments as ``sem_seg`` (H, W) int64 too."""
    return {**sample, "sem_seg": sample["segments"].label_map(ignore_label)}


def _one_meaning(found: Sequence[Metadata], part: str) -> Metadata:
    """The metadata of data sets whose label files are read alike.

    Raises:
        UserError: if there is none, or they are read differently: Detectron2 does not tell a mapper where a record is
            from.
    """
    if not found:
        raise UserError(f"DATASETS.{part} is empty: name at least one data set, such as ('ade20k_sem_seg_train',)")
    first = found[0]
    for other in found[1:]:
        same = (other.classes, other.things, other.ignore_label, other.raw_labels)
        if same != (first.classes, first.things, first.ignore_label, first.raw_labels):
            raise UserError(
                f"the label files of {first.name!r} and {other.name!r} in DATASETS.{part} mean different things, and a "
                "mapper is not told where a record is from; give it dataset_name, or train with the Trainer of "
                "maskformer.integrations.detectron2"
            )
    return first


# ------------------------------------------------------------------ loaders
class LabelledBatches(Iterator[list[Sample]]):
    """Batches whose samples have ``sem_seg`` too, made here: workers need not send it.

    Args:
        batches: endless.
        ignore_label: of unsupervised pixels.
    """

    def __init__(self, batches: TrainLoader, ignore_label: int) -> None:
        self.batches = batches
        self.ignore_label = ignore_label

    def __next__(self) -> list[Sample]:
        return [with_labels(sample, self.ignore_label) for sample in next(self.batches)]


def build_train_loader(cfg: Any, start_position: int = 0) -> TrainLoader | LabelledBatches:
    """Our own loader over ``DATASETS.TRAIN``: the samples of `tools/train_net.py`, in its order, for this process.

    Args:
        cfg: see `maskformer.data.loading.build_train_loader`.
        start_position: samples (over all processes) that a resumed run has seen.

    Raises:
        UserError: if a data set cannot be used.
    """
    datasets = [catalog.get_dataset(name) for name in cfg.DATASETS.TRAIN]
    if not datasets:
        raise UserError("DATASETS.TRAIN is empty: name the data set to train on, such as ('ade20k_sem_seg_train',)")
    loader = build_native_train_loader(
        cfg,
        start_position=start_position,
        datasets=datasets,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    ignore_label = label_to_ignore(cfg)
    return loader if ignore_label is None else LabelledBatches(loader, ignore_label)


def build_test_loader(cfg: Any, dataset_name: str) -> Any:
    """Detectron2's test loader with our test recipe, whose samples hold the truth that our evaluators need.

    Raises:
        UserError: if the data set cannot be used.
    """
    # Its records, not those that Detectron2 has under the name: these are what was checked before the run.
    return build_detection_test_loader(
        list(catalog.get_dataset(dataset_name).records),
        mapper=MaskFormerMapper(cfg, is_train=False, dataset_name=dataset_name),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )

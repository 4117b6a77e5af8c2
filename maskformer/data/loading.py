"""Train and test loaders: records → recipe in worker processes → batches (lists of samples)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils import data
from yacs.config import CfgNode

from maskformer.data import catalog, image_io
from maskformer.data.checks import check_dataset_against_config, check_same_classes
from maskformer.data.dataset import Dataset, Metadata, Record
from maskformer.data.recipes import Sample, build_recipe
from maskformer.data.repeat_factors import build_repeat_factors
from maskformer.data.samplers import BatchStream, Key, check_even_split
from maskformer.data.workers import SampleSource, build_worker_loader, checked
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

Batch = list[Sample]


# ------------------------------------------------------------------ training
class TrainLoader(Iterator[Batch]):
    """Endless batches of this rank.

    Attributes:
        position: number of samples (over all ranks) in the batches handed out; with it as `start_position`, a new
            loader continues with the batch that would have come next.
        metadata: of the training data.
        epoch_length: number of images (over all ranks) of an epoch; more than there are if some are repeated.

    Args:
        loader: the samples of this rank, endless.
        batch_size: of the global batch.
        start_position: of the first batch.
        metadata: of the training data.
        epoch_length: number of images of an epoch.
    """

    def __init__(
        self,
        loader: data.DataLoader[Any],
        *,
        batch_size: int,
        start_position: int,
        metadata: Metadata,
        epoch_length: int,
    ) -> None:
        self.position = start_position
        self.metadata = metadata
        self.epoch_length = epoch_length
        self._batch_size = batch_size
        self._loader = loader
        self._batches: Iterator[list[Any]] | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = checked(next(self._batches))
        self.position += self._batch_size
        return batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches = None


def build_train_loader(
    cfg: CfgNode,
    metadata: Metadata | None = None,
    start_position: int = 0,
    *,
    datasets: Sequence[Dataset] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """The endless training loader over all of ``DATASETS.TRAIN``.

    Args:
        cfg: reads ``DATASETS.TRAIN, INPUT, DATALOADER, SOLVER.IMS_PER_BATCH, SEED`` (negative: 0), ``MODEL.DEVICE``,
            ``OUTPUT_DIR`` (where it is kept which classes the images of label-file data sets hold, if rare ones are
            repeated).
        metadata: what the model was built for; the data must have the same classes. None: the first data set's.
        start_position: `TrainLoader.position` of the run to continue, whatever its number of processes was.
        datasets: those of ``DATASETS.TRAIN`` if they are there already, so that they are not listed again.
        rank: of this process.
        world_size: number of processes; each gets ``IMS_PER_BATCH / world_size`` samples a batch.

    Raises:
        UserError: if a data set is missing, empty, does not fit the config or the other data sets, or if the batch
            cannot be split evenly.
    """
    seed, batch_size = max(0, int(cfg.SEED)), int(cfg.SOLVER.IMS_PER_BATCH)
    check_even_split(batch_size, world_size)  # before files are read
    if datasets is None:
        datasets = [catalog.get_dataset(name) for name in _names(cfg, "TRAIN")]
    metadata = metadata or datasets[0].metadata
    for dataset in datasets:
        check_same_classes(metadata, dataset.metadata)
        check_dataset_against_config(cfg, dataset.metadata)
    kept = [_records_with_segments(cfg, dataset) for dataset in datasets]
    factors = build_repeat_factors(cfg, datasets, kept)
    landscape = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        landscape = np.concatenate([_landscape(r, d.uniform) for r, d in zip(kept, datasets, strict=True)])
    parts = [(r, build_recipe(cfg, d.metadata, training=True)) for r, d in zip(kept, datasets, strict=True)]
    source = SampleSource(parts, seed)
    start_batch = -(-start_position // batch_size)
    stream = BatchStream(len(source), batch_size, seed, landscape, start_batch, rank, world_size, factors)
    if factors is not None:
        _say_what_is_repeated(float(cfg.DATALOADER.REPEAT_THRESHOLD), factors, stream.epochs.length)
    return TrainLoader(
        build_worker_loader(cfg, source, stream),
        batch_size=batch_size,
        start_position=start_batch * batch_size,
        metadata=metadata,
        epoch_length=stream.epochs.length,
    )


def _say_what_is_repeated(threshold: float, factors: np.ndarray, epoch_length: int) -> None:
    logger.info(
        "Repeat-factor sampling with threshold %g: %d of %d images are repeated, mean factor %.3f, %d images per epoch",
        *(threshold, (factors > 1).sum(), len(factors), factors.mean(), epoch_length),
    )


def _names(cfg: CfgNode, key: str) -> tuple[str, ...]:
    names = tuple(cfg.DATASETS[key])
    if not names:
        raise UserError(f"DATASETS.{key} is empty: name at least one data set, such as ('folder:my_data:train',)")
    return names


def _records_with_segments(cfg: CfgNode, dataset: Dataset) -> Sequence[Record]:
    """The records, without those known to have no segment if ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``.

    Known without reading a file, that is: from ``segments_info`` or ``annotations``.
    """
    records = dataset.records
    if dataset.uniform or not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        return records
    kept = [r for r in records if _has_segments(r)]
    if not kept:
        raise UserError(
            f"none of the {len(records)} images of data set {dataset.metadata.name!r} has a segment: check its "
            "annotations, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    if len(kept) < len(records):
        logger.info("%s: left out %d images without segments", dataset.metadata.name, len(records) - len(kept))
    return kept


def _has_segments(record: Record) -> bool:
    for field in ("segments_info", "annotations"):
        if field in record:
            return any(not segment.get("iscrowd", 0) for segment in record[field])
    return True


def _landscape(records: Sequence[Record], uniform: bool) -> np.ndarray:
    """(N,) bool: wider than high."""
    if uniform:
        return np.full(len(records), bool(np.greater(*_size(records[0])[::-1])))
    return np.array([width > height for height, width in map(_size, records)], bool)


def _size(record: Record) -> tuple[int, int]:
    """Height and width of a record's image, from the record or the file's header."""
    if "height" in record and "width" in record:
        return int(record["height"]), int(record["width"])
    return image_io.image_size(record["file_name"])


# ------------------------------------------------------------------ testing
class TestLoader:
    """This rank's share of a data set, once, in order.

    Attributes:
        dataset: what is read (records and metadata).
        indices: indices of the records this rank reads; none if there are fewer batches than ranks.

    Args:
        dataset: what to read.
        loader: samples of `batches`, in their order.
        batches: keys of the samples of each batch.
        indices: of the records in `batches`.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(
        self, *, dataset: Dataset, loader: data.DataLoader[Any], batches: Sequence[Sequence[Key]], indices: range
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self._batches = batches
        self._loader = loader

    @property
    def metadata(self) -> Metadata:
        """Of the data set."""
        return self.dataset.metadata

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        if not self._batches:
            return  # no workers need be started
        for batch in self._loader:
            yield checked(batch)


def _equal_size_batches(dataset: Dataset, batch_size: int) -> list[list[Key]]:
    """All images in order: consecutive ones of equal size, at most `batch_size` together.

    A smaller image padded to a larger one would get other results than alone.
    """
    batches: list[list[Key]] = []
    last_size: tuple[int, int] | None = None
    for index in range(len(dataset.records)):
        size = None
        if batch_size > 1:
            size = _size(dataset.records[0 if dataset.uniform else index])
        if not batches or batch_size == 1 or size != last_size or len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append((index, index))
        last_size = size
    return batches


def build_test_loader(cfg: CfgNode, dataset: str | Dataset, *, rank: int = 0, world_size: int = 1) -> TestLoader:
    """A loader that reads each image of a data set exactly once, in order.

    The batches are those of one process, dealt whole: who predicts what changes, but no forward pass does.

    Args:
        cfg: reads ``INPUT, DATALOADER, TEST.IMS_PER_BATCH, MODEL.DEVICE``.
        dataset: or its catalog name.
        rank: of this process; ranks get consecutive shares, perhaps empty ones.
        world_size: number of processes.

    Raises:
        UserError: if the data set is missing, empty or does not fit the config.
    """
    if isinstance(dataset, str):
        dataset = catalog.get_dataset(dataset)
    check_dataset_against_config(cfg, dataset.metadata, training=False)
    batches = _equal_size_batches(dataset, int(cfg.TEST.IMS_PER_BATCH))
    share = batches[len(batches) * rank // world_size : len(batches) * (rank + 1) // world_size]
    indices = range(share[0][0][0], share[-1][-1][0] + 1) if share else range(0)
    source = SampleSource([(dataset.records, build_recipe(cfg, dataset.metadata, training=False))], 0)
    loader = build_worker_loader(cfg, source, share)
    return TestLoader(dataset=dataset, loader=loader, batches=share, indices=indices)

"""Train and test loaders: records → recipe in worker processes → batches (lists of samples)."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils import data
from yacs.config import CfgNode

from maskformer.data import catalog, image_io
from maskformer.data.checks import check_dataset_against_config, check_same_classes
from maskformer.data.dataset import Dataset, Metadata, Record
from maskformer.data.recipes import Sample, TestRecipe, TrainingRecipe, build_recipe
from maskformer.data.samplers import BatchStream, Key, sample_rng
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

Batch = list[Sample]
Recipe = TrainingRecipe | TestRecipe


@dataclass(frozen=True)
class _Failure:
    """A `UserError` on its way out of a worker, where an exception would arrive wrapped in a traceback."""

    message: str


class PackedRecords(Sequence[Record]):
    """Records as one block of bytes, so that worker processes share it instead of copying it object by object."""

    def __init__(self, records: Sequence[Record]) -> None:
        packed = [np.frombuffer(pickle.dumps(r, protocol=pickle.HIGHEST_PROTOCOL), np.uint8) for r in records]
        self._ends = np.cumsum([len(p) for p in packed])
        self._bytes = np.concatenate(packed)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return pickle.loads(self._bytes[start : self._ends[index]].tobytes())


class SampleSource(data.Dataset[Sample | _Failure]):
    """Key → sample, over one or several data sets one after another.

    Args:
        parts: records and recipe of each data set.
        seed: of all chance.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Record], Recipe]], seed: int) -> None:
        self.parts = [(PackedRecords(r) if isinstance(r, list) else r, recipe) for r, recipe in parts]
        self.ends = np.cumsum([len(records) for records, _ in parts])
        self.seed = seed

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: Key) -> Sample | _Failure:
        index, position = key
        part = int(np.searchsorted(self.ends, index, side="right"))
        records, recipe = self.parts[part]
        record = records[index - (int(self.ends[part - 1]) if part else 0)]
        try:
            return recipe(record, sample_rng(self.seed, position))
        except UserError as error:
            return _Failure(str(error))


def _as_list(samples: list[Any]) -> list[Any]:
    return samples


def _start_worker(worker_id: int) -> None:
    """One thread a worker: parallelism comes from their number."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _torch_loader(cfg: CfgNode, source: SampleSource, batches: Any) -> data.DataLoader[Any]:
    workers = int(cfg.DATALOADER.NUM_WORKERS)
    return data.DataLoader(
        source,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=int(cfg.DATALOADER.PREFETCH_FACTOR) if workers else None,
        collate_fn=_as_list,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
        # Of its own: else starting an iterator would draw from torch's global generator and change a resumed run.
        generator=torch.Generator(),
    )


def _checked(batch: list[Sample | _Failure]) -> Batch:
    """The batch, if every sample could be made."""
    samples: Batch = []
    for sample in batch:
        if isinstance(sample, _Failure):
            raise UserError(sample.message)
        samples.append(sample)
    return samples


# ------------------------------------------------------------------ training
class TrainLoader(Iterator[Batch]):
    """Endless batches of this rank.

    Attributes:
        position: number of samples (over all ranks) in the batches handed out; with it as `start_position`, a new
            loader continues with the batch that would have come next.
        metadata: of the training data.
    """

    def __init__(self, loader: data.DataLoader[Any], batch_size: int, start_position: int, metadata: Metadata) -> None:
        self.position = start_position
        self.metadata = metadata
        self._batch_size = batch_size
        self._loader = loader
        self._batches: Iterator[list[Sample | _Failure]] | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = _checked(next(self._batches))
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
        cfg: reads ``DATASETS.TRAIN, INPUT, DATALOADER, SOLVER.IMS_PER_BATCH, SEED`` (negative: 0), ``MODEL.DEVICE``.
        metadata: what the model was built for; the data must have the same classes. None: the first data set's.
        start_position: `TrainLoader.position` of the run to continue.
        datasets: those of ``DATASETS.TRAIN`` if they are there already, so that they are not listed again.
        rank: of this process.
        world_size: number of processes; each gets ``IMS_PER_BATCH / world_size`` samples a batch.

    Raises:
        UserError: if a data set is missing, empty, does not fit the config or the other data sets.
    """
    if datasets is None:
        datasets = [catalog.get_dataset(name) for name in _names(cfg, "TRAIN")]
    metadata = metadata or datasets[0].metadata
    for dataset in datasets:
        check_same_classes(metadata, dataset.metadata)
        check_dataset_against_config(cfg, dataset.metadata)
    kept = [_records_with_segments(cfg, dataset) for dataset in datasets]
    parts = [(r, build_recipe(cfg, d.metadata, training=True)) for r, d in zip(kept, datasets, strict=True)]
    seed, batch_size = max(0, int(cfg.SEED)), int(cfg.SOLVER.IMS_PER_BATCH)
    landscape = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        landscape = np.concatenate([_landscape(r, d.uniform) for r, d in zip(kept, datasets, strict=True)])
    source = SampleSource(parts, seed)
    start_batch = -(-start_position // batch_size)
    stream = BatchStream(len(source), batch_size, seed, landscape, start_batch, rank, world_size)
    return TrainLoader(_torch_loader(cfg, source, stream), batch_size, start_batch * batch_size, metadata)


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
        indices: indices of the records this rank reads.

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
        for batch in self._loader:
            yield _checked(batch)


def _equal_size_batches(dataset: Dataset, indices: Sequence[int], batch_size: int) -> list[list[Key]]:
    """Consecutive images of equal size, at most `batch_size` together.

    A smaller image padded to a larger one would get other results than alone.
    """
    batches: list[list[Key]] = []
    last_size: tuple[int, int] | None = None
    for index in indices:
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

    Args:
        cfg: reads ``INPUT, DATALOADER, TEST.IMS_PER_BATCH, MODEL.DEVICE``.
        dataset: or its catalog name.
        rank: of this process; ranks get consecutive shares.
        world_size: number of processes.

    Raises:
        UserError: if the data set is missing, empty or does not fit the config.
    """
    if isinstance(dataset, str):
        dataset = catalog.get_dataset(dataset)
    check_dataset_against_config(cfg, dataset.metadata, training=False)
    count = len(dataset.records)
    indices = range(count * rank // world_size, count * (rank + 1) // world_size)
    batches = _equal_size_batches(dataset, indices, int(cfg.TEST.IMS_PER_BATCH))
    source = SampleSource([(dataset.records, build_recipe(cfg, dataset.metadata, training=False))], 0)
    loader = _torch_loader(cfg, source, batches)
    return TestLoader(dataset=dataset, loader=loader, batches=batches, indices=indices)

"""What worker processes do: records → recipe → lists of samples, with one-sentence errors."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils import data
from yacs.config import CfgNode

from maskformer.data.dataset import Record
from maskformer.data.samplers import Key, sample_rng
from maskformer.errors import UserError

Recipe = Callable[[Record, np.random.Generator], Any]


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


class SampleSource(data.Dataset[Any]):
    """Key → what a recipe makes of the record, over one or several data sets one after another.

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

    def __getitem__(self, key: Key) -> Any:
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


def build_worker_loader(cfg: CfgNode, source: SampleSource, batches: Iterable[list[Key]]) -> data.DataLoader[Any]:
    """The lists that `checked` takes, made in worker processes.

    Args:
        cfg: reads ``DATALOADER.{NUM_WORKERS, PREFETCH_FACTOR}, MODEL.DEVICE``.
        source: makes what the lists hold.
        batches: the keys of each list.
    """
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


def checked(made: list[Any]) -> list[Any]:
    """A list that `build_worker_loader` made, if all of it could be made.

    Raises:
        UserError: the first one that arose in a worker.
    """
    for item in made:
        if isinstance(item, _Failure):
            raise UserError(item.message)
    return made

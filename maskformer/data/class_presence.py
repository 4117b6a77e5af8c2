"""Which classes each image of a data set holds: from its records or, where these do not say, from its label files."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from maskformer.data import labels
from maskformer.data.dataset import Dataset, Metadata, Record
from maskformer.data.progress import progress
from maskformer.data.workers import SampleSource, build_worker_loader, checked
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

CACHE = "class_presence.npz"
IMAGES_PER_TASK = 32


def build_class_presence(
    cfg: CfgNode, datasets: Sequence[Dataset], records: Sequence[Sequence[Record]]
) -> list[np.ndarray]:
    """Which classes each image holds; crowds and ignored pixels are none.

    ``segments_info`` or ``annotations`` say so at once. Where a record has neither, its label file is read, and what
    was found is kept in ``OUTPUT_DIR``, so that a resumed run need not read it again.

    Args:
        cfg: reads ``OUTPUT_DIR, DATALOADER, MODEL.DEVICE``.
        datasets: what the records come from.
        records: of each data set.

    Returns:
        For each data set (M, 2) int32: a row (index of the record, contiguous class) for each class in each image.

    Raises:
        UserError: if a label file is missing, damaged or holds an unknown label, or a class is unknown.
    """
    parts = [(part, dataset.metadata) for part, dataset in zip(records, datasets, strict=True)]
    keys = [None if all(map(_lists_classes, part)) else _fingerprint(part, metadata) for part, metadata in parts]
    cache = Path(cfg.OUTPUT_DIR) / CACHE
    known = _read_cache(cache) if any(keys) else {}
    found = []
    for (part, metadata), key in zip(parts, keys, strict=True):
        if key is None:
            pairs = _pairs(map(_listed_classes, part))
        elif key in known and _is_sound(known[key], len(part), metadata):
            pairs = known[key]
            logger.info("%s: took the classes of %d images from %s", metadata.name, len(part), cache)
        else:
            pairs = known[key] = _read_label_files(cfg, part, metadata)
            _write_cache(cache, {k: known[k] for k in keys if k in known})
        _check_classes(pairs, part, metadata)
        found.append(pairs)
    return found


def _lists_classes(record: Record) -> bool:
    return "segments_info" in record or "annotations" in record


def _listed_classes(record: Record) -> np.ndarray:
    """(m,) the distinct classes that a record lists."""
    segments = record["segments_info"] if "segments_info" in record else record["annotations"]
    return np.array(sorted({s["category_id"] for s in segments if not s.get("iscrowd", 0)}), np.int32)


def _pairs(classes: Iterable[np.ndarray]) -> np.ndarray:
    """(M, 2) int32 rows (index, class) from the classes of each image."""
    each = list(classes)
    images = np.repeat(np.arange(len(each)), [len(c) for c in each])
    return np.stack([images, np.concatenate(each)], axis=1).astype(np.int32)


def _check_classes(pairs: np.ndarray, records: Sequence[Record], metadata: Metadata) -> None:
    wrong = pairs[(pairs[:, 1] < 0) | (pairs[:, 1] >= metadata.num_classes)]
    if len(wrong):
        file_name = str(records[int(wrong[0, 0])]["file_name"])
        raise UserError(
            f"the truth of {file_name!r} has category_id {int(wrong[0, 1])}, but data set {metadata.name!r} has "
            f"{metadata.num_classes} classes (0..{metadata.num_classes - 1}): {metadata.remedy}"
        )


# ------------------------------------------------------------------ reading
@dataclass(frozen=True)
class ClassReader:
    """Record → the (m,) distinct classes in its truth; called as recipes are, but nothing is left to chance.

    Attributes:
        metadata: of the data set the records come from.
    """

    metadata: Metadata

    def __call__(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        """Reads the label file, if the record does not list its classes.

        Raises:
            UserError: if it is missing, damaged or holds an unknown label.
        """
        if _lists_classes(record):
            return _listed_classes(record)
        _, classes, _ = labels.semantic_planes(record, self.metadata)
        return classes


def _read_label_files(cfg: CfgNode, records: Sequence[Record], metadata: Metadata) -> np.ndarray:
    """(M, 2) int32 rows (index, class), read by as many worker processes as load the training data."""
    logger.info("%s: reading which classes its %d label files hold", metadata.name, len(records))
    keys = [(index, 0) for index in range(len(records))]
    tasks = [keys[i : i + IMAGES_PER_TASK] for i in range(0, len(keys), IMAGES_PER_TASK)]
    loader = build_worker_loader(cfg, SampleSource([(records, ClassReader(metadata))], seed=0), tasks)
    classes: list[np.ndarray] = []
    with progress(f"{metadata.name}: reading label files", len(records)) as report:
        for several in loader:  # its iterator has no name, so that an error ends the workers at once
            classes += checked(several)
            report(len(classes))
    return _pairs(classes)


# ------------------------------------------------------------------ what a resumed run need not read again
def _fingerprint(records: Sequence[Record], metadata: Metadata) -> str:
    """Changes with the data set's name, its records, their files (time, size), and what their labels mean."""
    meaning = metadata.name, metadata.num_classes, metadata.ignore_label, metadata.raw_labels, len(records)
    digest = hashlib.sha256(repr(meaning).encode())
    with ThreadPoolExecutor() as pool:  # on a network drive each look takes its time
        for stamp in pool.map(_stamp, records):
            digest.update(stamp.encode())
    return digest.hexdigest()


def _stamp(record: Record) -> str:
    if "sem_seg_file_name" not in record:
        return repr(_listed_classes(record).tolist())
    name = str(record["sem_seg_file_name"])
    try:
        status = Path(name).stat()
    except OSError:  # reading it will say what is wrong
        return repr(name)
    return repr((name, status.st_mtime_ns, status.st_size))


def _read_cache(path: Path) -> dict[str, np.ndarray]:
    """Fingerprint → (M, 2) rows; empty if there is no file or it is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # whatever damage leads to: the label files are still there
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("%s cannot be used (%s), so the label files are read again", path, reason)
        return {}


def _is_sound(pairs: np.ndarray, count: int, metadata: Metadata) -> bool:
    """Whether rows read from the cache can be what was written there."""
    good = pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype == np.int32
    good = good and bool(((pairs >= 0) & (pairs < (count, metadata.num_classes))).all())
    if not good:
        logger.warning("what %s holds on %s is damaged, so the label files are read again", CACHE, metadata.name)
    return good


def _write_cache(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes under another name first, so that there is never half a file."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        logger.warning("%s cannot be written (%s), so a resumed run will read the label files again", path, error)

"""Scores of prediction files, without a model: the same numbers as evaluation gives when it writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pycocotools import mask as coco_mask

from maskformer.data.catalog import Dataset
from maskformer.data.dataset import Metadata, Record
from maskformer.data.image_io import read_panoptic_ids, segmentation_to_rle
from maskformer.data.labels import read_panoptic, read_semantic
from maskformer.data.progress import progress
from maskformer.errors import UserError
from maskformer.evaluation.fields import as_finite, as_whole
from maskformer.evaluation.instance import InstanceEvaluator
from maskformer.evaluation.panoptic_quality import PanopticQuality
from maskformer.evaluation.semantic import SemSegEvaluator
from maskformer.evaluation.truth import (
    WRONG,
    InstanceTruth,
    PanopticTruth,
    by_image,
    check_truth,
    malformed,
    panoptic_images,
    read_json,
    refuse_difference,
)

MAX_CHUNK = 32
"""Images that a process counts before it tells the main one."""

Results = dict[str, dict[str, float]]
Counted = TypeVar("Counted")


def count_in_processes(
    count: Callable[[Sequence[Any]], Counted], jobs: Sequence[Any], workers: int, what: str
) -> Iterator[Counted]:
    """`count` of all jobs, a few at a time, in their order, with progress.

    Args:
        count: can be pickled.
        jobs: one for each image.
        workers: processes; 1 for this one alone.
        what: is done, in a few words.

    Raises:
        UserError: of the first job that has one, or if a process was killed.
    """
    size = max(1, min(MAX_CHUNK, len(jobs) // (4 * workers)))
    chunks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    workers = min(workers, len(chunks))
    done = 0
    with progress(what, len(jobs)) as report:
        if workers <= 1:
            for chunk in chunks:
                yield count(chunk)
                done += len(chunk)
                report(done)
            return
        pool = ProcessPoolExecutor(workers)
        try:
            for chunk, counted in zip(chunks, pool.map(count, chunks), strict=True):
                yield counted
                done += len(chunk)
                report(done)
        except BrokenProcessPool as error:
            raise UserError(f"a process was killed while {what} (out of memory?); use fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------ panoptic
class _PanopticJob(NamedTuple):
    true_png: str
    true_segments: Sequence[Mapping[str, Any]]
    pred_png: str
    pred_segments: Sequence[Mapping[str, Any]]


def score_panoptic(predictions: Path, folder: Path, truth: PanopticTruth, workers: int = 1) -> Results:
    """PQ of a COCO panoptic prediction file.

    Args:
        predictions: JSON with ``annotations``: ``image_id``, ``file_name``, ``segments_info`` (dataset category ids).
        folder: of its PNGs.
        truth: to compare with.
        workers: processes.

    Raises:
        UserError: if files are missing or damaged, or do not have every image of the truth once.
    """
    content = read_json(predictions)
    try:
        found = panoptic_images(content["annotations"], folder, predictions)
    except WRONG as error:
        raise malformed(predictions, error, "COCO panoptic prediction file") from error
    refuse_difference(truth.images, found, predictions)
    jobs = []
    for image_id, (true_png, true_segments) in truth.images.items():
        jobs.append(_PanopticJob(true_png, true_segments, *found[image_id]))
    total = PanopticQuality(truth.things, truth.names)
    for part in count_in_processes(partial(_count_panoptic, truth.things), jobs, workers, "scoring"):
        total.merge(part)
    return {"panoptic_seg": total.compute()}


def _count_panoptic(categories: Mapping[int, bool], jobs: Sequence[_PanopticJob]) -> PanopticQuality:
    quality = PanopticQuality(categories)
    for job in jobs:
        true = read_panoptic_ids(job.true_png, "truth")
        predicted = read_panoptic_ids(job.pred_png, "prediction")
        try:
            quality.update(predicted, job.pred_segments, true, job.true_segments, refuse_unlisted=True)
        except UserError as error:
            raise UserError(f"{job.pred_png}: {error}") from error
        except WRONG as error:
            raise malformed(job.pred_png, error, "PNG with complete segments_info in the JSON files") from error
    return quality


# ------------------------------------------------------------------ semantic
class _SemanticJob(NamedTuple):
    record: Record
    entries: Sequence[Mapping[str, Any]]  # of the prediction file, with ``label`` instead of a category


def score_semantic(predictions: Path, dataset: Dataset, workers: int = 1, *, pq_stuff: bool = True) -> Results:
    """MIoU and its relatives of a semantic prediction file.

    Args:
        predictions: JSON list of ``file_name`` (of the image), ``category_id`` (the data set's own), ``segmentation``
            (COCO RLE), one for each class predicted in an image.
        dataset: to compare with. Images are found by their path, or by their name where no path agrees.
        workers: processes.
        pq_stuff: whether to measure PQ^St too.

    Raises:
        UserError: if files are missing or damaged, or do not have every image of the data set.
    """
    check_truth(dataset, "sem_seg")
    metadata, content = dataset.metadata, read_json(predictions)
    label: dict[int | None, int] = {int(category): number for number, category in enumerate(metadata.dataset_ids)}
    try:
        labelled = ({**item, "label": label.get(as_whole(item["category_id"]))} for item in content)
        entries = by_image(labelled, "file_name")
    except WRONG as error:
        raise malformed(predictions, error, "list of semantic predictions") from error
    for name, items in entries.items():
        _check_classes(name, items, metadata, predictions)
    entries = _by_path_or_name(entries, dataset.records)
    refuse_difference((str(record["file_name"]) for record in dataset.records), entries, predictions)
    jobs = [_SemanticJob(record, entries[str(record["file_name"])]) for record in dataset.records]
    total = SemSegEvaluator(metadata.classes, metadata.ignore_label, pq_stuff=pq_stuff)
    count = partial(_count_semantic, metadata, predictions)
    return {total.name: total.finish(list(count_in_processes(count, jobs, workers, "scoring")))}


def _check_classes(name: str, items: Sequence[Mapping[str, Any]], metadata: Metadata, path: Path) -> None:
    seen = set()
    for item in items:
        category = item["category_id"]
        if item["label"] is None:
            raise UserError(
                f"{path} has category_id {category!r} for {name!r}, which is none of the {metadata.num_classes} "
                f"classes of {metadata.name!r}; score it against the data set that it was made for"
            )
        if category in seen:
            raise UserError(f"{path} has category_id {category!r} twice for {name!r}; leave one entry for each class")
        seen.add(category)


def _by_path_or_name(entries: dict[Any, list[Any]], records: Sequence[Record]) -> dict[Any, list[Any]]:
    """Entries by the paths of the records: files are often predicted on one machine and scored on another."""
    paths = [str(record["file_name"]) for record in records]
    if entries.keys() & set(paths):
        return entries
    by_name = {Path(path).name: path for path in paths}
    names = {Path(str(name)).name for name in entries}
    if len(by_name) < len(paths) or len(names) < len(entries):
        return entries  # names do not tell them apart
    return {by_name.get(Path(str(name)).name, name): items for name, items in entries.items()}


def _count_semantic(metadata: Metadata, predictions: Path, jobs: Sequence[_SemanticJob]) -> Any:
    evaluator = SemSegEvaluator(metadata.classes, metadata.ignore_label)
    for record, entries in jobs:
        true = read_semantic(record, metadata)
        name = f"{predictions}: the prediction of {str(record['file_name'])!r}"
        evaluator.count(label_map_of(entries, true.shape, metadata.ignore_label, name), true)
    return evaluator.partial()


def label_map_of(
    entries: Sequence[Mapping[str, Any]], shape: Sequence[int], ignore_label: int, name: str
) -> np.ndarray:
    """A label map from one mask for each class.

    Args:
        entries: with ``label`` and ``segmentation``.
        shape: (H, W) that it must have.
        ignore_label: where no class is predicted.
        name: what it is, named in errors.

    Returns:
        (H, W) int32.

    Raises:
        UserError: if a mask has another size, or a pixel two classes.
    """
    labels = np.full((shape[1], shape[0]), ignore_label, dtype=np.int32).T  # as COCO's masks run, down the columns
    try:
        runs = [segmentation_to_rle(entry["segmentation"], shape[0], shape[1], name) for entry in entries]
    except KeyError as error:
        raise UserError(f"{name} has an entry without 'segmentation'; write the file again") from error
    covered = 0
    for entry, run in zip(entries, runs, strict=True):
        labels[coco_mask.decode(run).view(bool)] = entry["label"]
        covered += int(coco_mask.area(run))
    if covered != np.count_nonzero(labels != ignore_label):
        raise UserError(f"{name} has pixels in two classes; each pixel may have one")
    return labels


# ------------------------------------------------------------------ instances
class _InstanceJob(NamedTuple):
    record: Record
    detections: Sequence[Mapping[str, Any]]


def score_instances(predictions: Path, truth: InstanceTruth, workers: int = 1) -> Results:
    """Mask AP of a COCO results file.

    Args:
        predictions: JSON list of ``image_id``, ``category_id`` (the data set's own), ``segmentation``, ``score``.
        truth: to compare with; an image without detections has no entry in the file.
        workers: processes that read truth and masks; the rest is done by one.

    Raises:
        UserError: if files are missing or damaged, or have images that the truth lacks.
    """
    content = read_json(predictions)
    things = {category: number for number, category in enumerate(truth.dataset_ids) if truth.things[number]}
    try:
        for item in content:
            item["category_id"], item["score"] = _class_and_score(item, things, predictions)
        found = by_image(content, "image_id")
    except WRONG as error:
        raise malformed(predictions, error, "COCO results file") from error
    known = [record["image_id"] for record in truth.records]
    refuse_difference(known, [*known, *found], predictions)
    jobs = [_InstanceJob(record, found.get(record["image_id"], ())) for record in truth.records]
    total = InstanceEvaluator(truth.names, truth.things)
    count = partial(_read_instances, truth._replace(records=()), predictions)
    return {total.name: total.finish(list(count_in_processes(count, jobs, workers, "scoring")))}


def _class_and_score(item: Mapping[str, Any], things: Mapping[int, int], path: Path) -> tuple[int, float]:
    """Contiguous class and score of one detection; `things` are the countable classes by the data set's ids."""
    label = things.get(as_whole(item["category_id"]))  # type: ignore[arg-type]
    if label is None:
        raise UserError(
            f"{path} has category_id {item['category_id']!r}, which is none of the {len(things)} "
            "countable classes of the truth; score it against the data set that it was made for"
        )
    score = as_finite(item["score"])
    if score is None:
        raise UserError(
            f"{path} has score {item['score']!r:.80} for image_id {item['image_id']!r}; scores are finite numbers"
        )
    return label, score


def _read_instances(truth: InstanceTruth, predictions: Path, jobs: Sequence[_InstanceJob]) -> Any:
    evaluator = InstanceEvaluator(truth.names, truth.things)
    for record, detections in jobs:
        sample = dict(record)
        if "annotations" not in record and truth.metadata is not None:
            sample["pan_seg"] = read_panoptic(record, truth.metadata)
        where = f"{predictions}: the prediction of image {record['image_id']!r}"
        height, width = int(record["height"]), int(record["width"])
        try:
            found = [
                {**d, "segmentation": segmentation_to_rle(d["segmentation"], height, width, where)} for d in detections
            ]
        except KeyError as error:
            raise UserError(f"{where} has an entry without 'segmentation'; AP of boxes is not measured") from error
        try:
            evaluator.add(sample, (height, width), found)
        except UserError as error:
            raise UserError(f"{truth.source}: {error}") from error
        except WRONG as error:
            raise malformed(truth.source, error, "truth with complete annotations") from error
    return evaluator.partial()

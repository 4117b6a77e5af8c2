"""What prediction files are scored against: the truth of a data set, or of COCO's own JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskformer.data.catalog import Dataset
from maskformer.data.dataset import Metadata, Record
from maskformer.data.paths import inside
from maskformer.errors import UserError
from maskformer.evaluation.fields import as_whole

WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What files of another kind raise."""

TRUTH_FIELDS = {
    "sem_seg": ("sem_seg", "pan_seg"),
    "panoptic_seg": ("pan_seg",),
    "instances": ("annotations", "pan_seg"),
}
"""Task -> fields of a data set's records that it can be measured on."""


class PanopticTruth(NamedTuple):
    """Panoptic truth by image, with the data set's own category ids.

    Attributes:
        names: category id -> name.
        things: category id -> whether it is countable.
        images: image id -> PNG of ids, and ``segments_info``.
    """

    names: dict[int, str]
    things: dict[int, bool]
    images: dict[Any, tuple[str, list[dict[str, Any]]]]


class InstanceTruth(NamedTuple):
    """True objects by image, with contiguous category ids.

    Attributes:
        names: of the K classes.
        things: K flags.
        dataset_ids: the data set's own id of each class.
        records: with ``annotations``, or panoptic truth.
        metadata: of the data set; None for a file's.
        source: the data set or file, named in errors.
    """

    names: list[str]
    things: list[bool]
    dataset_ids: list[int]
    records: Sequence[Record]
    metadata: Metadata | None
    source: str = "the truth"


def check_truth(dataset: Dataset, task: str) -> None:
    """Refuse a data set that has no truth for a task.

    Raises:
        UserError: naming what it has.
    """
    fields = dataset.metadata.truth
    if not set(TRUTH_FIELDS[task]) & set(fields):
        raise UserError(
            f"data set {dataset.metadata.name!r} has only {' and '.join(fields) or 'no'} truth, so --task {task} "
            "cannot be scored on it; choose another task or data set"
        )


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it is not there or damaged.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON ({error}); write it again") from error


def malformed(path: str | Path, error: Exception, of: str) -> UserError:
    """The sentence about a file that is JSON but of another kind."""
    return UserError(f"{path} is no {of} ({type(error).__name__}: {error}); check that it is the right file")


# ------------------------------------------------------------------ panoptic
def panoptic_truth_of(dataset: Dataset) -> PanopticTruth:
    """The truth of a data set's records.

    Raises:
        UserError: if it has none.
    """
    check_truth(dataset, "panoptic_seg")
    metadata = dataset.metadata
    ids = [int(category) for category in metadata.dataset_ids]
    images = {}
    for record in dataset.records:
        segments = [{**s, "category_id": ids[s["category_id"]]} for s in record["segments_info"]]
        images[record["image_id"]] = (str(record["pan_seg_file_name"]), segments)
    return PanopticTruth(
        dict(zip(ids, metadata.classes, strict=True)), dict(zip(ids, metadata.things, strict=True)), images
    )


def read_panoptic_truth(path: Path, folder: Path) -> PanopticTruth:
    """The truth of a COCO panoptic JSON.

    Args:
        path: of the JSON.
        folder: of its PNGs.

    Raises:
        UserError: if it cannot be read or is of another kind.
    """
    content = read_json(path)
    try:
        categories = content["categories"]
        ids = [whole(c["id"], "category id", path) for c in categories]
        names = {own: str(c.get("name", own)) for own, c in zip(ids, categories, strict=True)}
        things = {own: bool(c["isthing"]) for own, c in zip(ids, categories, strict=True)}
        images = panoptic_images(content["annotations"], folder, path)
    except WRONG as error:
        raise malformed(path, error, "COCO panoptic JSON") from error
    return PanopticTruth(names, things, images)


def panoptic_images(
    annotations: Sequence[Mapping[str, Any]], folder: Path, source: Path
) -> dict[Any, tuple[str, list[dict[str, Any]]]]:
    """Image id -> PNG of ids, and ``segments_info``, from the ``annotations`` of a COCO panoptic JSON.

    Args:
        annotations: as they are in the file; what they lack raises one of `WRONG`.
        folder: of the PNGs.
        source: the file, named in errors.

    Raises:
        UserError: if an image comes twice, two images have one PNG, or a PNG lies outside of the folder.
    """
    refuse_twice([a["image_id"] for a in annotations], source)
    images = {a["image_id"]: (str(inside(folder, a["file_name"], source)), a["segments_info"]) for a in annotations}
    owner: dict[str, Any] = {}
    for image_id, (png, _) in images.items():
        if png in owner:
            raise UserError(
                f"{source} has the PNG {png!a} for image_id {owner[png]!r} and {image_id!r}; each image has its own"
            )
        owner[png] = image_id
    return images


def whole(value: Any, what: str, source: str | Path) -> int:
    """A whole number of a file.

    Raises:
        UserError: naming the value.
    """
    number = as_whole(value)
    if number is None:
        raise UserError(f"{source} has the {what} {value!r:.80}, which is no whole number; correct it")
    return number


def refuse_twice(image_ids: Iterable[Any], path: str | Path) -> None:
    """Each image once.

    Raises:
        UserError: naming how many come more than once, and the first.
    """
    seen: set[Any] = set()
    twice = [image_id for image_id in image_ids if image_id in seen or seen.add(image_id)]  # type: ignore[func-returns-value]
    if twice:
        raise UserError(
            f"{path} has {len(set(twice))} images more than once, the first with image_id {twice[0]!r}; "
            "leave one entry for each image"
        )


def refuse_difference(expected: Iterable[Any], found: Iterable[Any], path: str | Path) -> None:
    """Predictions for all images of the truth, and for no others.

    Raises:
        UserError: naming how many are missing or unknown, and the first.
    """
    wanted, given = dict.fromkeys(expected), dict.fromkeys(found)
    missing = [image for image in wanted if image not in given]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(wanted)} images of the truth, the first is {missing[0]!r}; "
            "predict all of them, the scores would not be those of the data set"
        )
    unknown = [image for image in given if image not in wanted]
    if unknown:
        raise UserError(
            f"{path} has {len(unknown)} images that the truth does not have, the first is {unknown[0]!r}; "
            "score it against the data set that it was made for"
        )


# ------------------------------------------------------------------ instances
def instance_truth_of(dataset: Dataset) -> InstanceTruth:
    """The truth of a data set's records.

    Raises:
        UserError: if it has none.
    """
    check_truth(dataset, "instances")
    metadata = dataset.metadata
    ids = [int(category) for category in metadata.dataset_ids]
    source = metadata.annotation_file or f"data set {metadata.name!r}"
    return InstanceTruth(metadata.classes, metadata.things, ids, dataset.records, metadata, source)


def read_instance_truth(path: Path) -> InstanceTruth:
    """The truth of a COCO instances JSON.

    Raises:
        UserError: if it cannot be read or is of another kind.
    """
    content = read_json(path)
    try:
        ids = [whole(category["id"], "category id", path) for category in content["categories"]]
        names = [str(category.get("name", category["id"])) for category in content["categories"]]
        label = {category: number for number, category in enumerate(ids)}
        records: dict[Any, Record] = {}
        for image in content["images"]:
            size = {side: whole(image[side], f"image {side}", path) for side in ("height", "width")}
            file_name = str(image.get("file_name", image["id"]))
            records[image["id"]] = {"image_id": image["id"], "file_name": file_name, **size, "annotations": []}
        for annotation in content["annotations"]:
            own = {**annotation, "category_id": label[annotation["category_id"]]}
            own["segmentation"] = usable_polygons(annotation["segmentation"])
            if own["segmentation"]:
                records[annotation["image_id"]]["annotations"].append(own)
    except WRONG as error:
        raise malformed(path, error, "COCO instances JSON") from error
    return InstanceTruth(names, [True] * len(names), ids, list(records.values()), None, str(path))


def usable_polygons(segmentation: Any) -> Any:
    """A COCO segmentation without polygons of fewer than three points, as data sets are read."""
    if not isinstance(segmentation, list):
        return segmentation
    return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]


def by_image(items: Iterable[Mapping[str, Any]], key: str) -> dict[Any, list[Any]]:
    """Items of each image, in their order."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(item[key], []).append(item)
    return found

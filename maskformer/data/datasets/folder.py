"""Any folder as a data set: ``folder:<path>:<split>``, described by ``<path>/dataset.yaml``.

Semantic (``images/<split>/*`` and ``masks/<split>/*.png`` with equal stems)::

    classes: [road, {name: car, thing: true, color: [0, 0, 142]}]
    ignore_label: 255             # default 255 (65535 beyond 255 classes)
    labels: {7: road, 26: car, 0: null}   # raw value -> class, null = ignored; default: value i is the i-th class
    images: images/{split}/*      # patterns, these are the defaults; '*' must stand for equal stems
    masks: masks/{split}/*.png

Instances or panoptic, from COCO JSON files (images in ``images/<split>`` unless ``images:`` says otherwise)::

    classes: [...]                            # default: the categories of the JSON
    instances: annotations/instances_{split}.json        # or {train: ..., val: ...}
    panoptic: annotations/panoptic_{split}.json          # PNGs in the folder of that name, or where `masks:` says
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from maskformer.data.dataset import Color, Dataset, Metadata, Record, distinct_colors, nearest
from maskformer.data.datasets import coco
from maskformer.data.datasets.files import add_sizes, find_files, pair_files
from maskformer.data.datasets.folder_yaml import ClassEntry, Description, read_description
from maskformer.errors import UserError

PREFIX = "folder:"
_IMAGES, _MASKS = "images/{split}/*", "masks/{split}/*.png"


def build(name: str) -> Dataset:
    """The data set ``folder:<path>:<split>``.

    Raises:
        UserError: if the name is incomplete, or ``dataset.yaml`` is missing or wrong.
    """
    path, separator, split = name[len(PREFIX) :].rpartition(":")
    if not (separator and path and split):
        raise UserError(f"data set name {name!r} is incomplete: write 'folder:<path>:<split>'")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder {str(root)!r} of data set {name!r} does not exist: check the path")
    description = read_description(root / "dataset.yaml")
    if description.instances is not None or description.panoptic is not None:
        return _from_json(name, root, split, description)
    return _from_masks(name, root, split, description)


def _default_ignore(num_classes: int) -> int:
    return 255 if num_classes <= 255 else 65535


def _colors(entries: list[ClassEntry]) -> list[Color]:
    """The colours given, and distinct ones for the rest."""
    given = [e.color for e in entries if e.color is not None]
    made = iter(distinct_colors(len(entries) - len(given), given))
    return [e.color if e.color is not None else next(made) for e in entries]


# ------------------------------------------------------------------ masks
def _from_masks(name: str, root: Path, split: str, description: Description) -> Dataset:
    entries = description.classes
    if entries is None:
        raise UserError(f"{description.path} has no 'classes:': list the class names in the order of their labels")
    ignore, raw_labels = _labels(entries, description)
    metadata = Metadata(
        name=name,
        classes=[e.name for e in entries],
        things=[bool(e.thing) for e in entries],
        colors=_colors(entries),
        ignore_label=ignore,
        evaluators=("sem_seg",),
        dataset_ids=list(range(len(entries))),
        truth=("sem_seg",),
        raw_labels=raw_labels,
        remedy=f"number the labels from 0, or set 'labels:' (raw value to class name) or 'ignore_label:' in "
        f"{description.path}",
    )
    images = (description.images or _IMAGES).replace("{split}", split)
    masks = (description.masks or _MASKS).replace("{split}", split)
    return Dataset(metadata, partial(_mask_records, name, root, images, masks))


def _labels(entries: list[ClassEntry], description: Description) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The contiguous ignore label and the pairs (raw value, contiguous label)."""
    raw_ignore, count = description.ignore_label, len(entries)
    if description.labels is None:
        ignore = _default_ignore(count) if raw_ignore is None else raw_ignore
        if ignore < count:
            raise UserError(
                f"{description.path} has ignore_label: {ignore}, which is also the label of class "
                f"{entries[ignore].name!r}: map the values with 'labels:' or choose an ignore_label of {count} or more"
            )
        return ignore, ()
    index = {e.name: i for i, e in enumerate(entries)}
    ignore = raw_ignore if raw_ignore is not None and raw_ignore >= count else _default_ignore(count)
    pairs: dict[int, int] = {}
    for raw, class_name in description.labels.items():
        if class_name is not None and class_name not in index:
            raise UserError(
                f"{description.path} maps label {raw} to {class_name!r}, which is not in 'classes:': "
                f"{nearest(class_name, index)}"
            )
        pairs[raw] = ignore if class_name is None else index[class_name]
    if raw_ignore is not None:
        if pairs.get(raw_ignore, ignore) != ignore:
            raise UserError(f"{description.path} has value {raw_ignore} both as ignore_label and in 'labels:'")
        pairs[raw_ignore] = ignore
    return ignore, tuple(sorted(pairs.items()))


def _mask_records(name: str, root: Path, images: str, masks: str) -> list[Record]:
    remedy = "create it, or correct the split or the pattern in dataset.yaml"
    found = find_files(root, images, name, remedy)
    return add_sizes(
        pair_files(found, find_files(root, masks, name, remedy), name, str(root / images), str(root / masks))
    )


# ------------------------------------------------------------------ COCO JSON
def _from_json(name: str, root: Path, split: str, description: Description) -> Dataset:
    key = "instances" if description.instances is not None else "panoptic"
    json_file = root / _of_split(description, key, split)
    remedy = f"correct '{key}:' or 'images:' in {description.path}"
    content = coco.read_json(json_file, ("categories",), name, remedy)
    entries, dataset_ids = _json_classes(description, content["categories"], json_file, panoptic=key == "panoptic")
    png_root = None
    if key == "panoptic":
        masks = description.masks.replace("{split}", split) if description.masks else None
        png_root = str(json_file.with_suffix("") if masks is None else (root / masks).parent)
    metadata = Metadata(
        name=name,
        classes=[e.name for e in entries],
        things=[bool(e.thing) for e in entries],
        colors=_colors(entries),
        ignore_label=_default_ignore(len(entries)) if description.ignore_label is None else description.ignore_label,
        evaluators=("instances",) if key == "instances" else ("sem_seg", "panoptic_seg"),
        dataset_ids=dataset_ids,
        truth=("annotations",) if key == "instances" else ("pan_seg",),
        annotation_file=str(json_file),
        panoptic_root=png_root,
    )
    image_root = (root / (description.images or _IMAGES).replace("{split}", split)).parent
    list_records = coco.instance_records if key == "instances" else coco.panoptic_records
    return Dataset(metadata, partial(list_records, metadata, image_root, remedy))


def _of_split(description: Description, key: str, split: str) -> str:
    given: str | dict[str, str] = getattr(description, key)
    if isinstance(given, str):
        return given.replace("{split}", split)
    if split not in given:
        raise UserError(f"{description.path} names no file for split {split!r} under '{key}:': {nearest(split, given)}")
    return given[split]


def _json_classes(
    description: Description, categories: list[Any], json_file: Path, panoptic: bool
) -> tuple[list[ClassEntry], list[int]]:
    """Classes and the JSON's ids of them: as `classes:` lists them, else as the JSON does, by id.

    Whether a class is a thing: as `classes:` says, else as the JSON says (panoptic), else true.
    """
    try:
        table = {str(c["name"]): c for c in sorted(categories, key=lambda c: int(c["id"]))}
        ids = {name: int(c["id"]) for name, c in table.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"annotation file {str(json_file)!r} has a category without 'id' or 'name'") from error
    if len(ids) != len(categories):
        raise UserError(f"annotation file {str(json_file)!r} has two categories of one name: rename one")
    entries = description.classes or [ClassEntry(name) for name in ids]
    unknown = [e.name for e in entries if e.name not in ids]
    if unknown:
        raise UserError(
            f"{description.path} lists the class {unknown[0]!r}, which is no category of {str(json_file)!r}: "
            f"{nearest(unknown[0], ids)}"
        )
    count = len(entries)
    if description.ignore_label is not None and description.ignore_label < count:
        raise UserError(f"{description.path} has ignore_label: {description.ignore_label}, one of its {count} classes")
    entries = [
        e if e.thing is not None else e._replace(thing=bool(table[e.name].get("isthing", 1)) if panoptic else True)
        for e in entries
    ]
    return entries, [ids[e.name] for e in entries]

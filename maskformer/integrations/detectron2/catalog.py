"""Our data sets in Detectron2's catalogs, and its users' data sets in our terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from maskformer.data import catalog
from maskformer.data.dataset import Color, Dataset, Metadata, Record, distinct_colors
from maskformer.data.datasets import folder
from maskformer.errors import UserError

LABEL_DIVISOR = 1000
"""What Detectron2 packs class and instance into one id with, where a model gives no ``segments_info``."""

_OURS: dict[str, Any] = {}
"""Name -> what our registration put into ``DatasetCatalog``, or what Detectron2 itself had there before."""


# ------------------------------------------------------------------ ours in Detectron2's
def register_datasets() -> list[str]:
    """Put each data set of our catalog into ``DatasetCatalog`` and ``MetadataCatalog``, if the name is free there.

    Touches no data: records are listed when they are asked for, and classes come with the package. Called when the
    integration is imported; once more after ``$DETECTRON2_DATASETS`` has changed, which paths in metadata depend on.

    Returns:
        The names that are ours there.
    """
    return [name for name in catalog.dataset_names() if _register(name)]


def ensure_registered(name: str) -> None:
    """Put a data set of ours that has no entry yet, such as ``folder:<path>:<split>``, into Detectron2's catalogs.

    Raises:
        UserError: if neither catalog knows the name.
    """
    if name not in DatasetCatalog:
        _register(name)


def _register(name: str) -> bool:
    """Whether the entry of `name` in Detectron2's catalogs is ours, made or renewed by this."""
    if name in DatasetCatalog and not isinstance(DatasetCatalog[name], _Records):
        _OURS.setdefault(name, DatasetCatalog[name])
        return False
    metadata = catalog.get_metadata(name)
    for registered in (DatasetCatalog, MetadataCatalog):
        if name in registered:
            registered.pop(name)
    records = _Records(name)
    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(**catalog_fields(metadata))
    _OURS[name] = records
    return True


class _Records:
    """Lists the records of a data set of ours when it is called, as ``DatasetCatalog`` wants it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> list[Record]:
        return list(catalog.get_dataset(self.name).records)


def catalog_fields(metadata: Metadata) -> dict[str, Any]:
    """What ``MetadataCatalog`` keeps of a data set: what Detectron2's evaluators and visualizer read.

    Panoptic sets have all K classes as ``stuff_classes`` and as ``thing_classes``, as Detectron2's "standard" ones do;
    the tables of ids say which are things. Where semantic segmentation is measured too, every class is in the table of
    stuff, which Detectron2's evaluator of it looks its predictions up in.
    """
    ids = metadata.contiguous_ids
    things = {dataset_id: label for dataset_id, label in ids.items() if metadata.things[label]}
    fields: dict[str, Any] = {"ignore_label": metadata.ignore_label, "evaluator_type": _evaluator_type(metadata)}
    panoptic = "panoptic_seg" in metadata.evaluators
    if panoptic or "instances" in metadata.evaluators:
        fields["thing_classes"] = list(metadata.classes)
        fields["thing_colors"] = [list(color) for color in metadata.colors]
        fields["thing_dataset_id_to_contiguous_id"] = things if panoptic else ids
    if panoptic or "sem_seg" in metadata.evaluators:
        fields["stuff_classes"] = list(metadata.classes)
        fields["stuff_colors"] = [list(color) for color in metadata.colors]
        only_stuff = {dataset_id: label for dataset_id, label in ids.items() if not metadata.things[label]}
        fields["stuff_dataset_id_to_contiguous_id"] = ids if "sem_seg" in metadata.evaluators else only_stuff
    if panoptic:
        fields["label_divisor"] = LABEL_DIVISOR
        fields["panoptic_json"] = metadata.annotation_file
        fields["panoptic_root"] = metadata.panoptic_root
    elif metadata.annotation_file is not None:
        fields["json_file"] = metadata.annotation_file
    return fields


def _evaluator_type(metadata: Metadata) -> str:
    if "panoptic_seg" in metadata.evaluators:
        return "coco_panoptic_seg"
    return "sem_seg" if "sem_seg" in metadata.evaluators else "coco"


# ------------------------------------------------------------------ Detectron2's in our terms
def get_dataset(name: str) -> Dataset:
    """A data set by its name in Detectron2, or in our catalog.

    What both know from the start (ADE20K, Cityscapes, COCO panoptic) is read by ours; what a user has registered, or
    registered anew, in Detectron2 by the function given there.

    Raises:
        UserError: if neither knows the name, or what Detectron2's metadata say is not enough.
    """
    ensure_registered(name)
    if _is_read_by_ours(name):
        return catalog.get_dataset(name)
    return Dataset(metadata_of_catalog(name), partial(_list_records, name))


def _is_read_by_ours(name: str) -> bool:
    known = name.startswith(folder.PREFIX) or name in catalog.dataset_names()
    return known and DatasetCatalog[name] is _OURS.get(name)


def name_of_records(name: str) -> str:
    """A name under which Detectron2 itself finds the records of `get_dataset`, with its metadata.

    It is another one where Detectron2 has a function of its own for a data set that is read by ours: what is measured
    has to be what was trained on and checked.

    Raises:
        UserError: if neither catalog knows the name.
    """
    ensure_registered(name)
    if not _is_read_by_ours(name) or isinstance(DatasetCatalog[name], _Records):
        return name
    other = f"{name} (read by maskformer)"
    if other not in DatasetCatalog:
        DatasetCatalog.register(other, _Records(name))
        fields = MetadataCatalog.get(name).as_dict()
        MetadataCatalog.get(other).set(**{field: value for field, value in fields.items() if field != "name"})
    return other


def get_metadata(name: str) -> Metadata:
    """As `get_dataset`, but nothing except what the labels mean."""
    return get_dataset(name).metadata


def known_things(name: str) -> tuple[bool, ...] | None:
    """For each class of a data set, whether it is countable; None if neither catalog says.

    What only ``MetadataCatalog`` has counts too: a model may be built where its training set is not registered.

    Raises:
        UserError: if there is more than one list of classes.
    """
    if name.startswith(folder.PREFIX) or name in catalog.dataset_names():
        return tuple(get_metadata(name).things)
    # Asked whether it is there first, since asking for it would make it.
    found = MetadataCatalog.get(name) if name in MetadataCatalog.list() else None
    if found is None:
        return None
    if not found.get("stuff_classes") and not found.get("thing_classes"):
        things = set((found.get("thing_dataset_id_to_contiguous_id") or {}).values())
        return tuple(label in things for label in range(max(things) + 1)) if things else None
    metadata = metadata_of_catalog(name)
    silent = metadata.evaluators == ("sem_seg",) and not any(metadata.things)
    return None if silent else tuple(metadata.things)


def with_image_id(record: Mapping[str, Any]) -> Record:
    """The record with an ``image_id``, which Detectron2 does without where nothing but labels is measured."""
    return {"image_id": record["file_name"], **record}


def _list_records(name: str) -> list[Record]:
    return [with_image_id(record) for record in DatasetCatalog.get(name)]


def metadata_of_catalog(name: str) -> Metadata:
    """Our `Metadata` from what ``MetadataCatalog`` has under a name.

    Raises:
        UserError: if it names no classes, or leaves open what they are.
    """
    found = MetadataCatalog.get(name)
    kind = _kind(name, found)
    classes = found.thing_classes if kind == "instances" else found.stuff_classes
    count = len(classes)
    things = set(range(count)) if kind == "instances" else _things_among(classes, found)
    colors = found.get("thing_colors" if kind == "instances" else "stuff_colors")
    truth = {"sem_seg": "sem_seg", "panoptic_seg": "pan_seg", "instances": "annotations"}[kind]
    semantic_too = kind == "panoptic_seg" and found.get("sem_seg_root") is not None
    return Metadata(
        name=name,
        classes=[str(label) for label in classes],
        things=[label in things for label in range(count)],
        colors=_colors(colors, count),
        ignore_label=int(found.get("ignore_label", 255 if count <= 255 else 65535)),
        evaluators=("sem_seg", kind) if semantic_too else (kind,),
        dataset_ids=_dataset_ids(found, count, kind),
        truth=("sem_seg", truth) if semantic_too else (truth,),
        annotation_file=found.get("panoptic_json" if kind == "panoptic_seg" else "json_file"),
        panoptic_root=found.get("panoptic_root"),
    )


def _kind(name: str, found: Any) -> str:
    """``sem_seg``, ``panoptic_seg`` or ``instances``: what a data set of Detectron2's has labels of."""
    stuff, things = found.get("stuff_classes"), found.get("thing_classes")
    if not stuff and not things:
        raise UserError(
            f"MetadataCatalog has no classes for data set {name!r}; set its stuff_classes, its thing_classes, or both "
            "to the same list with the tables of ids, where it is panoptic"
        )
    measured = str(found.get("evaluator_type", ""))
    if things and (not stuff or measured in ("coco", "lvis")):
        return "instances"
    if stuff and (not things or measured.endswith("sem_seg")):
        return "sem_seg"
    if list(stuff) == list(things):
        return "panoptic_seg"
    raise UserError(
        f"thing_classes and stuff_classes of data set {name!r} differ, so there is no one list of classes to predict; "
        "register it with one list for both, as Detectron2's coco_2017_train_panoptic has it"
    )


def _things_among(classes: Sequence[str], found: Any) -> set[int]:
    """Which of the stuff_classes the table of things means; none if it is about a list of their own."""
    own = found.get("thing_classes")
    table = found.get("thing_dataset_id_to_contiguous_id") or {}
    return set(table.values()) if not own or list(own) == list(classes) else set()


def _dataset_ids(found: Any, count: int, kind: str) -> list[int]:
    """(K,) ids that the data set's own files use, from the tables of the list of classes that `kind` is about."""
    tables = {"sem_seg": ("stuff",), "instances": ("thing",), "panoptic_seg": ("stuff", "thing")}[kind]
    ids = list(range(count))
    for table in tables:
        for dataset_id, label in (found.get(f"{table}_dataset_id_to_contiguous_id") or {}).items():
            if 0 <= label < count:
                ids[label] = int(dataset_id)
    return ids


def _colors(given: Any, count: int) -> list[Color]:
    if given is None or len(given) != count:
        return distinct_colors(count)
    return [(int(red), int(green), int(blue)) for red, green, blue in given]

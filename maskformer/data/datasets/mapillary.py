"""Mapillary Vistas v1.2 (65 classes) under `datasets_root`: ``mapillary_vistas_sem_seg_{train,val}``.

``mapillary_vistas/{training,validation}/images/*.jpg`` and ``mapillary_vistas/{training,validation}/labels/*.png``
(labels 0..64, 65 = unlabelled), as they are downloaded.
"""

from __future__ import annotations

from functools import partial

from maskformer.data.dataset import Dataset, Metadata, datasets_root
from maskformer.data.datasets.files import semantic_records
from maskformer.data.datasets.tables import read_table

NAMES = ("mapillary_vistas_sem_seg_train", "mapillary_vistas_sem_seg_val")
TABLE = "mapillary_vistas_65.json"
IGNORE_LABEL = 65
FOLDER = "mapillary_vistas"
FOLDERS = {"train": "training", "val": "validation"}
_REMEDY = (
    "download Mapillary Vistas from https://www.mapillary.com/dataset/vistas and unpack it as "
    "$DETECTRON2_DATASETS/mapillary_vistas, with the labels of v1.2 in {split}/labels (v2.0 has them in "
    "{split}/v1.2/labels: move that folder), which need no preparation"
)


def build(name: str) -> Dataset:
    """One of `NAMES`."""
    split = FOLDERS[name.rpartition("_")[2]]
    root = datasets_root() / FOLDER / split
    table = read_table(TABLE)
    metadata = Metadata(
        name=name,
        classes=table.classes,
        things=table.things,
        colors=table.colors,
        ignore_label=IGNORE_LABEL,
        evaluators=("sem_seg",),
        dataset_ids=table.dataset_ids,
        truth=("sem_seg",),
        remedy="use the labels of v1.2, whose label 65 is unlabelled, not those of v2.0",
    )
    remedy = _REMEDY.format(split=split)
    return Dataset(metadata, partial(semantic_records, root / "images", root / "labels", ".png", name, remedy))

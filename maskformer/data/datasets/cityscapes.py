"""Cityscapes with fine labels (19 classes) under `datasets_root`: ``cityscapes_fine_sem_seg_{train,val}``.

``cityscapes/leftImg8bit/{split}/<city>/*_leftImg8bit.png`` and
``cityscapes/gtFine/{split}/<city>/*_gtFine_labelTrainIds.png`` (labels 0..18, 255 = ignored), which
``datasets/prepare_cityscapes_sem_seg.py`` writes. Files of one picture have the same city and the same beginning, and
``<city>/<beginning>`` is its id.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from maskformer.data.dataset import Dataset, Metadata, Record, datasets_root
from maskformer.data.datasets.files import add_sizes, find_files, pair_files
from maskformer.data.datasets.tables import read_table

NAMES = ("cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val")
TABLE = "cityscapes_19.json"
IGNORE_LABEL = 255
FOLDER = "cityscapes"
IMAGES, LABELS, RAW_LABELS = "*/*_leftImg8bit.png", "*/*_gtFine_labelTrainIds.png", "*/*_gtFine_labelIds.png"
PREPARE = "run `python datasets/prepare_cityscapes_sem_seg.py`"
DOWNLOAD = (
    "download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
    "https://www.cityscapes-dataset.com/downloads/ and unpack both in $DETECTRON2_DATASETS/cityscapes"
)


def build(name: str) -> Dataset:
    """One of `NAMES`."""
    split = name.rpartition("_")[2]
    root = datasets_root() / FOLDER
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
        remedy=f"{PREPARE} with --overwrite",
    )
    return Dataset(metadata, partial(_records, root / "leftImg8bit" / split, root / "gtFine" / split, name))


def _records(images: Path, label_maps: Path, name: str) -> list[Record]:
    remedy = f"{DOWNLOAD}, then {PREPARE}"
    found, labelled = find_files(images, IMAGES, name, remedy), find_files(label_maps, LABELS, name, remedy)
    where, masks_where = str(images / IMAGES), str(label_maps / LABELS)
    return add_sizes(pair_files(found, labelled, name, where, masks_where, remedy, complete=True))

"""ADE20K-Full (847 classes) under `datasets_root`: ``ade20k_full_sem_seg_{train,val}``.

``ADE20K_2021_17_01/images_detectron2/{training,validation}/*.jpg`` and ``annotations_detectron2/…/*.tif`` (16 bits,
65535 = ignored), both written by ``datasets/prepare_ade20k_full_sem_seg.py``.
"""

from __future__ import annotations

from functools import partial

from maskformer.data.dataset import Dataset, Metadata, datasets_root
from maskformer.data.datasets.files import semantic_records
from maskformer.data.datasets.tables import read_table

NAMES = ("ade20k_full_sem_seg_train", "ade20k_full_sem_seg_val")
TABLE = "ade20k_full_847.json"
IGNORE_LABEL = 65535
FOLDER = "ADE20K_2021_17_01"
FOLDERS = {"train": "training", "val": "validation"}
PREPARE = "run `python datasets/prepare_ade20k_full_sem_seg.py`"
DOWNLOAD = (
    "ask for the full data set at https://groups.csail.mit.edu/vision/datasets/ADE20K/ and unpack its archive "
    "ADE20K_2021_17_01.zip under $DETECTRON2_DATASETS"
)


def build(name: str) -> Dataset:
    """One of `NAMES`."""
    split = FOLDERS[name.rpartition("_")[2]]
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
    images, label_maps = root / "images_detectron2" / split, root / "annotations_detectron2" / split
    remedy = f"{DOWNLOAD}, then {PREPARE}"
    return Dataset(metadata, partial(semantic_records, images, label_maps, ".tif", name, remedy))

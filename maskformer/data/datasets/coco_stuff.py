"""COCO-Stuff-10k v1.0 (171 classes) under `datasets_root`: ``coco_2017_{train,test}_stuff_10k_sem_seg``.

``coco/coco_stuff_10k/images_detectron2/{train,test}/*.jpg`` and ``annotations_detectron2/{train,test}/*.png`` (labels
0..170, 255 = ignored), both written by ``datasets/prepare_coco_stuff_10k_v1.0_sem_seg.py``. Prediction files carry
COCO's ids.
"""

from __future__ import annotations

from functools import partial

from maskformer.data.dataset import Dataset, Metadata, datasets_root
from maskformer.data.datasets.files import semantic_records
from maskformer.data.datasets.tables import read_table

NAMES = ("coco_2017_train_stuff_10k_sem_seg", "coco_2017_test_stuff_10k_sem_seg")
TABLE = "coco_stuff_171.json"
IGNORE_LABEL = 255
FOLDER = "coco/coco_stuff_10k"
PREPARE = "run `python datasets/prepare_coco_stuff_10k_v1.0_sem_seg.py`"
DOWNLOAD = (
    "download version 1.0 of COCO-Stuff 10k from https://github.com/nightrome/cocostuff10k and unpack it as "
    "$DETECTRON2_DATASETS/coco/coco_stuff_10k"
)
_LAST_THING = 90  # COCO's ids of things end here, those of stuff begin at 92


def build(name: str) -> Dataset:
    """One of `NAMES`."""
    split = name.split("_")[2]
    root = datasets_root() / FOLDER
    table = read_table(TABLE)
    metadata = Metadata(
        name=name,
        classes=table.classes,
        things=[coco_id <= _LAST_THING for coco_id in table.dataset_ids],
        colors=table.colors,
        ignore_label=IGNORE_LABEL,
        evaluators=("sem_seg",),
        dataset_ids=table.dataset_ids,
        truth=("sem_seg",),
        remedy=f"{PREPARE} with --overwrite",
    )
    images, label_maps = root / "images_detectron2" / split, root / "annotations_detectron2" / split
    remedy = f"{DOWNLOAD}, then {PREPARE}"
    return Dataset(metadata, partial(semantic_records, images, label_maps, ".png", name, remedy))

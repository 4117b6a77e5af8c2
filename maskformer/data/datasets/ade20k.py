"""ADE20K (SceneParsing, 150 classes) under `datasets_root`, by the published names.

``ade20k_sem_seg_{train,val}``: ``ADEChallengeData2016/images/{training,validation}/*.jpg`` and
``annotations_detectron2/…/*.png`` (raw annotations - 1, 255 = ignored), written by
``datasets/prepare_ade20k_sem_seg.py``.
``ade20k_panoptic_{train,val}``: the same images, ``ade20k_panoptic_{split}.json`` and the folder of PNGs of that name,
written by ``datasets/prepare_ade20k_pan_seg.py``, and the label maps above, which mIoU is measured on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from maskformer.data.dataset import Dataset, Metadata, Record, datasets_root
from maskformer.data.datasets.coco import panoptic_records
from maskformer.data.datasets.files import require_files, semantic_records
from maskformer.data.datasets.tables import read_table

NAMES = ("ade20k_sem_seg_train", "ade20k_sem_seg_val", "ade20k_panoptic_train", "ade20k_panoptic_val")
TABLE = "ade20k_150.json"
IGNORE_LABEL = 255
FOLDER = "ADEChallengeData2016"
FOLDERS = {"train": "training", "val": "validation"}
PREPARE = "run `python datasets/prepare_ade20k_sem_seg.py`"
PREPARE_PANOPTIC = "run `python datasets/prepare_ade20k_pan_seg.py`"
DOWNLOAD = (
    "download http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and unpack it under "
    "$DETECTRON2_DATASETS"
)
DOWNLOAD_INSTANCES = (
    "download http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar and unpack it in "
    "$DETECTRON2_DATASETS/ADEChallengeData2016"
)
_SEMANTIC_REMEDY = f"{DOWNLOAD}, then {PREPARE}"
_PANOPTIC_REMEDY = f"{DOWNLOAD}, {DOWNLOAD_INSTANCES}, then {PREPARE_PANOPTIC}"


def build(name: str) -> Dataset:
    """One of `NAMES`."""
    task, split = name.split("_")[1], name.split("_")[-1]
    root = datasets_root() / FOLDER
    panoptic = task == "panoptic"
    table = read_table(TABLE)
    metadata = Metadata(
        name=name,
        classes=table.classes,
        things=table.things,
        colors=table.colors,
        ignore_label=IGNORE_LABEL,
        evaluators=("sem_seg", "panoptic_seg") if panoptic else ("sem_seg",),
        dataset_ids=table.dataset_ids,
        truth=("sem_seg", "pan_seg") if panoptic else ("sem_seg",),
        remedy=f"{PREPARE} with --overwrite",
        annotation_file=str(root / f"ade20k_panoptic_{split}.json") if panoptic else None,
        panoptic_root=str(root / f"ade20k_panoptic_{split}") if panoptic else None,
    )
    images, label_maps = root / "images" / FOLDERS[split], root / "annotations_detectron2" / FOLDERS[split]
    if panoptic:
        return Dataset(metadata, partial(_panoptic_and_semantic, metadata, images, label_maps))
    return Dataset(metadata, partial(semantic_records, images, label_maps, ".png", name, _SEMANTIC_REMEDY))


def _panoptic_and_semantic(metadata: Metadata, image_root: Path, label_root: Path) -> list[Record]:
    """Panoptic records with the label map beside, which mIoU is measured on."""
    records = panoptic_records(metadata, image_root, _PANOPTIC_REMEDY)
    for record in records:
        record["sem_seg_file_name"] = str(label_root / f"{Path(record['file_name']).stem}.png")
    label_maps = (record["sem_seg_file_name"] for record in records)
    require_files(label_maps, "sem_seg_file_name", metadata.name, _SEMANTIC_REMEDY)
    return records

"""ADE20K (SceneParsing, 150 classes) under `datasets_root`, by the published names.

``ade20k_sem_seg_{train,val}``: ``ADEChallengeData2016/images/{training,validation}/*.jpg`` and
``annotations_detectron2/…/*.png`` (raw annotations - 1, 255 = ignored).
``ade20k_panoptic_{train,val}``: the same images, ``ade20k_panoptic_{split}.json`` and the folder of PNGs of that name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from maskformer.data.dataset import Dataset, Metadata, Record, datasets_root
from maskformer.data.datasets.coco import panoptic_records
from maskformer.data.datasets.files import require_files, semantic_records
from maskformer.data.datasets.tables import read_table

NAMES = ("ade20k_sem_seg_train", "ade20k_sem_seg_val", "ade20k_panoptic_train", "ade20k_panoptic_val")
IGNORE_LABEL = 255
_FOLDERS = {"train": "training", "val": "validation"}
_DOWNLOAD = (
    "download ADEChallengeData2016.zip from http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip, "
    "unpack it under $DETECTRON2_DATASETS "
)
_SEMANTIC_REMEDY = _DOWNLOAD + "and write annotations_detectron2 (annotations minus 1, so that 0 becomes 255)"
_PANOPTIC_REMEDY = _DOWNLOAD + "with annotations_instance beside it, and prepare the panoptic JSON and PNGs from them"


def build(name: str) -> Dataset:
    """One of `NAMES`."""
    task, split = name.split("_")[1], name.split("_")[-1]
    root = datasets_root() / "ADEChallengeData2016"
    panoptic = task == "panoptic"
    table = read_table("ade20k_150.json")
    metadata = Metadata(
        name=name,
        classes=table.classes,
        things=table.things,
        colors=table.colors,
        ignore_label=IGNORE_LABEL,
        evaluators=("sem_seg", "panoptic_seg") if panoptic else ("sem_seg",),
        dataset_ids=table.dataset_ids,
        truth=("sem_seg", "pan_seg") if panoptic else ("sem_seg",),
        remedy="write annotations_detectron2 again from annotations (minus 1, so that 0 becomes 255)",
        annotation_file=str(root / f"ade20k_panoptic_{split}.json") if panoptic else None,
        panoptic_root=str(root / f"ade20k_panoptic_{split}") if panoptic else None,
    )
    images, label_maps = root / "images" / _FOLDERS[split], root / "annotations_detectron2" / _FOLDERS[split]
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

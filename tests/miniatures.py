"""Every data set in a few small drawn pictures, laid out on disk as it is downloaded, and prepared by our own commands.

`write_miniature` writes what a user downloads, `prepare_miniature` runs the preparation, `make_miniature` does both.
What is drawn depends on the arguments alone.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maskformer.data.datasets.tables import read_rows
from maskformer.data.preparation import ade20k, ade20k_full, ade20k_panoptic, cityscapes, coco_stuff

VOID = -1

NAMES = {
    "ade20k": ("ade20k_sem_seg_train", "ade20k_sem_seg_val"),
    "ade20k_panoptic": ("ade20k_panoptic_train", "ade20k_panoptic_val"),
    "ade20k_full": ("ade20k_full_sem_seg_train", "ade20k_full_sem_seg_val"),
    "camvid": ("camvid_sem_seg_train", "camvid_sem_seg_val"),
    "cityscapes": ("cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val"),
    "coco_panoptic": ("coco_2017_train_panoptic", "coco_2017_val_panoptic"),
    "coco_stuff": ("coco_2017_train_stuff_10k_sem_seg", "coco_2017_test_stuff_10k_sem_seg"),
    "mapillary": ("mapillary_vistas_sem_seg_train", "mapillary_vistas_sem_seg_val"),
}
"""Family → registered names of its training and its test set."""
FAMILIES = tuple(NAMES)


def family_of(name: str) -> str:
    """The family of a registered name."""
    return next(family for family, names in NAMES.items() if name in names)


class Scene(NamedTuple):
    """One picture: `pixels` (H, W, 3) uint8, `labels` (H, W) contiguous or `VOID`, `objects` (H, W) numbers from 1."""

    pixels: np.ndarray
    labels: np.ndarray
    objects: np.ndarray


def draw(seed: tuple[int, ...], size: tuple[int, int], num_classes: int) -> Scene:
    """Two halves of one class each, four rectangles of other classes, and an unlabelled strip at the bottom.

    Args:
        seed: of all chance.
        size: (H, W), each at least 24.
        num_classes: how many classes to choose from.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    classes = rng.choice(num_classes, 6, replace=num_classes < 6)
    labels, objects = np.empty(size, np.int64), np.zeros(size, np.int64)
    labels[:, : width // 2], labels[:, width // 2 :] = classes[:2]
    for number, label in enumerate(classes[2:], start=1):
        # One in each quarter, so that none covers another.
        top, left = (number - 1) // 2 * (height // 2), (number - 1) % 2 * (width // 2)
        down, right = int(rng.integers(1, height // 8)), int(rng.integers(1, width // 8))
        box = slice(top + down, top + down + height // 4), slice(left + right, left + right + width // 4)
        labels[box], objects[box] = label, number
    labels[-2:] = VOID
    objects[-2:] = 0
    shades = np.random.default_rng(0).integers(0, 256, (num_classes + 1, 3))
    pixels = np.clip(shades[labels] + rng.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)
    return Scene(pixels, labels, objects)


def _save(pixels: np.ndarray, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def _scenes(family: str, split: int, count: int, size: tuple[int, int], classes: int) -> Iterator[tuple[int, Scene]]:
    for index in range(count):
        yield index + 1, draw((FAMILIES.index(family), split, index), size, classes)


# ------------------------------------------------------------------ as downloaded
def _write_ade20k(root: Path, counts: tuple[int, int], size: tuple[int, int]) -> None:
    own = root / "ADEChallengeData2016"
    things = [row["label"] for row in read_rows("ade20k_150.json") if row["isthing"]]
    for split, (folder, short) in enumerate((("training", "train"), ("validation", "val"))):
        for number, scene in _scenes("ade20k", split, counts[split], size, 150):
            stem = f"ADE_{short}_{number:08d}"
            _save(scene.pixels, own / "images" / folder / f"{stem}.jpg")
            _save((scene.labels + 1).astype(np.uint8), own / "annotations" / folder / f"{stem}.png")
            # Two rectangles at least are things, whatever the label map says, as the two need not agree.
            instances = np.zeros((*size, 3), np.uint8)
            for each in range(1, 5):
                mask = scene.objects == each
                label = int(scene.labels[mask][0])
                if label in things or each > 2:
                    kind = things.index(label) + 1 if label in things else each * 7
                    instances[mask] = (kind, each, 0)
            _save(instances, own / "annotations_instance" / folder / f"{stem}.png")


def _write_ade20k_full(root: Path, counts: tuple[int, int], size: tuple[int, int]) -> None:
    indices = np.array([row["ade_index"] for row in read_rows("ade20k_full_847.json")] + [0])
    folders, names = [], []
    for split, (folder, short) in enumerate((("training", "train"), ("validation", "val"))):
        place = f"ADE20K_2021_17_01/images/ADE/{folder}/urban/street"
        for number, scene in _scenes("ade20k_full", split, counts[split], size, 847):
            stem = f"ADE_{short}_{number:08d}"
            index = indices[scene.labels]
            packed = np.stack([index // 256 * 10, index % 256, scene.objects], axis=-1).astype(np.uint8)
            _save(scene.pixels, root / place / f"{stem}.jpg")
            _save(packed, root / place / f"{stem}_seg.png")
            folders.append(place)
            names.append(f"{stem}.jpg")
    presence = np.zeros((3, len(names)), np.float64)
    index_file = root / "ADE20K_2021_17_01" / "index_ade20k.pkl"
    index_file.write_bytes(pickle.dumps({"folder": folders, "filename": names, "objectPresence": presence}))


def _write_coco_stuff(root: Path, counts: tuple[int, int], size: tuple[int, int]) -> None:
    import h5py

    own = root / "coco" / "coco_stuff_10k"
    for folder in ("annotations", "imageLists"):
        (own / folder).mkdir(parents=True, exist_ok=True)
    for split, listed in enumerate(("train", "test")):
        names = []
        for number, scene in _scenes("coco_stuff", split, counts[split], size, 171):
            names.append(f"COCO_train2014_{1000 * split + number:012d}")
            _save(scene.pixels, own / "images" / f"{names[-1]}.jpg")
            with h5py.File(own / "annotations" / f"{names[-1]}.mat", "w") as file:
                file["S"] = (scene.labels + 2).T.astype(np.float64)
        (own / "imageLists" / f"{listed}.txt").write_text("\n".join(names) + "\n")


def _write_coco_panoptic(root: Path, counts: tuple[int, int], size: tuple[int, int]) -> None:
    rows = read_rows("coco_panoptic_133.json")
    for split, short in enumerate(("train", "val")):
        images, annotations = [], []
        for number, scene in _scenes("coco_panoptic", split, counts[split], size, 133):
            stem = f"{number:012d}"
            _save(scene.pixels, root / "coco" / f"{short}2017" / f"{stem}.jpg")
            ids, segments = _panoptic(scene, rows)
            packed = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
            _save(packed, root / "coco" / f"panoptic_{short}2017" / f"{stem}.png")
            images.append({"id": number, "file_name": f"{stem}.jpg", "height": size[0], "width": size[1]})
            annotations.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
        categories = [{"id": r["coco_id"], "name": r["name"], "isthing": r["isthing"]} for r in rows]
        path = root / "coco" / "annotations" / f"panoptic_{short}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _panoptic(scene: Scene, rows: list[dict[str, Any]]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Ids and segments: one for each object of a thing class (the fourth is a crowd) and for each stuff class."""
    ids = np.zeros(scene.labels.shape, np.int64)
    segments = []
    for label in np.unique(scene.labels[scene.labels >= 0]).tolist():
        own = scene.labels == label
        for number in np.unique(scene.objects[own]).tolist() if rows[label]["isthing"] else [None]:
            mask = own if number is None else own & (scene.objects == number)
            identity = 70_000 + 300 * len(segments)
            ids[mask] = identity
            segment = {"id": identity, "category_id": rows[label]["coco_id"], "area": int(mask.sum())}
            segments.append(segment | {"iscrowd": int(number == 4), "bbox": [0, 0, 1, 1]})
    return ids, segments


def _write_cityscapes(root: Path, counts: tuple[int, int], size: tuple[int, int]) -> None:
    ids = np.array([row["id"] for row in read_rows("cityscapes_19.json")] + [3])
    cities = (("aachen", "bochum"), ("frankfurt", "lindau"))
    for split, short in enumerate(("train", "val")):
        for number, scene in _scenes("cityscapes", split, counts[split], size, 19):
            city = cities[split][number % 2]
            stem = f"{city}_{number:06d}_000019"
            raw = ids[scene.labels].astype(np.uint8)
            raw[-1] = 255  # -1, the license plate, in 8 bits
            _save(scene.pixels, root / "cityscapes" / "leftImg8bit" / short / city / f"{stem}_leftImg8bit.png")
            _save(raw, root / "cityscapes" / "gtFine" / short / city / f"{stem}_gtFine_labelIds.png")


def _write_mapillary(root: Path, counts: tuple[int, int], size: tuple[int, int]) -> None:
    for split, folder in enumerate(("training", "validation")):
        for number, scene in _scenes("mapillary", split, counts[split], size, 65):
            own = root / "mapillary_vistas" / folder
            _save(scene.pixels, own / "images" / f"scene_{number}.jpg")
            labels = Image.fromarray(np.where(scene.labels == VOID, 65, scene.labels).astype(np.uint8))
            labels.putpalette(list(range(256)) * 3)
            (own / "labels").mkdir(parents=True, exist_ok=True)
            labels.save(own / "labels" / f"scene_{number}.png")


def _write_camvid(root: Path, counts: tuple[int, int], size: tuple[int, int]) -> None:
    for split, short in enumerate(("train", "val", "test")):
        for number, scene in _scenes("camvid", split, counts[min(split, 1)], size, 11):
            labels = np.where(scene.labels == VOID, 11, scene.labels).astype(np.uint8)
            _save(scene.pixels, root / "camvid" / "images" / short / f"{number}.jpg")
            _save(labels, root / "camvid" / "masks" / short / f"{number}.png")


_WRITERS: dict[str, Callable[[Path, tuple[int, int], tuple[int, int]], None]] = {
    "ade20k": _write_ade20k,
    "ade20k_panoptic": _write_ade20k,
    "ade20k_full": _write_ade20k_full,
    "camvid": _write_camvid,
    "cityscapes": _write_cityscapes,
    "coco_panoptic": _write_coco_panoptic,
    "coco_stuff": _write_coco_stuff,
    "mapillary": _write_mapillary,
}
_PREPARATIONS: dict[str, Callable[..., None]] = {
    "ade20k": ade20k.prepare,
    "ade20k_panoptic": ade20k_panoptic.prepare,
    "ade20k_full": ade20k_full.prepare,
    "cityscapes": cityscapes.prepare,
    "coco_stuff": coco_stuff.prepare,
}


def write_miniature(family: str, root: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (96, 128)) -> Path:
    """Writes a data set as it is downloaded.

    Args:
        family: one of `FAMILIES`.
        root: what ``DETECTRON2_DATASETS`` names.
        train: pictures of the training set.
        val: pictures of the test set.
        size: (H, W) of all pictures.

    Returns:
        `root`.
    """
    _WRITERS[family](root, (train, val), size)
    return root


def prepare_miniature(family: str, root: Path) -> Path:
    """Runs the family's preparation, if it needs one, in this process."""
    if family in _PREPARATIONS:
        _PREPARATIONS[family](root, ["train", "test" if family == "coco_stuff" else "val"], workers=1)
    return root


def make_miniature(family: str, root: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (96, 128)) -> Path:
    """Writes and prepares; arguments as `write_miniature`."""
    return prepare_miniature(family, write_miniature(family, root, train, val, size))

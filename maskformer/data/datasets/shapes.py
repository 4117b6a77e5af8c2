"""`shapes`: endless little scenes drawn on the fly, a pure function of (split, index).

Two kinds of stuff that only their texture tells apart (``grass``: straight stripes, ``water``: round blobs) meet along
a random curve; on them lie 3 to 6 things (``disc``, ``bar``, ``star``) that hide one another, mostly beside a
neighbour of the same class, so that connected components of a class are not objects. Colour says nothing about
class: fills are random, and half of the scenes give both kinds of stuff the same colours.

Names: ``shapes_{semantic,panoptic,instance}_{train,val}``; train has 1,000,000 records, val 200 scenes of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from maskformer.data.dataset import Dataset, Metadata, Record, distinct_colors
from maskformer.data.datasets.shapes_scene import SIZE, STUFF, THINGS, draw_scene

SCHEME = "shapes://"
IGNORE_LABEL = 255
COUNTS = {"train": 1_000_000, "val": 200}
TASKS = ("semantic", "panoptic", "instance")
NAMES = tuple(f"shapes_{task}_{split}" for task in TASKS for split in COUNTS)

_EVALUATORS = {"semantic": ("sem_seg",), "panoptic": ("sem_seg", "panoptic_seg"), "instance": ("instances",)}
_TRUTH = {"semantic": ("sem_seg",), "panoptic": ("sem_seg", "pan_seg"), "instance": ("annotations",)}


def _parse(name: str) -> tuple[str, str, int]:
    split, layer, number = name[len(SCHEME) :].split("/")
    return split, layer, int(number.removesuffix(".png"))


def read(name: str) -> np.ndarray:
    """What a ``shapes://<split>/<image|semantic|panoptic>/<index>.png`` name stands for.

    Returns:
        ``image``: (H, W, 3) uint8 RGB; ``semantic``: (H, W) uint8 labels; ``panoptic``: (H, W) int32 ids. Read-only.
    """
    split, layer, index = _parse(name)
    scene = draw_scene(split, index)
    if layer == "image":
        return scene.image
    if layer == "panoptic":
        return scene.ids
    table = np.zeros(len(STUFF) + len(scene.segments) + 8, np.uint8)
    for segment in scene.segments:
        table[segment["id"]] = segment["category_id"]
    return table[scene.ids]


class _Lazy(Sequence[dict[str, Any]]):
    """A list of dicts that is made when it is first looked at, so that listing records draws nothing."""

    def __init__(self, split: str, index: int) -> None:
        self.split, self.scene = split, index

    def _items(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, key: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        return self._items()[key]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._items())

    def __len__(self) -> int:
        return len(self._items())


class LazySegments(_Lazy):
    """``segments_info`` of a scene, with ``area``; contiguous ids over stuff and things."""

    def _items(self) -> list[dict[str, Any]]:
        return draw_scene(self.split, self.scene).segments


class LazyAnnotations(_Lazy):
    """``annotations`` of a scene: its things with visible masks as COCO RLE; contiguous ids over things only."""

    def _items(self) -> list[dict[str, Any]]:
        from pycocotools import mask as coco_mask

        scene = draw_scene(self.split, self.scene)
        return [
            {
                "id": self.scene * 100 + segment["id"],  # never 0, which COCO's evaluation takes for "no match"
                "category_id": segment["category_id"] - len(STUFF),
                "iscrowd": 0,
                "area": segment["area"],
                "bbox": segment["bbox"],
                "segmentation": coco_mask.encode(np.asfortranarray(scene.ids == segment["id"], dtype=np.uint8)),
            }
            for segment in scene.segments
            if segment["isthing"]
        ]


class ShapesRecords(Sequence[Record]):
    """The records of one split, made one by one; `segments_info` and `annotations` are drawn when looked at."""

    def __init__(self, task: str, split: str) -> None:
        self.task, self.split = task, split

    def __len__(self) -> int:
        return COUNTS[self.split]

    @overload
    def __getitem__(self, key: int) -> Record: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Record]: ...
    def __getitem__(self, key: int | slice) -> Record | Sequence[Record]:
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        index = range(len(self))[key]
        record: Record = {
            "file_name": f"{SCHEME}{self.split}/image/{index:06d}.png",
            "image_id": index,
            "height": SIZE,
            "width": SIZE,
        }
        if self.task == "instance":
            record["annotations"] = LazyAnnotations(self.split, index)
        else:
            record["sem_seg_file_name"] = f"{SCHEME}{self.split}/semantic/{index:06d}.png"
        if self.task == "panoptic":
            record["pan_seg_file_name"] = f"{SCHEME}{self.split}/panoptic/{index:06d}.png"
            record["segments_info"] = LazySegments(self.split, index)
        return record


class _Lister:
    """Makes the records of (task, split); a class so that data sets can be sent to other processes."""

    def __init__(self, task: str, split: str) -> None:
        self.task, self.split = task, split

    def __call__(self) -> ShapesRecords:
        return ShapesRecords(self.task, self.split)


def build(name: str) -> Dataset:
    """The data set ``shapes_<task>_<split>``; nothing is drawn yet."""
    _, task, split = name.split("_")
    classes = list(THINGS) if task == "instance" else [*STUFF, *THINGS]
    colors = distinct_colors(len(STUFF) + len(THINGS))[-len(classes) :]
    metadata = Metadata(
        name=name,
        classes=classes,
        things=[c in THINGS for c in classes],
        colors=colors,
        ignore_label=IGNORE_LABEL,
        evaluators=_EVALUATORS[task],
        dataset_ids=list(range(len(classes))),
        truth=_TRUTH[task],
    )
    return Dataset(metadata, _Lister(task, split), uniform=True)

"""The types that travel between rooms: supervision (`SegmentMap`) and predictions.

Shapes: B batch, L decoder layers, Q queries, K classes (without *no object*), M segments, P planes, H×W image size,
h×w mask size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNSUPERVISED = -1


class MaskPredictions(NamedTuple):
    """Output of a mask-classification network; index ``-1`` of the first axis is the model's answer.

    Attributes:
        class_logits: (L, B, Q, K+1) logits; the last class is *no object*.
        mask_logits: (L, B, Q, h, w) logits.
    """

    class_logits: Tensor
    mask_logits: Tensor


class PixelPredictions(NamedTuple):
    """Output of a per-pixel network.

    Attributes:
        logits: (L, B, K, h, w) logits; index ``-1`` of the first axis is the model's answer.
    """

    logits: Tensor


class SegmentMap:
    """All segments (mask and class) that supervise one image, as 2 to 4 bytes a pixel however many they are.

    Semantic, panoptic and instance training differ only in the segments that go in here (paper, section 3.3).

    Args:
        ids: (P, H, W) int16 or int32; `UNSUPERVISED` (-1) where nothing is supervised (ignored, void, crowd, padding),
            else an index into `labels`. P is 1 unless masks overlap.
        labels: (M,) int64 contiguous class of each segment.
        plane: (M,) int64, the plane a segment's mask lives in; None when there is one plane.

    Raises:
        ValueError: if shapes or dtypes are not the ones above.
    """

    __slots__ = ("ids", "labels", "plane")

    def __init__(self, ids: Tensor, labels: Tensor, plane: Tensor | None = None) -> None:
        if ids.dim() != 3 or ids.dtype not in (torch.int16, torch.int32):
            raise ValueError(f"ids must be (P, H, W) int16 or int32, not {tuple(ids.shape)} {ids.dtype}")
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(f"labels must be (M,) int64, not {tuple(labels.shape)} {labels.dtype}")
        if plane is None and ids.shape[0] != 1:
            raise ValueError(f"plane is needed for {ids.shape[0]} planes")
        if plane is not None and plane.shape != labels.shape:
            raise ValueError(f"plane must be {tuple(labels.shape)}, not {tuple(plane.shape)}")
        self.ids = ids
        self.labels = labels
        self.plane = plane

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __repr__(self) -> str:
        planes, height, width = self.ids.shape
        return f"SegmentMap({len(self)} segments, {height}x{width}, {planes} plane{'s' if planes > 1 else ''})"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.ids.shape[1], self.ids.shape[2]

    @property
    def planes(self) -> Tensor:
        """(M,) int64 plane of each segment."""
        return torch.zeros_like(self.labels) if self.plane is None else self.plane

    # ---------------------------------------------------------------- making
    @classmethod
    def from_label_map(cls, label_map: Tensor, ignore_label: int) -> SegmentMap:
        """One segment per class present, ascending by label: the supervision of semantic segmentation.

        Args:
            label_map: (H, W) integer class of each pixel.
            ignore_label: value of unsupervised pixels.
        """
        labels, inverse = torch.unique(label_map.long(), return_inverse=True)
        index = torch.arange(len(labels), dtype=torch.int16)
        keep = labels != ignore_label
        index = torch.where(keep, torch.cumsum(keep, 0).to(torch.int16) - 1, index.new_tensor(UNSUPERVISED))
        return cls(index[inverse][None], labels[keep])

    @classmethod
    def from_panoptic(cls, ids: Tensor, segments_info: Sequence[Mapping[str, Any]]) -> SegmentMap:
        """One segment per entry of `segments_info`, crowd regions left out: the supervision of panoptic segmentation.

        Args:
            ids: (H, W) integer segment ids; ids that `segments_info` does not list are unsupervised.
            segments_info: dicts with ``id``, contiguous ``category_id`` and optionally ``iscrowd``.
        """
        kept = [s for s in segments_info if not s.get("iscrowd", 0)]
        index = torch.full(ids.shape, UNSUPERVISED, dtype=torch.int16 if len(kept) < 2**15 else torch.int32)
        if kept:
            present, inverse = torch.unique(ids.long(), return_inverse=True)
            position = {int(s["id"]): i for i, s in enumerate(kept)}
            table = torch.tensor([position.get(int(i), UNSUPERVISED) for i in present], dtype=index.dtype)
            index = table[inverse]
        return cls(index[None], torch.tensor([int(s["category_id"]) for s in kept], dtype=torch.int64))

    @classmethod
    def from_masks(cls, masks: Tensor, labels: Tensor) -> SegmentMap:
        """Possibly overlapping masks, laid greedily into as few planes as their order allows.

        Args:
            masks: (M, H, W) bool.
            labels: (M,) int64.
        """
        count, height, width = masks.shape
        planes: list[Tensor] = []
        plane_of = torch.zeros(count, dtype=torch.int64)
        for i, mask in enumerate(masks):
            free = (p for p, plane in enumerate(planes) if bool((plane[mask] == UNSUPERVISED).all()))
            p = next(free, len(planes))
            if p == len(planes):
                planes.append(torch.full((height, width), UNSUPERVISED, dtype=torch.int16))
            planes[p][mask] = i
            plane_of[i] = p
        if not planes:
            planes = [torch.full((height, width), UNSUPERVISED, dtype=torch.int16)]
        return cls(torch.stack(planes), labels.long(), plane_of if len(planes) > 1 else None)

    # ---------------------------------------------------------------- reading
    def masks(self) -> Tensor:
        """(M, H, W) bool masks of the segments, on the device of `ids`."""
        index = torch.arange(len(self), device=self.ids.device, dtype=self.ids.dtype)
        return self.ids[self.planes] == index[:, None, None]

    def areas(self) -> Tensor:
        """(M,) int64 pixels of each segment."""
        flat = self.ids[self.ids >= 0].long()
        return torch.bincount(flat, minlength=len(self))

    def label_map(self, ignore_label: int) -> Tensor:
        """(H, W) int64 class of each pixel, `ignore_label` where unsupervised; in overlaps the last plane wins."""
        out = torch.full(self.size, ignore_label, dtype=torch.int64, device=self.ids.device)
        if len(self):
            for plane in self.ids:
                out = torch.where(plane >= 0, self.labels[plane.long().clamp(min=0)], out)
        return out

    # ---------------------------------------------------------------- changing
    def with_ids(self, ids: Tensor) -> SegmentMap:
        """The same segments drawn on other ids (P, H', W'): the one path of crops, mirrors and resizes."""
        return SegmentMap(ids, self.labels, self.plane)

    def pad(self, height: int, width: int) -> SegmentMap:
        """Padded right and bottom with unsupervised pixels to `height` × `width`."""
        own_height, own_width = self.size
        padding = (0, width - own_width, 0, height - own_height)
        return self.with_ids(torch.nn.functional.pad(self.ids, padding, value=UNSUPERVISED))

    def resize_nearest(self, height: int, width: int) -> SegmentMap:
        """Resampled by nearest, source index ⌊i·in/out⌋, to `height` × `width`."""
        own_height, own_width = self.size
        rows = torch.arange(height, device=self.ids.device) * own_height // height
        columns = torch.arange(width, device=self.ids.device) * own_width // width
        return self.with_ids(self.ids[:, rows][:, :, columns])

    def select(self, kept: Iterable[int]) -> SegmentMap:
        """Only the segments with these indices, renumbered in the given order."""
        order = torch.as_tensor(list(kept), dtype=torch.int64, device=self.labels.device)
        table = torch.full((len(self) + 1,), UNSUPERVISED, dtype=self.ids.dtype, device=self.ids.device)
        table[order] = torch.arange(len(order), dtype=self.ids.dtype, device=self.ids.device)
        plane = None if self.plane is None else self.plane[order]
        # Index -1 reads the table's last entry, which stays unsupervised.
        return SegmentMap(table[self.ids.long()], self.labels[order], plane)

    def drop_empty(self) -> SegmentMap:
        """Without the segments that have no pixel left."""
        areas = self.areas()
        return self if bool((areas > 0).all()) else self.select(torch.nonzero(areas).flatten().tolist())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SegmentMap:
        """The same segments on another device."""
        plane = None if self.plane is None else self.plane.to(device, non_blocking=non_blocking)
        return SegmentMap(
            self.ids.to(device, non_blocking=non_blocking), self.labels.to(device, non_blocking=non_blocking), plane
        )

    def pin_memory(self) -> SegmentMap:
        """The same segments in page-locked memory."""
        plane = None if self.plane is None else self.plane.pin_memory()
        return SegmentMap(self.ids.pin_memory(), self.labels.pin_memory(), plane)

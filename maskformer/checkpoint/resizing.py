"""Position tables of Swin for another window or another image size.

A table of relative positions has one row for each offset between two places of a window: (2w - 1)² of them, from
-(w - 1) to w - 1 in both directions. Its ends stay ends: the largest offset of the new window gets the value of the
largest offset of the old one.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor
from torch.nn import functional as F

_RELATIVE = re.compile(r".*\.relative_position_bias_table")
_ABSOLUTE = re.compile(r".*\.absolute_pos_embed")

Shape = tuple[int, ...]


def as_map(name: str, tensor: Tensor) -> Tensor:
    """Absolute positions as (1, C, s, s), from the (1, s², C) of the original release; anything else unchanged."""
    side = math.isqrt(tensor.shape[1]) if tensor.dim() == 3 else 0
    if not _ABSOLUTE.fullmatch(name) or side == 0 or side * side != tensor.shape[1]:
        return tensor
    return tensor.transpose(1, 2).unflatten(2, (side, side))


def can_resize(name: str, shape: Shape, wanted: Shape) -> bool:
    """Whether a tensor of ours is a position table whose two shapes differ by window or image size alone."""
    if _RELATIVE.fullmatch(name):
        return len(shape) == 2 and shape[1:] == wanted[1:] and _side(shape[0]) > 0 and _side(wanted[0]) > 0
    return bool(_ABSOLUTE.fullmatch(name)) and len(shape) == 4 and shape[:2] == wanted[:2]


def resize_table(name: str, tensor: Tensor, wanted: Shape) -> Tensor:
    """A position table at another size; see `can_resize`.

    Args:
        name: ours.
        tensor: ((2w - 1)², heads), or (1, C, s, s).
        wanted: the shape to return.
    """
    if tuple(tensor.shape) == wanted:
        return tensor
    if _RELATIVE.fullmatch(name):
        return resize_relative(tensor, (_side(wanted[0]) + 1) // 2)
    # As the model itself does with this table for images of another size.
    return F.interpolate(tensor.float(), size=wanted[2:], mode="bicubic", align_corners=False)


def resize_relative(table: Tensor, window: int) -> Tensor:
    """A table of relative positions for another window: a bicubic spline through each head's values.

    Whatever is a polynomial of degree 3 or less in each direction, such as a constant or a slope, stays one.

    Args:
        table: ((2w - 1)², heads).
        window: w', the new window.

    Returns:
        ((2w' - 1)², heads) float32.
    """
    side, new = _side(table.shape[0]), 2 * window - 1
    if side == 1:
        return table.float().expand(new * new, -1).clone()
    old_places, new_places = np.linspace(-1, 1, side), np.linspace(-1, 1, new)
    if new == 1:
        new_places = np.zeros(1)
    degree = min(3, side - 1)
    heads = table.double().numpy().reshape(side, side, -1).transpose(2, 0, 1)
    resized = [RectBivariateSpline(old_places, old_places, head, kx=degree, ky=degree, s=0) for head in heads]
    values = np.stack([spline(new_places, new_places) for spline in resized], axis=-1)
    return torch.from_numpy(values.reshape(new * new, -1)).float()


def _side(rows: int) -> int:
    """2w - 1 of a table with so many rows; 0 if no window has such a table."""
    side = math.isqrt(rows)
    return side if side * side == rows and side % 2 == 1 else 0

"""Small helpers on label maps that all metrics share."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_map(value: Any) -> np.ndarray:
    """An (H, W) integer map as a NumPy array, whether it came as an array or as a tensor on any device.

    A map of truth values has the ids 0 and 1.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(f"a map must be (H, W) of integers, not {array.shape} {array.dtype}")
    return array.astype(np.uint8) if array.dtype.kind == "b" else array


def count_values(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a map and how many pixels each has.

    Small values are counted directly. Of large ones runs are counted instead of pixels, because neighbours are mostly
    equal: thousands of values are sorted, not millions.

    Args:
        codes: (H, W) or (N,) integers.

    Returns:
        values (U,) ascending and counts (U,) int64.
    """
    flat = codes.reshape(-1)
    if flat.size == 0:
        return flat, np.zeros(0, dtype=np.int64)
    if flat.min() >= 0 and flat.max() < 4 * flat.size:
        histogram = np.bincount(flat)
        values = np.flatnonzero(histogram)
        return values, histogram[values]
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    lengths = np.diff(np.append(starts, flat.size))
    values, inverse = np.unique(flat[starts], return_inverse=True)
    counts = np.zeros(len(values), dtype=np.int64)
    np.add.at(counts, inverse, lengths)
    return values, counts


def pair_runs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two maps as runs of pixels in which neither changes: thousands of runs instead of a million pixels.

    Args:
        first: (H, W) integers.
        second: (H, W) integers.

    Returns:
        (R,) value of the first and (R,) of the second map in each run, row by row, and (R,) int64 lengths.
    """
    one, other = first.reshape(-1), second.reshape(-1)
    if one.size == 0:
        return one, other, np.zeros(0, dtype=np.int64)
    begins = np.empty(one.size, dtype=bool)
    begins[0] = True
    np.not_equal(one[1:], one[:-1], out=begins[1:])
    begins[1:] |= other[1:] != other[:-1]
    starts = np.flatnonzero(begins)
    return one[starts], other[starts], np.diff(starts, append=one.size)


def mean_of(values: np.ndarray, chosen: np.ndarray) -> float:
    """Mean of the chosen values, NaN if there are none."""
    return float(values[chosen].mean()) if chosen.any() else float("nan")

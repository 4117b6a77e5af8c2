"""The run lengths of COCO's RLE masks, checked before pycocotools, which reads beyond its memory, sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

_BITS = 5
"""Of a number in each character of a compressed string; the sixth says that more follow."""

_MORE, _SIGN, _LONGEST = 32, 16, 7  # seven characters hold any 32-bit number


def decompress(counts: str | bytes) -> np.ndarray:
    """The run lengths of a compressed string.

    From the fourth on, each number is a difference to the last but one before it.

    Returns:
        (R,) int64: zeros, ones, zeros, … down the columns.

    Raises:
        ValueError: the string is cut short or has characters that no such string has.
    """
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8) - np.uint8(48)  # what is below 48 becomes large
    if not codes.size:
        return codes.astype(np.int64)
    if codes.max() >= 64:
        raise ValueError("its counts have characters that compressed RLE does not have")
    ends = (codes < _MORE).nonzero()[0]
    if not ends.size or ends[-1] != codes.size - 1:
        raise ValueError("its counts are cut short")
    lengths = ends.copy()
    lengths[0] += 1
    lengths[1:] -= ends[:-1]
    longest = int(lengths.max())
    if longest > _LONGEST:
        raise ValueError("its counts have numbers that no mask has")
    # The sign is in the last character, which has the highest bits.
    numbers = ((codes[ends] ^ _SIGN).astype(np.int64) - _SIGN) << _BITS * (lengths - 1)
    for place in range(1, longest):
        longer = (lengths > place).nonzero()[0]
        numbers[longer] |= (codes[ends[longer] - place] & (_MORE - 1)).astype(np.int64) << _BITS * (
            lengths[longer] - 1 - place
        )
    for first in (1, 2):
        np.cumsum(numbers[first::2], out=numbers[first::2])
    return numbers


def check_runs(counts: Any, pixels: int) -> None:
    """Refuses run lengths that are not those of a mask of this many pixels.

    Args:
        counts: compressed (string) or not (sequence of whole numbers).
        pixels: height · width.

    Raises:
        ValueError: saying what is wrong with them.
        TypeError: they are neither.
        OverflowError: they are beyond all bounds.
    """
    runs = decompress(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts)
    if runs.dtype.kind == "f" and np.array_equal(runs, np.floor(runs)) and np.abs(runs).max(initial=0) <= 2**53:
        runs = runs.astype(np.int64)
    if runs.ndim != 1 or runs.dtype.kind not in "iu":
        raise TypeError("its counts are no whole numbers")
    if runs.size and (runs.min() < 0 or runs.max() > pixels):
        wrong = runs.min() if runs.min() < 0 else runs.max()
        raise ValueError(f"its counts have a run of {wrong} pixels in an image of {pixels}")
    total = int(runs.sum())
    if total != pixels:
        raise ValueError(f"its counts are those of {total} pixels, but the image has {pixels}")

"""Run lengths of compressed RLE, against those counted in the mask itself."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskformer.data.rle import check_runs, decompress


def runs_of(mask: np.ndarray) -> list[int]:
    """Lengths of zeros, ones, zeros, … down the columns, pixel by pixel."""
    lengths, value = [0], False
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return lengths


def test_by_hand() -> None:
    # Each character is 48 plus five bits, and 32 if more follow: 2, 3, then 1, then 4 - 3 = 1, then 70 - 1 = 69.
    assert decompress("2311U2").tolist() == [2, 3, 1, 4, 70]
    # A difference below zero: 9, 8, 7, then 2 - 8 = -6, whose five bits are 26.
    assert decompress(b"987J").tolist() == [9, 8, 7, 2]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (90, 1100)])
def test_runs_are_those_of_the_mask(size: tuple[int, int], share: float) -> None:
    mask = np.random.default_rng(1).random(size) < share
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert decompress(counts).tolist() == runs_of(mask)
    for form in (counts, counts.decode(), runs_of(mask), [float(run) for run in runs_of(mask)]):
        check_runs(form, mask.size)
        with pytest.raises(ValueError, match="its counts"):
            check_runs(form, mask.size + 1)

"""Models and published files that the tests of this room share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from maskformer.build import build_model
from maskformer.config import get_cfg

DATA = Path(__file__).parents[2] / "data"
R50 = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"
SWIN = "configs/ade20k-150/swin/maskformer_swin_tiny_bs16_160k.yaml"
PER_PIXEL = "configs/ade20k-150/per_pixel_baseline_R50_bs16_160k.yaml"
COCO = "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"

SMALL = {
    "MODEL.DEVICE": "cpu",
    "DATASETS.TRAIN": (),
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 48,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 7,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.SWIN.EMBED_DIM": 12,
    "MODEL.SWIN.DEPTHS": (2, 2, 2, 2),
    "MODEL.SWIN.NUM_HEADS": (1, 2, 2, 4),
}


@pytest.fixture(autouse=True)
def _no_waiting_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These tests write gigabytes, which need not survive a power failure, nor the test."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


def make_model(config: str, **settings: Any) -> nn.Module:
    """A model; `settings` are overrides with ``__`` for the dot."""
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return build_model(get_cfg(config, [part for pair in overrides.items() for part in pair]))


@pytest.fixture
def small_model() -> Callable[..., nn.Module]:
    """Makes tiny models: `small_model(config=R50, **overrides)`."""

    def make(config: str = R50, **settings: Any) -> nn.Module:
        return make_model(config, **{**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}})

    return make


def relative_positions(window: int) -> np.ndarray:
    """(w², w²) int64, pair by pair: (Δrow + w - 1)(2w - 1) + (Δcol + w - 1), Δ = query - key."""
    places = [(row, column) for row in range(window) for column in range(window)]
    return np.array(
        [[(r - s + window - 1) * (2 * window - 1) + (c - d + window - 1) for s, d in places] for r, c in places],
        dtype=np.int64,
    )


def published_layouts() -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """Name of a published file → its names, shapes and types."""
    table = json.loads((DATA / "checkpoint_layouts.json").read_text())
    layouts: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {name: {} for name in table["files"]}
    for name, variants in table["tensors"].items():
        for text, files in variants.items():
            sides, _, dtype = text.partition(" ")
            shape = tuple(int(side) for side in sides.split("x"))
            for digit in files:
                layouts[table["files"][int(digit)]][name] = (shape, dtype or "float32")
    return layouts


def synthetic_arrays(layout: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """Random values for a published file, of a size that a model can run with; what can be calculated is true."""
    generator = np.random.default_rng(0)
    arrays = {}
    for name, (shape, dtype) in layout.items():
        if name.endswith("relative_position_index"):
            array = relative_positions(round(shape[0] ** 0.5))
        elif name == "criterion.empty_weight":
            array = np.ones(shape, dtype=np.float32)
            array[-1] = 0.1
        else:
            array = generator.random(shape, dtype=np.float32) - np.float32(0.5)
            if name.endswith("running_var") or (len(shape) == 1 and name.endswith(".weight")):
                array += 1  # of norms
            elif len(shape) > 1:
                array *= np.float32(2 * np.prod(shape[1:]) ** -0.5)
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype)), name
        arrays[name] = array
    return arrays

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer.config import get_cfg
from maskformer.data.dataset import Metadata, distinct_colors


@pytest.fixture
def make_metadata() -> Callable[..., Metadata]:
    def make(classes: int = 4, ignore_label: int = 255, things: tuple[int, ...] = (), **fields: object) -> Metadata:
        defaults: dict[str, object] = {
            "name": "toy",
            "classes": [f"class {i}" for i in range(classes)],
            "things": [i in things for i in range(classes)],
            "colors": distinct_colors(classes),
            "ignore_label": ignore_label,
            "evaluators": ("sem_seg",),
            "dataset_ids": list(range(classes)),
            "truth": ("sem_seg",),
        }
        return Metadata(**(defaults | fields))  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_cfg() -> Callable[..., object]:
    """A config for small data: no workers, no resize but to 16 pixels, batch of 2; keys with '__' for '.'."""

    def make(**changes: object) -> object:
        cfg = get_cfg()
        values = {
            "DATASETS__TRAIN": ("shapes_semantic_train",),
            "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 5,
            "MODEL__DEVICE": "cpu",
            "INPUT__MIN_SIZE_TRAIN": (16,),
            "INPUT__MIN_SIZE_TEST": 16,
            "SOLVER__IMS_PER_BATCH": 2,
            "DATALOADER__NUM_WORKERS": 0,
            "SEED": 7,
        } | changes
        for key, value in values.items():
            *path, last = key.split("__")
            node = cfg
            for part in path:
                node = node[part]
            node[last] = value
        return cfg

    return make


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A semantic folder data set of noise images; sizes are (height, width)."""

    def make(
        sizes: list[tuple[int, int]], split: str = "train", classes: int = 3, yaml: str | None = None, name: str = "set"
    ) -> Path:
        root = tmp_path / name
        rng = np.random.default_rng(0)
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i, (height, width) in enumerate(sizes):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{i:03d}.png")
            labels = rng.integers(0, classes, (height, width), dtype=np.uint8)
            Image.fromarray(labels).save(root / "masks" / split / f"{i:03d}.png")
        if yaml is None:
            yaml = f"classes: [{', '.join(f'c{i}' for i in range(classes))}]\n"
        (root / "dataset.yaml").write_text(yaml)
        return root

    return make


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("MASKFORMER_TEST_DATA")
    if not folder:
        pytest.skip("MASKFORMER_TEST_DATA does not name a folder with real images")
    return Path(folder)

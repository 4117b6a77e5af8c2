from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def save() -> Callable[..., Path]:
    """Saves an array or nested list as an image of 8 bits and makes its folder."""

    def write(pixels: object, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(pixels, np.uint8)).save(path)
        return path

    return write


@pytest.fixture
def read() -> Callable[[Path], object]:
    """The values of an image as nested lists."""

    def values(path: Path) -> object:
        with Image.open(path) as image:
            return np.asarray(image).tolist()

    return values

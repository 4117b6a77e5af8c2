"""MaskFormer: mask classification for semantic, panoptic and instance segmentation.

The names a user needs are here and are loaded on first use, so that ``import maskformer`` stays cheap::

    from maskformer import get_cfg, build_model, load_model, Predictor
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"
__all__ = ["Predictor", "__version__", "build_model", "get_cfg", "load_model"]

if TYPE_CHECKING:
    from maskformer.build import build_model, load_model
    from maskformer.config import get_cfg
    from maskformer.predictor import Predictor

_HOMES = {
    "build_model": "maskformer.build",
    "get_cfg": "maskformer.config",
    "load_model": "maskformer.build",
    "Predictor": "maskformer.predictor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'maskformer' has no attribute {name!r}")

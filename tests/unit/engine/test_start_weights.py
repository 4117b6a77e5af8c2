"""What a run starts from: `MODEL.WEIGHTS`, as far as `MODEL.WEIGHTS_MIN_FIT` lets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskformer.build import build_model
from maskformer.checkpoint import export_published
from maskformer.config import get_cfg
from maskformer.engine.training import load_start_weights
from maskformer.errors import UserError

SHAPES = "configs/quickstart/shapes_panoptic.yaml"


def config(*overrides: Any) -> Any:
    return get_cfg(SHAPES, ["MODEL.DEVICE", "cpu", *overrides])


def test_min_fit_is_what_the_config_says(tmp_path: Path) -> None:
    path = export_published(build_model(config()), tmp_path / "model.pkl")
    layers = config().MODEL.MASK_FORMER.DEC_LAYERS
    deeper = ["MODEL.WEIGHTS", str(path), "MODEL.MASK_FORMER.DEC_LAYERS", layers + 1]
    cfg = config(*deeper)
    with pytest.raises(UserError, match=r"is for another head.*lower MODEL\.WEIGHTS_MIN_FIT"):
        load_start_weights(cfg, build_model(cfg))
    cfg = config(*deeper, "MODEL.WEIGHTS_MIN_FIT", 0.5)
    assert f"decoder.layers.{layers}." in load_start_weights(cfg, build_model(cfg))
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS_MIN_FIT is 1\.5 but must be between 0 and 1"):
        config("MODEL.WEIGHTS_MIN_FIT", 1.5)

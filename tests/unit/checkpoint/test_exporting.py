"""Models written under published names, and read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskformer.checkpoint import export_published, load_weights, published_state_dict, save_checkpoint
from maskformer.errors import UserError

from .conftest import PER_PIXEL, SWIN
from .files import DEEP, equal, file_of, randomised

Make = Callable[..., nn.Module]


@pytest.mark.parametrize("ending", ["pkl", "pth", "safetensors"])
def test_exports_of_every_format_come_back(tmp_path: Path, small_model: Make, ending: str) -> None:
    source, model = small_model(), small_model()
    report = load_weights(model, file_of(source, tmp_path / f"model.{ending}"), strict=True)
    assert equal(model, source)
    assert report.parts.keys() == {"backbone", "pixel decoder", "head"}
    assert report.ignored == ["criterion.empty_weight"]


@pytest.mark.parametrize(
    "settings",
    [
        {"MODEL__MASK_FORMER__ENC_LAYERS": 2},
        {"MODEL__MASK_FORMER__PRE_NORM": True},
        {"MODEL__MASK_FORMER__ENFORCE_INPUT_PROJ": True, "MODEL__SEM_SEG_HEAD__NORM": ""},
        {"MODEL__RESNETS__NORM": "BN"},
        {
            "MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
            "MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS": 1,
            "MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "transformer_encoder",
            "MODEL__MASK_FORMER__PRE_NORM": True,
        },
        {"config": SWIN, "MODEL__SWIN__APE": True, "MODEL__SWIN__PRETRAIN_IMG_SIZE": 32},
        {"config": SWIN, "MODEL__SWIN__QKV_BIAS": False, "MODEL__SWIN__PATCH_NORM": False},
        {"config": PER_PIXEL},
        DEEP,
    ],
    ids=str,
)
def test_variants_come_back(tmp_path: Path, small_model: Make, settings: dict[str, Any]) -> None:
    source, model = small_model(**settings), small_model(**settings)
    load_weights(model, file_of(source, tmp_path / "model.pkl"), strict=True)
    assert equal(model, source) or settings.get("MODEL__RESNETS__NORM") == "BN"
    assert all(
        torch.equal(tensor, source.state_dict()[name])
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    )


def test_export_refuses_what_the_layout_has_no_names_for(tmp_path: Path, small_model: Make) -> None:
    model = small_model(MODEL__BACKBONE__NAME="timm", MODEL__TIMM__NAME="mobilenetv3_small_050")
    with pytest.raises(UserError, match="published layout has no name"):
        export_published(model, tmp_path / "a.pkl")
    with pytest.raises(UserError, match="names no weight format"):
        export_published(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_other_timm_backbones_come_back_through_own_checkpoints(tmp_path: Path, small_model: Make) -> None:
    settings = {"MODEL__BACKBONE__NAME": "timm", "MODEL__TIMM__NAME": "mobilenetv3_small_050"}
    source, model = randomised(small_model(**settings)), small_model(**settings)
    load_weights(model, save_checkpoint(tmp_path, 0, model=source), strict=True)
    assert equal(model, source)


def test_no_object_weight_is_exported(small_model: Make) -> None:
    weights = published_state_dict(small_model(MODEL__MASK_FORMER__NO_OBJECT_WEIGHT=0.25))["criterion.empty_weight"]
    assert weights.tolist() == [1, 1, 1, 1, 1, 0.25]

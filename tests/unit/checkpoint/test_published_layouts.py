"""Each published layout: a file of it fills the model of its recipe completely, runs, and is exported unchanged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskformer.checkpoint import export_published, load_weights, published_state_dict

from .conftest import COCO, PER_PIXEL, R50, SWIN, make_model, published_layouts, synthetic_arrays

LAYOUTS = published_layouts()
ENCODER = {
    "MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
    "MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS": 6,
    "MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "transformer_encoder",
}
R101C = {
    "MODEL__BACKBONE__NAME": "build_resnet_deeplab_backbone",
    "MODEL__RESNETS__DEPTH": 101,
    "MODEL__RESNETS__STEM_TYPE": "deeplab",
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 128,
    "MODEL__RESNETS__RES5_MULTI_GRID": (1, 2, 4),
}
PLUS = {
    "MODEL__SEM_SEG_HEAD__NAME": "PerPixelBaselinePlusHead",
    "MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": 150,
}
COCO_SWIN = {
    "DATASETS__TRAIN": ("coco_2017_train_panoptic",),
    "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 133,
}
# Layout → config, overrides, parameters of the model (published counts where there are any).
RECIPES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "ade20k_semantic_R50": (R50, {}, 41_254_743),
    "ade20k_semantic_R101c": (R50, R101C, 60_318_039),
    "ade20k_semantic_swin_tiny": (SWIN, {}, 41_757_009),
    "ade20k_panoptic_R50": (R50, ENCODER, 45_016_407),
    "coco_panoptic_R50": (COCO, {}, 45_012_038),
    "coco_panoptic_swin_tiny": (SWIN, COCO_SWIN, None),
    "ade20k_per_pixel_R50": (PER_PIXEL, {}, 31_033_942),
    "ade20k_per_pixel_plus_R50": (PER_PIXEL, PLUS, 41_228_736),
}


def write_pickle(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file)


def old_name(name: str) -> str:
    """A name in the first published version: the pixel decoder's stood directly under the head."""
    return name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")


def test_every_layout_has_a_recipe() -> None:
    assert RECIPES.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_published_file_fills_its_model_runs_and_is_exported_unchanged(tmp_path: Path, name: str) -> None:
    config, settings, parameters = RECIPES[name]
    model = make_model(config, MODEL__DEVICE="cpu", **settings)
    if parameters is not None:
        assert sum(each.numel() for each in model.parameters()) == parameters
    arrays = synthetic_arrays(LAYOUTS[name])
    path = tmp_path / "model_final.pkl"
    write_pickle(path, {"model": arrays, "__author__": "someone", "matching_heuristics": False})
    report = load_weights(model, path, strict=True)
    assert (report.missing, report.unexpected, report.reshaped) == ([], [], {})
    assert report.family == "published MaskFormer"
    calculated = sum("relative_position_index" in each or each.startswith("criterion.") for each in arrays)
    assert len(report.loaded) == len(arrays) - calculated == sum(total for _, total in report.parts.values())

    scores = _scores(model)
    export_published(model, tmp_path / "exported.pkl")
    with (tmp_path / "exported.pkl").open("rb") as file:
        content = pickle.load(file)
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    _assert_equal(content["model"], arrays)

    # The first version of names leads to the same places. It does not concern the backbone, which is left out here.
    renamed = {old_name(each): 2 * array for each, array in arrays.items() if not each.startswith("backbone.")}
    write_pickle(path, {"model": renamed})
    doubled = load_weights(model, path)
    assert not any(each.startswith("sem_seg_head.pixel_decoder.") for each in renamed)
    assert doubled.loaded == [each for each in report.loaded if not each.startswith("network.backbone.")]
    assert doubled.unexpected == []
    published = published_state_dict(model)
    for each, array in arrays.items():
        if each.startswith("sem_seg_head."):
            assert np.array_equal(published[each].numpy(), 2 * array), each
    assert not torch.equal(_scores(model), scores)


@pytest.mark.parametrize("name", ["ade20k_semantic_swin_tiny", "ade20k_panoptic_R50", "ade20k_per_pixel_plus_R50"])
def test_whole_file_of_the_first_version_runs_alike(tmp_path: Path, name: str) -> None:
    config, settings, _ = RECIPES[name]
    model = make_model(config, MODEL__DEVICE="cpu", **settings)
    arrays = synthetic_arrays(LAYOUTS[name])
    write_pickle(tmp_path / "new.pkl", {"model": arrays})
    write_pickle(tmp_path / "old.pkl", {"model": {old_name(each): array for each, array in arrays.items()}})
    scores = []
    for file in ("new.pkl", "old.pkl"):
        report = load_weights(model, tmp_path / file, strict=True)
        scores.append(_scores(model))
        torch.nn.init.zeros_(model.get_parameter(report.loaded[-1]))
    assert torch.equal(*scores)


def _scores(model: nn.Module) -> torch.Tensor:
    """(K, 50, 90) semantic scores of one small image, which must be numbers and differ from pixel to pixel."""
    image = torch.randint(0, 256, (3, 64, 110), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = model.eval()([{"image": image, "height": 50, "width": 90}])[0]["sem_seg"]
    assert result.shape[1:] == (50, 90)
    assert bool(result.isfinite().all())
    assert float(result.std(dim=(1, 2)).max()) > 0
    return result


def _assert_equal(exported: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> None:
    assert exported.keys() == arrays.keys()
    for each, array in arrays.items():
        assert exported[each].dtype == array.dtype, each
        assert np.array_equal(exported[each], array), each

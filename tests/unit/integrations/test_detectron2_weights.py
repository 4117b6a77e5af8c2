"""Weights between Detectron2, our own checkpoints and the published files."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from maskformer import get_cfg
from maskformer.checkpoint import hub, load_weights, save_checkpoint, save_model
from maskformer.data.catalog import get_metadata
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import MaskFormerCheckpointer
from maskformer.integrations.huggingface import export_huggingface
from tests.unit.checkpoint.conftest import published_layouts, synthetic_arrays

from .detectron2_models import (
    COCO,
    EXACT,
    PER_PIXEL,
    PLUS,
    R50,
    SWIN,
    TINY,
    detectron2_model,
    labelled,
    native_model,
    randomise,
    save,
    with_segments,
    words,
)

LAYOUTS = published_layouts()
R101C = "configs/ade20k-150/maskformer_R101c_bs16_160k.yaml"
# Recipe → published file, parameters of the model.
RECIPES = {
    R50: ("ade20k_semantic_R50", 41_254_743),
    SWIN: ("ade20k_semantic_swin_tiny", 41_757_009),
    PER_PIXEL: ("ade20k_per_pixel_R50", 31_033_942),
    COCO: ("coco_panoptic_R50", 45_012_038),
    R101C: ("ade20k_semantic_R101c", 60_318_039),
    PLUS: ("ade20k_per_pixel_plus_R50", 41_228_736),
}


@pytest.fixture(autouse=True)
def _no_waiting_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These tests write large files, which need not survive."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


def load(
    model: nn.Module, path: Path, checkpointer: type[DetectionCheckpointer] = DetectionCheckpointer
) -> tuple[list[str], list[str], list[Any]]:
    """What Detectron2's checkpointer reports: missing, unexpected, of another shape."""
    found: list[tuple[list[str], list[str], list[Any]]] = []

    class Reporting(checkpointer):  # type: ignore[misc, valid-type]
        def _log_incompatible_keys(self, keys: Any) -> None:
            found.append((list(keys.missing_keys), list(keys.unexpected_keys), list(keys.incorrect_shapes)))

    Reporting(model).load(str(path))
    return found[0]


def scores(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(labelled(5)[:1])[0]["sem_seg"]
    return result


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_file_fills_the_detectron2_model_of_its_recipe_which_then_is_ours(
    tmp_path: Path, recipe: str
) -> None:
    layout, parameters = RECIPES[recipe]
    model = detectron2_model(recipe, EXACT)
    assert sum(p.numel() for p in model.parameters()) == parameters
    arrays = synthetic_arrays(LAYOUTS[layout])
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone", "matching_heuristics": False}))
    assert load(model, path) == ([], [], [])
    state = model.state_dict()
    calculated = {name for name in arrays if "relative_position_index" in name or name.startswith("criterion.")}
    assert state.keys() == arrays.keys() - calculated
    assert all(torch.equal(tensor, torch.from_numpy(arrays[name])) for name, tensor in state.items())

    native = native_model(recipe, EXACT)
    load_weights(native, path, strict=True)
    classes = native.criterion.num_classes if hasattr(native.criterion, "num_classes") else 150
    samples = labelled(classes, ((64, 64),))
    expected, found = native(with_segments(samples)), model(samples)
    assert list(found) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        ours, theirs = native.eval()(samples)[0], model.eval()(samples)[0]
    torch.testing.assert_close(theirs["sem_seg"], ours["sem_seg"], rtol=1e-5, atol=1e-5)
    assert ours["sem_seg"].std() > 0
    if recipe == COCO:
        assert torch.equal(theirs["panoptic_seg"][0], ours["panoptic_seg"][0])


@pytest.mark.parametrize("recipe", [R50, SWIN, PER_PIXEL])
def test_detectron2_model_reads_the_first_version_of_names(tmp_path: Path, recipe: str) -> None:
    model, other = randomise(detectron2_model(recipe)), detectron2_model(recipe)
    state = {name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): t for name, t in model.state_dict().items()}
    assert not any("pixel_decoder" in name for name in state)
    torch.save({"model": state}, tmp_path / "old.pth")
    assert load(other, tmp_path / "old.pth") == ([], [], [])
    assert torch.equal(scores(other), scores(model))


@pytest.mark.parametrize("recipe", [R50, SWIN, PER_PIXEL])
def test_detectron2_checkpoint_evaluates_natively(tmp_path: Path, recipe: str) -> None:
    model = randomise(detectron2_model(recipe))
    path = save(model, tmp_path, iteration=1)
    native = native_model(recipe)
    report = load_weights(native, path, strict=True)
    assert (report.family, report.missing, report.unexpected) == ("published MaskFormer", [], [])
    torch.testing.assert_close(scores(native), scores(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", [R50, SWIN])
@pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, MaskFormerCheckpointer])
def test_native_checkpoint_evaluates_in_detectron2(tmp_path: Path, recipe: str, checkpointer: Any) -> None:
    native = randomise(native_model(recipe))
    model = detectron2_model(recipe)
    save_checkpoint(tmp_path, 6, model=native)
    assert load(model, tmp_path / "model_0000006.pth", checkpointer) == ([], [], [])
    torch.testing.assert_close(scores(model), scores(native), rtol=1e-5, atol=1e-5)


def test_native_per_pixel_checkpoint_evaluates_in_detectron2_segmentor(tmp_path: Path) -> None:
    native = randomise(native_model(PER_PIXEL))
    model = detectron2_model(PER_PIXEL)
    save_model(tmp_path / "model_final.pth", model=native)
    assert load(model, tmp_path / "model_final.pth", MaskFormerCheckpointer) == ([], [], [])
    torch.testing.assert_close(scores(model), scores(native), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_detectron2_and_native_checkpoints_of_timm_models_are_interchangeable(tmp_path: Path, name: str) -> None:
    settings = {**TINY, "MODEL.BACKBONE.NAME": "timm", "MODEL.TIMM.NAME": name}
    model, native = randomise(detectron2_model(R50, settings)), native_model(R50, settings)
    load_weights(native, save(model, tmp_path), strict=True)
    torch.testing.assert_close(scores(native), scores(model), rtol=1e-5, atol=1e-5)
    randomise(native)
    save_model(tmp_path / "native.pth", model=native)
    assert load(model, tmp_path / "native.pth") == ([], [], [])
    torch.testing.assert_close(scores(model), scores(native), rtol=1e-5, atol=1e-5)


def test_detectron2_checkpointer_counts_what_is_missing_under_the_published_names(tmp_path: Path) -> None:
    model = detectron2_model(SWIN)
    state = model.state_dict()
    lacking = [
        "backbone.layers.0.blocks.1.attn.qkv.weight",
        "sem_seg_head.pixel_decoder.adapter_2.norm.bias",
        "sem_seg_head.predictor.query_embed.weight",
    ]
    for name in lacking:
        del state[name]
    state["sem_seg_head.pixel_decoder.adapter_9.weight"] = torch.zeros(1)
    # Of another number of classes: dropped, as Detectron2 does, so that what remains can be fine-tuned.
    state["sem_seg_head.predictor.class_embed.bias"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "file.pth")
    missing, unexpected, shapes = load(model, tmp_path / "file.pth")
    assert sorted(missing) == sorted([*lacking, "sem_seg_head.predictor.class_embed.bias"])
    assert unexpected == ["sem_seg_head.pixel_decoder.adapter_9.weight"]
    assert shapes == [("sem_seg_head.predictor.class_embed.bias", (3,), (6,))]


@pytest.mark.parametrize("recipe", [R50, SWIN, COCO, PLUS])
def test_detectron2_checkpointer_reports_every_tensor_of_another_shape(tmp_path: Path, recipe: str) -> None:
    settings = {**TINY, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 5, "DATASETS.TRAIN": ("shapes_panoptic_train",)}
    model = detectron2_model(recipe, settings)
    state = {name: torch.zeros(*tensor.shape, 2) for name, tensor in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "file.pth")
    missing, unexpected, shapes = load(model, tmp_path / "file.pth")
    assert {name for name, _, _ in shapes} == set(state)
    assert {name for name in missing if name.startswith("sem_seg_head.")} == {n for n in state if n[:3] == "sem"}
    assert unexpected == []


def test_detectron2_checkpointer_keeps_what_a_run_goes_on_with(tmp_path: Path) -> None:
    settings = {**TINY, "MODEL.SEM_SEG_HEAD.NORM": "BN"}
    model = detectron2_model(R50, settings)
    norm = model.sem_seg_head.pixel_decoder.native.lateral[0].norm
    norm.num_batches_tracked.fill_(41)
    path = save(model, tmp_path, iteration=12, optimizer={"state": {}, "param_groups": []})
    other = detectron2_model(R50, settings)
    rest = MaskFormerCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert path.name == (tmp_path / "last_checkpoint").read_text()
    assert (rest["iteration"], rest["optimizer"]) == (12, {"state": {}, "param_groups": []})
    assert other.sem_seg_head.pixel_decoder.native.lateral[0].norm.num_batches_tracked.item() == 41
    # Published files have no such count: its absence is reported like anything else that stays as it is.
    state = {name: t for name, t in model.state_dict().items() if "num_batches" not in name}
    torch.save({"model": state}, tmp_path / "published.pth")
    assert all("num_batches_tracked" in name for name in load(other, tmp_path / "published.pth")[0])


def test_detectron2_checkpointer_reads_hugging_faces_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**TINY, "MODEL.SWIN.NUM_HEADS": (1, 2, 4, 8), "MODEL.SWIN.EMBED_DIM": 8}
    cfg = get_cfg(SWIN, words({**settings, "DATASETS.TRAIN": ("shapes_panoptic_train",)}))
    native, model = randomise(native_model(SWIN, settings)), detectron2_model(SWIN, settings)
    export_huggingface(native, cfg, get_metadata("shapes_panoptic_train"), tmp_path)
    assert load(model, tmp_path / "model.safetensors", MaskFormerCheckpointer) == ([], [], [])
    torch.testing.assert_close(scores(model), scores(native), rtol=1e-5, atol=1e-5)
    # From the Hub, which is asked for the folder.
    monkeypatch.setattr(hub, "fetch", lambda address: tmp_path if address == "hf://owner/name" else None)
    other = detectron2_model(SWIN, settings)
    MaskFormerCheckpointer(other).load("hf://owner/name")
    assert torch.equal(scores(other), scores(model))


@pytest.mark.parametrize("pyramid", [False, True])
def test_detectron2_checkpointer_finds_the_place_of_a_backbone(tmp_path: Path, pyramid: bool) -> None:
    # Swin as its authors release it, with a norm and a classifier that have no place here.
    if pyramid:  # torchvision's names, into a backbone inside a pyramid
        settings = {
            **TINY,
            "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
            "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
            "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "p5",
        }
        model, prefix = detectron2_model(R50, settings), "backbone.bottom_up."
        native = randomise(native_model(R50).network.backbone)
        content: Any = {name.removeprefix("body."): t for name, t in native.state_dict().items()}
        content["fc.weight"] = torch.zeros(1000, 512)
        one, other = "res4.1.conv2.weight", "layer3.1.conv2.weight"
    else:
        model, prefix = detectron2_model(SWIN), "backbone."
        native = randomise(native_model(SWIN).network.backbone)
        swin = {name: t for name, t in native.state_dict().items() if not name.startswith("norm")}
        content = {"model": {**swin, "norm.weight": torch.ones(96), "norm.bias": torch.ones(96)}}
        one = other = "layers.2.blocks.1.attn.qkv.weight"
    path = tmp_path / "backbone.pth"
    torch.save(content, path)
    untouched = model.state_dict()["sem_seg_head.pixel_decoder.adapter_1.norm.weight"].clone()
    missing, unexpected, shapes = load(model, path, MaskFormerCheckpointer)
    assert (unexpected, shapes) == ([], [])
    own = ("backbone.norm", "backbone.fpn", "sem_seg_head.")  # what no such file holds
    assert all(name.startswith(own) for name in missing)
    assert torch.equal(model.state_dict()[prefix + one], content.get("model", content)[other])
    assert torch.equal(model.state_dict()["sem_seg_head.pixel_decoder.adapter_1.norm.weight"], untouched)


@pytest.mark.parametrize("whole", [True, False])
def test_detectron2_checkpointer_resizes_position_tables_as_we_do(tmp_path: Path, whole: bool) -> None:
    table = "backbone.layers.1.blocks.0.attn.relative_position_bias_table"
    state = randomise(detectron2_model(SWIN)).state_dict()
    if not whole:
        backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
        state = {name: tensor for name, tensor in backbone.items() if not name.startswith("norm")}
    torch.save({"model": state}, tmp_path / "window7.pth")
    settings = {**TINY, "MODEL.SWIN.WINDOW_SIZE": 4}
    model, native = detectron2_model(SWIN, settings), native_model(SWIN, settings)
    assert load(model, tmp_path / "window7.pth", MaskFormerCheckpointer)[2] == []
    load_weights(native, tmp_path / "window7.pth")
    assert model.state_dict()[table].shape == (49, 2)
    assert torch.equal(model.state_dict()[table], native.state_dict()[f"network.{table}"])


def test_detectron2_checkpointer_refuses_addresses_it_cannot_fetch() -> None:
    with pytest.raises(UserError, match=r"timm://resnet50 is no address of Detectron2: set MODEL.BACKBONE.NAME timm"):
        MaskFormerCheckpointer(nn.Linear(1, 1)).load("timm://resnet50")

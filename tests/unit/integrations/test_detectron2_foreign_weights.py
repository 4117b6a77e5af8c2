"""Weight files of another model, or that cannot be had, before Detectron2's checkpointer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import torch
from torch import nn

from maskformer.errors import UserError
from maskformer.integrations.detectron2 import MaskFormerCheckpointer

from .detectron2_models import PER_PIXEL, R50, SWIN, TINY, detectron2_model, native_model, randomise, save


def altered(model: nn.Module, path: Path, lacking: str = "", more: str = "", reshaped: str = "") -> Path:
    """A file of the model's weights without one tensor, with one more, or with one of another shape."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not lacking or not name.startswith(lacking)}
    state |= {more: torch.zeros(3)} if more else {}
    state |= {reshaped: torch.zeros(9, *state[reshaped].shape[1:])} if reshaped else {}
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize("recipe", [R50, SWIN, PER_PIXEL])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lacking": "sem_seg_head.pixel_decoder.mask_features.bias"},
            r"lacks network\.pixel_decoder\.embedding\.bias",
        ),
        ({"lacking": "backbone."}, r"nothing for the backbone"),
        ({"more": "sem_seg_head.predictor.other.weight"}, r"model lacks (1 \()?sem_seg_head\.predictor\.other\.weight"),
        ({"more": "teacher.weight"}, r"model lacks teacher\.weight"),
        ({"reshaped": "sem_seg_head.pixel_decoder.mask_features.bias"}, r"shape \(9,\) but the model's is \("),
    ],
)
def test_detectron2_evaluation_refuses_weights_that_do_not_fill_the_model(
    tmp_path: Path, recipe: str, change: dict[str, str], message: str
) -> None:
    model = detectron2_model(recipe)
    with pytest.raises(UserError, match=message):
        MaskFormerCheckpointer(model, strict=True).load(str(altered(model, tmp_path / "file.pth", **change)))


def test_detectron2_evaluation_refuses_another_number_of_classes_and_training_takes_it(tmp_path: Path) -> None:
    model = detectron2_model(R50)
    path = altered(model, tmp_path / "file.pth", reshaped="sem_seg_head.predictor.class_embed.bias")
    with pytest.raises(UserError, match=r"number of classes differs in network\.head\.class_head\.bias"):
        MaskFormerCheckpointer(model, strict=True).load(str(path))
    MaskFormerCheckpointer(model).load(str(path))


def test_detectron2_training_refuses_weights_of_another_model_unless_told_to_take_what_fits(tmp_path: Path) -> None:
    model, other = randomise(detectron2_model(SWIN)), detectron2_model(R50)
    path = altered(model, tmp_path / "swin.pth")
    with pytest.raises(UserError, match=r"swin\.pth is for another backbone: only 0 tensors fit"):
        MaskFormerCheckpointer(other).load(str(path))
    MaskFormerCheckpointer(other, min_fit=0.0).load(str(path))
    name = "sem_seg_head.predictor.query_embed.weight"
    assert torch.equal(other.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("backbone", ["build_resnet_backbone", "build_resnet_fpn_backbone"])
def test_detectron2_training_refuses_a_backbone_of_another_depth(tmp_path: Path, backbone: str) -> None:
    pyramid = {
        "MODEL.BACKBONE.NAME": backbone,
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "p5",
    }
    model = detectron2_model(R50, TINY if backbone == "build_resnet_backbone" else {**TINY, **pyramid})
    deeper = native_model(R50, {**TINY, "MODEL.RESNETS.DEPTH": 34}).network.backbone.state_dict()
    torch.save({name.removeprefix("body."): tensor for name, tensor in deeper.items()}, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match=r"backbone\.pth is for another backbone"):
        MaskFormerCheckpointer(model).load(str(tmp_path / "backbone.pth"))


def test_detectron2_checkpoint_of_another_model_cannot_be_resumed(tmp_path: Path) -> None:
    model = detectron2_model(R50)
    altered(model, tmp_path / "model_0000001.pth", lacking="sem_seg_head.predictor.query_embed.weight")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(UserError, match=r"lacks network\.head\.query_positions\.weight"):
        MaskFormerCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_detectron2_first_version_of_names_with_other_shapes_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = detectron2_model(R50)
    wider = detectron2_model(R50, {**TINY, "MODEL.SEM_SEG_HEAD.MASK_DIM": 24}).state_dict()
    state = {name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): tensor for name, tensor in wider.items()}
    torch.save({"model": state}, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"check MODEL\.SEM_SEG_HEAD\.MASK_DIM"):
        MaskFormerCheckpointer(model).load(str(tmp_path / "old.pth"))
    MaskFormerCheckpointer(model, min_fit=0.0).load(str(tmp_path / "old.pth"))  # what fits


def test_detectron2_checkpointer_keeps_the_names_of_heads_that_are_not_ours(tmp_path: Path) -> None:
    settings = {
        **TINY,
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    }
    model, other = randomise(detectron2_model(PER_PIXEL, settings)), detectron2_model(PER_PIXEL, settings)
    MaskFormerCheckpointer(other, strict=True).load(str(save(model, tmp_path)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize("path", ["/nope.pkl", "nope.pth", "catalog://Nothing/1", "detectron2://nothing.pkl"])
def test_detectron2_weights_that_cannot_be_had_are_told_in_a_sentence(path: str, monkeypatch: Any) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError, match=rf"the weights {path} cannot be had \(.*check MODEL\.WEIGHTS"):
        MaskFormerCheckpointer(nn.Linear(1, 1)).load(path)

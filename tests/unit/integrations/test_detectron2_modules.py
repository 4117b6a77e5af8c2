"""Backbones, pixel decoders and heads in Detectron2's registries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    build_backbone,
)
from detectron2.modeling.meta_arch.semantic_seg import SemanticSegmentor
from torch import Tensor, nn

from maskformer.build import build_model
from maskformer.config import get_cfg
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import Detectron2Backbone
from maskformer.integrations.detectron2.backbones import detectron2_backbone
from maskformer.modeling.network import MaskFormerNetwork

from .detectron2_models import (
    PER_PIXEL,
    PLUS,
    R50,
    SWIN,
    TINY,
    both,
    detectron2_config,
    detectron2_model,
    labelled,
    with_segments,
    words,
)


class ToyBackbone(Backbone):
    """A third party's, with a map that nothing reads and a square canvas."""

    def __init__(self, cfg: Any, input_shape: ShapeSpec) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape.channels, 8, 4, 4)
        self.deeper = nn.Conv2d(8, 12, 2, 2)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append(tuple(images.shape))
        fine = self.stem(images)
        return {"fine": fine, "coarse": self.deeper(fine), "unread": images}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            "unread": ShapeSpec(channels=3, stride=1),
            "coarse": ShapeSpec(channels=12, stride=8),
            "fine": ShapeSpec(channels=8, stride=4),
        }

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": 8, "square_size": 128}


class ToyDecoder(nn.Module):
    """A third party's pixel decoder, which returns more than ours."""

    def __init__(self, cfg: Any, input_shape: dict[str, ShapeSpec]) -> None:
        super().__init__()
        self.project = nn.Conv2d(input_shape["fine"].channels, cfg.MODEL.SEM_SEG_HEAD.MASK_DIM, 1)
        self.encode = nn.Conv2d(input_shape["coarse"].channels, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, 1)

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        return self.project(features["fine"]), self.encode(features["coarse"]), list(features.values())


@pytest.fixture
def toys() -> Iterator[dict[str, Any]]:
    """Both toys registered, and the settings that name them."""
    BACKBONE_REGISTRY.register(ToyBackbone)
    SEM_SEG_HEADS_REGISTRY.register(ToyDecoder)
    yield {
        **TINY,
        "MODEL.BACKBONE.NAME": "ToyBackbone",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["fine", "coarse"],
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "coarse",
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1,
    }
    for registry, name in ((BACKBONE_REGISTRY, "ToyBackbone"), (SEM_SEG_HEADS_REGISTRY, "ToyDecoder")):
        del registry._obj_map[name]


def test_detectron2_registries_have_our_modules_under_the_published_names() -> None:
    assert "MaskFormer" in META_ARCH_REGISTRY
    for name in ("D2SwinTransformer", "TimmBackbone", "timm", "build_resnet_deeplab_backbone"):
        assert name in BACKBONE_REGISTRY, name
    for name in (
        *("MaskFormerHead", "PerPixelBaselineHead", "PerPixelBaselinePlusHead"),
        *("BasePixelDecoder", "TransformerEncoderPixelDecoder"),
    ):
        assert name in SEM_SEG_HEADS_REGISTRY, name


def test_detectron2_swin_tells_its_shapes_and_computes_what_ours_does() -> None:
    native, other = both(SWIN)
    backbone = other.backbone
    assert isinstance(backbone, Backbone)
    shapes = {name: (spec.channels, spec.stride) for name, spec in backbone.output_shape().items()}
    assert shapes == {"res2": (12, 4), "res3": (24, 8), "res4": (48, 16), "res5": (96, 32)}
    assert (backbone.size_divisibility, backbone.padding_constraints) == (32, {"size_divisibility": 32})
    images = torch.rand(1, 3, 64, 96)
    expected, found = native.network.backbone.eval()(images), backbone.eval()(images)
    assert all(torch.equal(found[name], expected[name]) for name in shapes)


def test_detectron2_swin_gives_all_maps_to_heads_that_are_not_ours() -> None:
    # As of the framework's own detectors, whose heads read p2 … p5 of a pyramid on top.
    cfg = detectron2_config(SWIN, {**TINY, "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead"})
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p2"]
    assert list(build_backbone(cfg).output_shape()) == ["res2", "res3", "res4", "res5"]
    # Ours read what they name, so that no parameter lacks a gradient.
    cfg = detectron2_config(SWIN, {**TINY, "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3"]})
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res3"
    assert list(build_backbone(cfg).output_shape()) == ["res2", "res3"]


@pytest.mark.parametrize("name", ["timm", "TimmBackbone"])
def test_detectron2_takes_any_timm_model(name: str) -> None:
    settings = {**TINY, "MODEL.BACKBONE.NAME": name, "MODEL.TIMM.NAME": "resnet10t"}
    model = detectron2_model(R50, settings)
    assert model.backbone.native.architecture == "resnet10t"
    losses = model(labelled(5))
    assert len(losses) == 6
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_detectron2_backbone_of_a_third_party_and_a_toy_pixel_decoder_train_and_predict(toys: dict[str, Any]) -> None:
    settings = {
        **toys,
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "ToyDecoder",
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "transformer_encoder",
    }
    model = detectron2_model(R50, settings)
    losses = model(labelled(5, ((64, 90), (40, 64))))
    sum(losses.values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert model.backbone.seen == [(2, 3, 128, 128)]  # the square the backbone insists on
    assert "sem_seg_head.pixel_decoder.project.weight" in model.state_dict()
    assert model.eval()(labelled(5))[0]["sem_seg"].shape == (5, 50, 70)


def test_detectron2_backbone_of_a_third_party_serves_our_own_pixel_decoder(toys: dict[str, Any]) -> None:
    model = detectron2_model(R50, toys)
    names = set(model.state_dict())
    assert "sem_seg_head.pixel_decoder.adapter_1.weight" in names  # fine
    assert "sem_seg_head.pixel_decoder.layer_2.weight" in names  # coarse, the last
    assert set(model(labelled(5))) >= {"loss_ce", "loss_mask", "loss_dice"}


def test_detectron2_backbone_is_one_of_ours_in_our_own_network() -> None:
    other = detectron2_model(R50)
    backbone = Detectron2Backbone(other.backbone, ["res3", "res2"])
    assert backbone.channels == {"res2": 64, "res3": 128}
    assert backbone.strides == {"res2": 4, "res3": 8}
    assert (backbone.size_divisibility, backbone.square_size) == (0, 0)
    assert list(backbone(torch.rand(1, 3, 32, 64))) == ["res2", "res3"]
    native = build_model(get_cfg(R50, words(TINY)))
    whole = Detectron2Backbone(other.backbone)
    network = MaskFormerNetwork(whole, native.network.pixel_decoder, native.network.head)
    assert network(torch.rand(1, 3, 64, 64)).mask_logits.shape == (2, 1, 7, 16, 16)
    with pytest.raises(UserError, match="names 'res9', but the backbone has res2, res3, res4, res5"):
        Detectron2Backbone(other.backbone, ["res9"])
    with pytest.raises(UserError, match="FREEZE_AT 2 must be obeyed by Detectron2's backbone"):
        backbone.freeze(2)


def test_detectron2_pyramid_serves_as_backbone() -> None:
    settings = {
        **TINY,
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "p5",
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1,
    }
    model = detectron2_model(R50, settings)
    assert model.size_divisibility == 32  # the pyramid's own
    assert set(model(labelled(5))) >= {"loss_ce", "loss_mask", "loss_dice"}


@pytest.mark.parametrize("recipe", [PER_PIXEL, PLUS])
def test_detectron2_segmentor_with_our_per_pixel_heads_has_our_losses_and_logits(recipe: str) -> None:
    settings = {**TINY, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 5}
    native, other = both(recipe, settings)
    assert type(other) is SemanticSegmentor
    samples = labelled(5)
    expected, found = native(with_segments(samples)), other(samples)
    assert list(found) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-5)
    sum(found.values()).backward()
    assert all(p.grad is not None for p in other.parameters())
    for ours, theirs in zip(native.eval()(samples), other.eval()(samples), strict=True):
        torch.testing.assert_close(theirs["sem_seg"], ours["sem_seg"], rtol=1e-5, atol=1e-5)
        assert theirs["sem_seg"].shape == (5, 50, 70)


def test_detectron2_batch_without_supervised_pixels_has_loss_zero() -> None:
    model = detectron2_model(PER_PIXEL)
    sample = {**labelled(5)[0], "sem_seg": torch.full((64, 96), 255)}
    losses = model([sample])
    assert losses["loss_sem_seg"].item() == 0
    losses["loss_sem_seg"].backward()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((64, 96), 5), r"batch .sem_seg. has the label 5, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 5"),
        (torch.full((64, 96), -1), r"has the label -1"),
        (torch.zeros(32, 48, dtype=torch.int64), r"sem_seg of the batch is 32x48 but its images are 64x96"),
        (torch.zeros(128, 96, dtype=torch.int64), r"is 128x96 but its images are 64x96"),
    ],
)
def test_detectron2_per_pixel_head_refuses_labels_that_do_not_fit(labels: torch.Tensor, message: str) -> None:
    model = detectron2_model(PER_PIXEL, {**TINY, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5})
    with pytest.raises(UserError, match=message):
        model([{**labelled(5)[0], "sem_seg": labels}])


def test_detectron2_per_pixel_head_trains_on_labels_alone() -> None:
    model = detectron2_model(PER_PIXEL)
    sample = {key: value for key, value in labelled(5)[0].items() if key != "sem_seg"}
    with pytest.raises(ValueError, match="let the dataset mapper give sem_seg"):
        model([sample])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PIXEL_DECODER_NAME": "Nowhere"}, "PIXEL_DECODER_NAME 'Nowhere' is not registered"),
        ({"PIXEL_DECODER_NAME": "SemSegFPNHead"}, "'SemSegFPNHead' has no forward_features"),
        ({"NAME": "PerPixelBaselineHead"}, "'PerPixelBaselineHead' does not fit MODEL.META_ARCHITECTURE 'MaskFormer'"),
        ({"IN_FEATURES": ["res2", "p3"]}, "names 'p3', but the backbone has res2, res3, res4, res5"),
    ],
)
def test_detectron2_model_that_cannot_be_built_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detectron2_model(R50, {**TINY, **{f"MODEL.SEM_SEG_HEAD.{key}": value for key, value in settings.items()}})


def test_detectron2_refuses_what_its_own_parts_would_ignore() -> None:
    with pytest.raises(
        UserError, match=r"GRADIENT_CHECKPOINTING is True, but .* build_resnet_backbone is Detectron2's"
    ):
        detectron2_model(R50, {**TINY, "MODEL.BACKBONE.GRADIENT_CHECKPOINTING": True})
    detectron2_model(SWIN, {**TINY, "MODEL.BACKBONE.GRADIENT_CHECKPOINTING": True})
    with pytest.raises(UserError, match="PANOPTIC_ON or INSTANCE_ON is True, but Detectron2's SemanticSegmentor"):
        detectron2_model(PER_PIXEL, {**TINY, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True})


def test_detectron2_without_its_deeplab_project_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = detectron2_config(R50, {**TINY, "MODEL.BACKBONE.NAME": "build_resnet_deeplab_backbone"})
    monkeypatch.delitem(BACKBONE_REGISTRY._obj_map, "build_resnet_deeplab_backbone")
    with pytest.raises(UserError, match="part of Detectron2's DeepLab project, which cannot be imported"):
        detectron2_backbone(cfg)

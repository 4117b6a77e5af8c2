"""Name rules: both directions, both published versions, families by names."""

from __future__ import annotations

import pytest

from maskformer.checkpoint import layouts
from maskformer.errors import UserError

from .conftest import published_layouts

LAYOUTS = published_layouts()
KINDS = {"R101c": "ResNet with a deep stem", "swin_tiny": "Swin", "R50": "ResNet"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rules_are_bijective(name: str) -> None:
    kind = next(kind for end, kind in KINDS.items() if name.endswith(end))
    names = [each for each in LAYOUTS[name] if not each.startswith("criterion.")]
    ours = [layouts.to_ours(each, kind) for each in names]
    assert None not in ours
    assert len(set(ours)) == len(names)
    assert [layouts.to_published(each, kind) for each in ours] == names
    assert all(
        layouts.part_of(one) == layouts.part_of(other) is not None for one, other in zip(names, ours, strict=True)
    )
    assert layouts.backbone_kind([each for each in ours if each is not None]) == kind


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("backbone.stem.conv1.norm.running_var", "network.backbone.body.bn1.running_var"),
        ("backbone.res5.2.conv3.weight", "network.backbone.body.layer4.2.conv3.weight"),
        ("backbone.res2.0.shortcut.norm.bias", "network.backbone.body.layer1.0.downsample.1.bias"),
        ("sem_seg_head.pixel_decoder.adapter_1.norm.weight", "network.pixel_decoder.lateral.0.norm.weight"),
        ("sem_seg_head.pixel_decoder.layer_4.bias", "network.pixel_decoder.output.3.conv.bias"),
        ("sem_seg_head.pixel_decoder.transformer.encoder.norm.bias", "network.pixel_decoder.encoder.norm.bias"),
        (
            "sem_seg_head.predictor.transformer.decoder.layers.5.multihead_attn.in_proj_weight",
            "network.head.transformer.decoder.layers.5.cross_attn.in_proj_weight",
        ),
        (
            "sem_seg_head.predictor.transformer.encoder.layers.0.linear1.bias",
            "network.head.transformer.encoder.layers.0.linear1.bias",
        ),
        ("sem_seg_head.predictor.weight", "network.head.classifier.weight"),
    ],
)
def test_names(published: str, ours: str) -> None:
    assert layouts.to_ours(published, "ResNet") == ours
    assert layouts.to_published(ours, "ResNet") == published
    assert layouts.to_ours(published.replace("pixel_decoder.", ""), "ResNet") == ours


def test_names_that_no_rule_knows() -> None:
    assert layouts.to_ours("backbone.patch_embed.proj.weight", "ResNet") is None
    assert layouts.to_ours("sem_seg_head.pixel_decoder.adapter_0.weight", "ResNet") is None
    assert layouts.to_ours("sem_seg_head.predictor.transformer.decoder.layers.0.cross_attn.x", "ResNet") is None
    assert layouts.to_published("network.backbone.body.layer1.0.se.fc1.weight", "ResNet") is None
    assert layouts.to_published("network.backbone.body.stem.0.weight", "other") is None


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["network.head.class_head.bias"], "maskformer"),
        (["criterion.empty_weight", "sem_seg_head.predictor.weight"], "published MaskFormer"),
        (["stem.fc.bias", "stem.conv1.weight"], "Detectron2 ResNet"),
        (["layers.0.blocks.0.attn.qkv.bias"], "original Swin"),
        (["fc.weight", "layer1.0.conv1.weight"], "torchvision ResNet"),
    ],
)
def test_families(names: list[str], title: str) -> None:
    family = layouts.find_family(names)
    assert family is not None
    assert family.title == title


def test_unknown_family() -> None:
    assert layouts.find_family(["conv.weight"]) is None


def test_matching_by_the_longest_end() -> None:
    names = {"conv1.weight", "res2.0.conv1.weight", "norm.weight"}
    wanted = ["backbone.res2.0.conv1.weight", "stem.conv1.weight", "backbone.norm1.weight", "other.xconv1.weight"]
    assert layouts.match_by_suffix(wanted, names) == {
        "res2.0.conv1.weight": "backbone.res2.0.conv1.weight",
        "conv1.weight": "stem.conv1.weight",
    }
    with pytest.raises(UserError, match=r"norm\.weight would fit both a\.norm\.weight and b\.norm\.weight"):
        layouts.match_by_suffix(["a.norm.weight", "b.norm.weight"], names)

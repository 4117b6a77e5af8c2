"""Frozen stages: what belongs to them, that they stay as they are, and that everything else trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskformer.build import build_model, count_parameters
from maskformer.config import get_cfg
from maskformer.engine.optimizer import build_optimizer
from maskformer.errors import UserError
from maskformer.modeling.backbones import Backbone, SwinBackbone, build_backbone, make_resnet, make_timm_pyramid
from maskformer.structures import SegmentMap

QUICKSTART = "configs/quickstart/shapes_panoptic.yaml"
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2), "window_size": 4}
SWIN_KEYS = [
    *("MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", "8", "MODEL.SWIN.DEPTHS", "[1, 1, 2, 1]"),
    *("MODEL.SWIN.NUM_HEADS", "[1, 2, 2, 2]", "MODEL.SWIN.WINDOW_SIZE", "4", "MODEL.SWIN.APE", "True"),
]


def trained(backbone: nn.Module) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def trained_tops(backbone: nn.Module, depth: int) -> list[str]:
    """Names of what is trained, cut after `depth` components, in order."""
    names = (name for name, parameter in backbone.named_parameters() if parameter.requires_grad)
    return list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))


# ---------------------------------------------------------------- what belongs to a stage
@pytest.mark.parametrize("deep_stem", [False, True])
def test_resnet_stages(deep_stem: bool) -> None:
    stages = ["body.layer1", "body.layer2", "body.layer3", "body.layer4"]
    for count in range(6):
        backbone = make_resnet(depth=18, norm="BN", deep_stem=deep_stem, res5_dilation=2)
        backbone.freeze(count)
        stem = ["body.conv1", "body.bn1"] if count == 0 else []
        assert trained_tops(backbone, 2) == stem + stages[max(0, count - 1) :]


def test_resnet_stages_where_few_maps_are_read() -> None:
    for count, expected in {2: ["body.layer2", "body.layer3"], 4: [], 5: []}.items():
        backbone = make_resnet(depth=18, out_features=["res2", "res4"])
        backbone.freeze(count)
        assert trained_tops(backbone, 2) == expected


def test_swin_stages() -> None:
    stages = [{f"layers.{i}", f"norm{i}"} for i in range(4)]
    for count in range(6):
        backbone = SwinBackbone(**SWIN, ape=True, drop_rate=0.1)
        backbone.freeze(count)
        expected: set[str] = {"patch_embed", "absolute_pos_embed"} if count == 0 else set()
        expected.update(*stages[max(0, count - 1) :])
        tops = {name.removesuffix(".weight").removesuffix(".bias") for name in trained_tops(backbone, 2)}
        assert {top if top.startswith("layers") else top.split(".")[0] for top in tops} == expected
        assert backbone.pos_drop.training == (count == 0)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18d", {"conv1", "bn1"}),
        ("convnext_atto", {"stem_0", "stem_1"}),
        ("efficientnet_lite0", {"conv_stem", "bn1", "blocks.0"}),
        ("mobilenetv3_small_050", {"conv_stem", "bn1"}),
        ("regnetx_002", {"stem"}),
        ("swin_tiny_patch4_window7_224", {"patch_embed"}),
        ("densenet121", {"features_conv0", "features_norm0"}),
    ],
)
def test_timm_stages_are_what_their_map_depends_on(name: str, stem: set[str]) -> None:
    backbone = make_timm_pyramid(name).eval()
    parameters = dict(backbone.named_parameters())
    maps = backbone(torch.randn(1, 3, 64, 64))
    reached = {0: set(), 5: set(parameters)}
    for count in (2, 3, 4):
        gradients = torch.autograd.grad(
            maps[f"res{count}"].sum(), list(parameters.values()), allow_unused=True, retain_graph=True
        )
        reached[count] = {n for n, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    reached[1] = {n for n in parameters if any(n.startswith(f"body.{part}.") for part in stem)}
    for count in range(6):
        backbone.freeze(count)
        assert set(parameters) - trained(backbone) == reached[count]


def timm_config(name: str, count: int) -> Any:
    keys = ["MODEL.BACKBONE.NAME", "timm", "MODEL.TIMM.NAME", name, "MODEL.BACKBONE.FREEZE_AT", str(count)]
    return get_cfg(None, keys)


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (1, "MODEL.BACKBONE.FREEZE_AT 1 needs the module that makes the map of stride 4, but .* has no 'stage1'"),
        (3, "MODEL.BACKBONE.FREEZE_AT 3 cannot be told for MODEL.TIMM.NAME 'hrnet_w18_small', whose res2 depends on"),
    ],
)
def test_timm_models_whose_stages_cannot_be_told_are_refused(count: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        build_backbone(timm_config("hrnet_w18_small", count))
    assert "set the key to 0 or 5" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_build_backbone_freezes_timm_models() -> None:
    backbone = build_backbone(timm_config("mobilenetv3_small_050", 2))
    assert backbone.training
    assert trained_tops(backbone, 3) == [f"body.blocks.{i}" for i in range(1, 6)]


# ---------------------------------------------------------------- how they behave
def step(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    maps = backbone(images)
    torch.stack([feature.square().mean() for feature in maps.values()]).sum().backward()
    return maps


@pytest.mark.parametrize("name", ["BN", "SyncBN", "timm"])
def test_frozen_batch_norms_use_constant_statistics(name: str) -> None:
    backbone: Backbone = (
        make_timm_pyramid("mobilenetv3_small_050") if name == "timm" else make_resnet(depth=18, norm=name)
    )
    for buffer_name, buffer in backbone.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.0) if buffer_name.endswith("var") else buffer.normal_(0, 0.1)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.eval()(images)
    before = {buffer_name: buffer.clone() for buffer_name, buffer in backbone.named_buffers()}
    backbone.train()
    backbone.freeze(3)
    maps = step(backbone, images)
    for stage in ("res2", "res3"):
        torch.testing.assert_close(maps[stage], expected[stage])
        assert not maps[stage].requires_grad  # no graph, so no activation is kept
    assert not torch.allclose(maps["res4"], expected["res4"])
    frozen = backbone.first_stages(3).modules
    for buffer_name, buffer in backbone.named_buffers():
        constant = any(buffer_name.startswith(f"{module}.") for module in frozen)
        assert torch.equal(buffer, before[buffer_name]) == constant


def test_frozen_parts_stay_in_evaluation_mode_and_thaw_no_dropout() -> None:
    model = nn.ModuleDict({"backbone": SwinBackbone(**SWIN, drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)})
    model.backbone.freeze(2)
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == model.backbone.training == model.backbone.layers[1].training == mode
        assert not any(module.training for module in model.backbone.layers[0].modules())
    images = torch.randn(2, 3, 32, 32)
    first, second = (model.backbone(images) for _ in range(2))
    assert torch.equal(first["res2"], second["res2"])
    assert not torch.equal(first["res3"], second["res3"])


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_weights_fit_whatever_is_frozen(norm: str) -> None:
    states = []
    for count in range(6):
        backbone = make_resnet(depth=18, norm=norm)
        backbone.freeze(count)
        if states:
            backbone.load_state_dict(states[0])
        states.append(backbone.state_dict())
    assert all(list(state) == list(states[0]) for state in states)
    assert all(torch.equal(state["body.conv1.weight"], states[0]["body.conv1.weight"]) for state in states)


# ---------------------------------------------------------------- the whole model
def sample() -> dict[str, Any]:
    labels = torch.randint(0, 5, (64, 64))
    return {
        "image": torch.randint(0, 256, (3, 64, 64)).to(torch.uint8),
        "segments": SegmentMap.from_label_map(labels, 255),
    }


@pytest.mark.parametrize("keys", [["MODEL.RESNETS.NORM", "BN"], SWIN_KEYS], ids=["ResNet", "Swin"])
@pytest.mark.parametrize("count", range(6))
def test_every_trained_parameter_has_a_gradient_and_the_others_none(keys: list[str], count: int) -> None:
    small = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.MASK_FORMER.HIDDEN_DIM", "32"]
    checkpointing = ["MODEL.BACKBONE.GRADIENT_CHECKPOINTING", str(bool(count % 2))]
    freezing = ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", str(count)]
    cfg = get_cfg(QUICKSTART, [*small, *checkpointing, *freezing, *keys])
    model = build_model(cfg)
    losses = model([sample(), sample()])
    torch.stack(list(losses.values())).sum().backward()
    wrong = [name for name, p in model.named_parameters() if (p.grad is not None) != p.requires_grad]
    assert wrong == []
    frozen = count_parameters(model)[1]
    assert (frozen > 0) == (count > 0)
    everything = sum(p.numel() for p in model.network.backbone.parameters())
    assert (frozen == everything) == (count == 5)
    optimizer = build_optimizer(cfg, model)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == trained(model)

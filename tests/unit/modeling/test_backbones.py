"""Backbones equal independent implementations with the same weights, on odd sizes too."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from maskformer.config import get_cfg
from maskformer.errors import UserError
from maskformer.modeling.backbones import SwinBackbone, build_backbone, make_resnet, make_timm_pyramid
from maskformer.modeling.backbones.swin_blocks import _region_bias
from maskformer.modeling.layers import FrozenBatchNorm2d
from tests.unit.modeling.counterparts import randomize, relative_error, swin_weights

TOLERANCE = 1e-4
SMALL_SWIN = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 4), "window_size": 5}


def randomize_statistics(module: nn.Module) -> None:
    """Batch-norm buffers as after a training, near enough to identity to keep deep networks finite."""
    for name, buffer in module.named_buffers():
        if name.endswith(("running_var", "weight")):
            buffer.uniform_(0.5, 1.0)
        elif name.endswith(("running_mean", "bias")):
            buffer.normal_(0, 0.1)


def torchvision_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        maps.append(x)
    return maps


# ---------------------------------------------------------------- ResNet
@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_resnet_equals_torchvision(depth: int) -> None:
    ours = make_resnet(depth=depth).eval()
    randomize_statistics(ours)
    theirs = getattr(torchvision.models, f"resnet{depth}")(norm_layer=FrozenBatchNorm2d).eval()
    report = theirs.load_state_dict(ours.body.state_dict(), strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"]
    assert not report.unexpected_keys
    images = torch.randn(2, 3, 75, 118)
    with torch.no_grad():
        features, expected = ours(images), torchvision_maps(theirs, images)
    assert list(features) == ["res2", "res3", "res4", "res5"] == list(ours.channels) == list(ours.strides)
    for (name, feature), truth in zip(features.items(), expected, strict=True):
        assert relative_error(feature, truth) < TOLERANCE
        assert feature.shape[1] == ours.channels[name]
        assert feature.shape[2] == -(-75 // ours.strides[name])
    assert ours.size_divisibility == 0


def test_r101c_stem_and_multi_grid() -> None:
    ours = make_resnet(depth=101, deep_stem=True, res5_multi_grid=(1, 2, 4)).eval()
    randomize_statistics(ours)
    body = ours.body
    stem = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2, 1, bias=False), FrozenBatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, 1, 1, bias=False), FrozenBatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3, 1, 1, bias=False), FrozenBatchNorm2d(128), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
    )
    weights = {f"{k}": v for k, v in body.conv1.state_dict().items()}
    stem.load_state_dict(weights | {f"7.{k}": v for k, v in body.bn1.state_dict().items()})
    shortcut = nn.Sequential(nn.Conv2d(1024, 2048, 1, 2, bias=False), FrozenBatchNorm2d(2048))
    bottleneck = torchvision.models.resnet.Bottleneck
    res5 = nn.Sequential(
        bottleneck(1024, 512, 2, shortcut, dilation=1, norm_layer=FrozenBatchNorm2d),
        bottleneck(2048, 512, dilation=2, norm_layer=FrozenBatchNorm2d),
        bottleneck(2048, 512, dilation=4, norm_layer=FrozenBatchNorm2d),
    )
    res5.load_state_dict(body.layer4.state_dict())
    images = torch.randn(1, 3, 75, 118)
    with torch.no_grad():
        features = ours(images)
        res2 = body.layer1(stem(images))
        assert relative_error(features["res2"], res2) < TOLERANCE
        assert relative_error(features["res5"], res5(features["res4"])) < TOLERANCE
    assert features["res5"].shape[-2:] == (3, 4)


def test_dilation_keeps_the_stride() -> None:
    ours = make_resnet(depth=50, res5_dilation=2)
    plain = make_resnet(depth=50)
    assert ours.strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 16}
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert ours(images)["res5"].shape[-2:] == (4, 6)
        plain.load_state_dict(ours.state_dict())
        # Every second output of the dilated stage's first block sees what the strided one sees.
        first = [m.body.layer4[0] for m in (ours, plain)]
        x = torch.randn(1, 1024, 8, 8)
        assert first[0](x).shape[-1] == 8
        assert first[1](x).shape[-1] == 4
    both = make_resnet(depth=50, res4_dilation=2, res5_dilation=4)
    assert both.strides == {"res2": 4, "res3": 8, "res4": 8, "res5": 8}
    with torch.no_grad():
        assert both(images)["res5"].shape[-2:] == (8, 12)


def test_frozen_batch_norm_is_batch_norm_in_evaluation() -> None:
    frozen, reference = FrozenBatchNorm2d(6), nn.BatchNorm2d(6)
    with torch.no_grad():
        reference.weight.uniform_(0.5, 2)
        reference.bias.normal_()
        reference.running_mean.normal_()
        reference.running_var.uniform_(0.1, 3)
    frozen.load_state_dict(reference.state_dict())  # also drops the counter of batches
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(frozen.train()(x), reference.eval()(x))
    assert not list(frozen.parameters())
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("norm", "kind"), [("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm), ("GN", nn.GroupNorm)])
def test_other_norms(norm: str, kind: type[nn.Module]) -> None:
    backbone = make_resnet(depth=18, norm=norm)
    norms = [m for m in backbone.modules() if isinstance(m, kind)]
    assert len(norms) == 20
    assert all((n.weight == 1).all() and (n.bias == 0).all() for n in norms)  # none starts at zero
    assert backbone(torch.randn(2, 3, 64, 64))["res5"].isfinite().all()


def test_resnet_initialisation_is_kaiming_fan_out() -> None:
    conv = make_resnet(depth=50).body.layer4[0].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert conv.bias is None


# ---------------------------------------------------------------- Swin
@pytest.mark.parametrize("size", [(75, 118), (64, 96), (13, 9), (200, 33)])
def test_swin_equals_transformers(size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    from transformers import MaskFormerSwinBackbone, MaskFormerSwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    theirs = MaskFormerSwinBackbone(
        MaskFormerSwinConfig(
            embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 4], window_size=5, out_features=stages
        )
    ).eval()
    randomize(theirs)
    ours = SwinBackbone(**SMALL_SWIN).eval()
    ours.load_state_dict(swin_weights(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features, expected = ours(images), theirs(images).feature_maps
    for feature, truth in zip(features.values(), expected, strict=True):
        assert relative_error(feature, truth) < TOLERANCE


def test_swin_shapes_and_size() -> None:
    ours = SwinBackbone(**SMALL_SWIN).eval()
    with torch.no_grad():
        features = ours(torch.randn(2, 3, 75, 118))
    assert {name: tuple(f.shape) for name, f in features.items()} == {
        "res2": (2, 12, 19, 30),
        "res3": (2, 24, 10, 15),
        "res4": (2, 48, 5, 8),
        "res5": (2, 96, 3, 4),
    }
    assert ours.strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    assert ours.channels == {"res2": 12, "res3": 24, "res4": 48, "res5": 96}
    assert ours.size_divisibility == 32


@pytest.mark.parametrize(("height", "width"), [(10, 15), (5, 5), (3, 12)])
def test_region_bias_separates_what_the_shift_joined(height: int, width: int) -> None:
    window, shift = 5, 2
    bias = _region_bias(height, width, window, shift, torch.device("cpu"))
    height, width = -(-height // window) * window, -(-width // window) * window
    # Two tokens of a window of the shifted map may attend if they were as near before the shift.
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = (torch.roll(t, (-shift, -shift), (0, 1)) for t in (rows, columns))
    expected = []
    for top in range(0, height, window):
        for left in range(0, width, window):
            r = rows[top : top + window, left : left + window].flatten()
            c = columns[top : top + window, left : left + window].flatten()
            near = ((r[:, None] - r).abs() < window) & ((c[:, None] - c).abs() < window)
            # With a single window along a side, near in both senses needs the seam itself.
            seam = (r[:, None] < shift) != (r < shift) if top + window == height else torch.zeros_like(near)
            seam_c = (c[:, None] < shift) != (c < shift) if left + window == width else torch.zeros_like(near)
            expected.append(near & ~seam & ~seam_c)
    assert torch.equal(bias == 0, torch.stack(expected))
    assert bias.min() == (-100 if not (bias == 0).all() else 0)


def test_swin_absolute_positions_are_resized() -> None:
    ours = SwinBackbone(**SMALL_SWIN, ape=True, pretrain_image_size=32, patch_norm=False).eval()
    assert ours.absolute_pos_embed is not None
    assert ours.absolute_pos_embed.shape == (1, 12, 8, 8)
    assert ours.patch_embed.norm is None
    images = torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        table = nn.functional.interpolate(ours.absolute_pos_embed, size=(12, 10), mode="bicubic")
        x = ours.patch_embed(images) + table.permute(0, 2, 3, 1)
        expected = ours.norm0(ours.layers[0](x)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(images)["res2"], expected)


def test_swin_scale_of_the_scores() -> None:
    torch.manual_seed(1)
    plain = SwinBackbone(**SMALL_SWIN).eval()
    scaled = SwinBackbone(**SMALL_SWIN, qk_scale=12**-0.5).eval()
    scaled.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        # Heads of the first two stages have 12 channels, of the later ones 12 and 24.
        torch.testing.assert_close(scaled(images)["res4"], plain(images)["res4"])
        assert not torch.allclose(scaled(images)["res5"], plain(images)["res5"])


def test_swin_stochastic_depth_rises_over_all_blocks() -> None:
    ours = SwinBackbone(**SMALL_SWIN, drop_path_rate=0.35)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in ours.layers for b in stage.blocks]
    assert rates == pytest.approx([0.05 * i for i in range(8)])
    block = ours.layers[3].blocks[1]
    block.drop_path.drop_prob = 1.0 - 1e-9  # every branch of every sample dropped
    x = torch.randn(2, 3, 4, 96)
    assert torch.equal(block.train()(x, _region_bias(3, 4, 5, 2, x.device)), x)


def test_swin_initialisation() -> None:
    ours = SwinBackbone(embed_dim=96, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24), window_size=12)
    table = ours.layers[3].blocks[0].attn.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.05)
    # PyTorch's default for linear layers: uniform within 1/√fan_in, biases too.
    linear = ours.layers[0].blocks[0].attn.qkv
    assert linear.bias.abs().max().item() == pytest.approx(96**-0.5, rel=0.05)
    shifts = [block.shift for stage in ours.layers for block in stage.blocks]
    assert shifts == [0, 6] * 4


def test_swin_dropout_rates_reach_their_layers() -> None:
    ours = SwinBackbone(**SMALL_SWIN, drop_rate=0.25, attn_drop_rate=0.5, drop_path_rate=0.0)
    assert {m.p for m in ours.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert {m.attention_dropout for m in ours.modules() if hasattr(m, "attention_dropout")} == {0.5}
    images = torch.randn(1, 3, 32, 32)
    assert not torch.equal(ours(images)["res2"], ours(images)["res2"])
    ours.eval()
    assert torch.equal(ours(images)["res2"], ours(images)["res2"])


# ---------------------------------------------------------------- both
@pytest.mark.parametrize("make", [lambda: make_resnet(depth=18), lambda: SwinBackbone(**SMALL_SWIN)])
def test_channels_last_gives_equal_numbers(make) -> None:  # type: ignore[no-untyped-def]
    backbone = make().eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        plain = backbone(images)
        backbone.to(memory_format=torch.channels_last)
        last = backbone(images.contiguous(memory_format=torch.channels_last))
    for name in plain:
        assert relative_error(last[name], plain[name]) < 1e-5
        assert last[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["MODEL.BACKBONE.NAME build_resnet_backbone", "MODEL.BACKBONE.NAME D2SwinTransformer"])
def test_stages_that_nothing_reads_are_not_built(name: str) -> None:
    keys = ["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res2', 'res3']", "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res4"]
    backbone = build_backbone(get_cfg(None, [*name.split(), *keys])).train()
    features = backbone(torch.randn(1, 3, 64, 64))
    assert list(features) == ["res2", "res3", "res4"] == list(backbone.channels)
    sum(f.square().mean() for f in features.values()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


# ---------------------------------------------------------------- timm
@pytest.mark.parametrize(
    "name", ["convnext_atto", "mobilenetv3_small_100", "swin_tiny_patch4_window7_224", "resnet18d"]
)
def test_timm_pyramids(name: str) -> None:
    backbone = make_timm_pyramid(name)
    features = backbone(torch.randn(2, 3, 96, 64))
    assert {n: tuple(f.shape) for n, f in features.items()} == {
        n: (2, backbone.channels[n], 96 // s, 64 // s) for n, s in backbone.strides.items()
    }
    assert list(backbone.strides.values()) == [4, 8, 16, 32]
    sum(f.square().mean() for f in features.values()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_timm_channels_last_maps_are_turned() -> None:
    backbone = make_timm_pyramid("swin_tiny_patch4_window7_224").eval()
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        raw = backbone.body(images)
        torch.testing.assert_close(backbone(images)["res3"], raw[1].permute(0, 3, 1, 2))


def test_timm_without_the_last_stage() -> None:
    backbone = make_timm_pyramid("resnet18", out_features=["res2", "res4"])
    assert not hasattr(backbone.body, "layer4")
    assert backbone.channels == {"res2": 64, "res4": 256}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet5", "MODEL.TIMM.NAME 'resnet5' is not a model of timm .*: did you mean resnet50"),
        ("qqqqqq", "MODEL.TIMM.NAME 'qqqqqq' is not a model of timm .*: timm.list_models"),
        ("vit_tiny_patch16_224", "strides .* choose a model with strides 4, 8, 16 and 32"),
        ("maxvit_nano_rw_256", "MODEL.TIMM.NAME 'maxvit_nano_rw_256' cannot run on images of other sizes"),
    ],
)
def test_timm_refuses(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_timm_pyramid(name)


def test_timm_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(UserError, match=r"no connection.*MODEL\.TIMM\.PRETRAINED False"):
        make_timm_pyramid("resnet18", pretrained=True)


# ---------------------------------------------------------------- config
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"BACKBONE.NAME": "resnet"}, "MODEL.BACKBONE.NAME 'resnet' is unknown: choose one of build_resnet"),
        ({"RESNETS.DEPTH": 49}, "MODEL.RESNETS.DEPTH 49 cannot be built: choose one of 18"),
        ({"RESNETS.NORM": "LN"}, "MODEL.RESNETS.NORM 'LN' cannot be built: choose one of FrozenBN"),
        ({"RESNETS.RES5_MULTI_GRID": [1, 2, 4]}, "set the name to build_resnet_deeplab_backbone"),
        (
            {
                "BACKBONE.NAME": "build_resnet_deeplab_backbone",
                "RESNETS.DEPTH": 18,
                "RESNETS.RES5_MULTI_GRID": [1, 2, 4],
            },
            "one number for each of the 2 blocks",
        ),
        ({"RESNETS.RES5_DILATION": 3}, "MODEL.RESNETS.RES5_DILATION 3"),
        ({"SEM_SEG_HEAD.IN_FEATURES": ["res1"]}, "MODEL.SEM_SEG_HEAD.IN_FEATURES names 'res1'"),
        ({"SEM_SEG_HEAD.IN_FEATURES": []}, "MODEL.SEM_SEG_HEAD.IN_FEATURES is empty"),
        ({"MASK_FORMER.TRANSFORMER_IN_FEATURE": "res6"}, "TRANSFORMER_IN_FEATURE names 'res6'.*or transformer_encoder"),
        ({"BACKBONE.NAME": "D2SwinTransformer", "SWIN.NUM_HEADS": [3, 6, 12, 25]}, "does not divide the 768 channels"),
        ({"BACKBONE.NAME": "D2SwinTransformer", "SWIN.DEPTHS": [2, 2]}, "four numbers each"),
        ({"BACKBONE.NAME": "D2SwinTransformer", "SWIN.WINDOW_SIZE": 0}, "MODEL.SWIN.WINDOW_SIZE 0 must be at least 1"),
    ],
)
def test_build_backbone_refuses(changes: dict[str, object], sentence: str) -> None:
    cfg = get_cfg()
    for key, value in changes.items():
        section, name = key.split(".")
        cfg.MODEL[section][name] = value
    with pytest.raises(UserError, match=sentence) as caught:
        build_backbone(cfg)
    assert "\n" not in str(caught.value)

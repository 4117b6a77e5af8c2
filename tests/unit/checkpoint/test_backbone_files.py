"""ImageNet backbones as recipes name them: whole files of Detectron2, of Swin's authors and of torchvision.

Their names and shapes are written down here again, from what the architectures are, not from our rules.
"""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from maskformer.checkpoint import load_weights, read_state_dict
from maskformer.config import get_cfg
from maskformer.errors import UserError
from maskformer.modeling.backbones import build_backbone

from .conftest import published_layouts
from .test_loading import randomised

Shapes = dict[str, tuple[int, ...]]
ADE = "configs/ade20k-150/"
RESNETS = {
    "R-50.pkl": (ADE + "maskformer_R50_bs16_160k.yaml", (3, 4, 6, 3), False),
    "R-101.pkl": (ADE + "maskformer_R101_bs16_160k.yaml", (3, 4, 23, 3), False),
    "R-103.pkl": (ADE + "maskformer_R101c_bs16_160k.yaml", (3, 4, 23, 3), True),
}
SWINS = {
    "swin_tiny_patch4_window7_224": ("maskformer_swin_tiny_bs16_160k", 96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_small_patch4_window7_224": ("maskformer_swin_small_bs16_160k", 96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_base_patch4_window12_384_22k": (
        *("maskformer_swin_base_IN21k_384_bs16_160k_res640", 128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    ),
    "swin_large_patch4_window12_384_22k": (
        *("maskformer_swin_large_IN21k_384_bs16_160k_res640", 192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    ),
}


def resnet_shapes(blocks: tuple[int, ...], deep_stem: bool) -> Shapes:
    """Detectron2's names of a ResNet, as in its ImageNet files."""
    shapes: Shapes = {}

    def conv(name: str, out_channels: int, in_channels: int, side: int) -> None:
        shapes[f"{name}.weight"] = (out_channels, in_channels, side, side)
        shapes.update({f"{name}.norm.{k}": (out_channels,) for k in ("weight", "bias", "running_mean", "running_var")})

    if deep_stem:
        conv("stem.conv1", 64, 3, 3)
        conv("stem.conv2", 64, 64, 3)
        conv("stem.conv3", 128, 64, 3)
    else:
        conv("stem.conv1", 64, 3, 7)
    channels = 128 if deep_stem else 64
    for stage, count in enumerate(blocks):
        inner, outer = 64 * 2**stage, 256 * 2**stage
        for i in range(count):
            name = f"res{stage + 2}.{i}"
            if i == 0:
                conv(f"{name}.shortcut", outer, channels, 1)
            conv(f"{name}.conv1", inner, channels, 1)
            conv(f"{name}.conv2", inner, inner, 3)
            conv(f"{name}.conv3", outer, inner, 1)
            channels = outer
    return shapes


def swin_shapes(width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int) -> Shapes:
    """Names of the original release, with what it holds besides: the last norm, the classifier, masks and indices."""
    shapes: Shapes = {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,)}
    shapes |= {"patch_embed.norm.weight": (width,), "patch_embed.norm.bias": (width,)}
    for stage, count in enumerate(depths):
        c, tokens = width * 2**stage, window**2
        for i in range(count):
            block = f"layers.{stage}.blocks.{i}."
            shapes[block + "attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
            shapes[block + "attn.relative_position_index"] = (tokens, tokens)
            for name, out, inside in (
                *(("attn.qkv", 3 * c, c), ("attn.proj", c, c), ("mlp.fc1", 4 * c, c), ("mlp.fc2", c, 4 * c)),
            ):
                shapes |= {f"{block}{name}.weight": (out, inside), f"{block}{name}.bias": (out,)}
            shapes |= {f"{block}{norm}.{kind}": (c,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
            if i % 2:
                shapes[block + "attn_mask"] = (4, tokens, tokens)
        if stage < 3:
            merge = f"layers.{stage}.downsample."
            shapes |= {merge + "reduction.weight": (2 * c, 4 * c)}
            shapes |= {merge + "norm.weight": (4 * c,), merge + "norm.bias": (4 * c,)}
    shapes |= {"norm.weight": (8 * width,), "norm.bias": (8 * width,)}
    return shapes | {"head.weight": (1000, 8 * width), "head.bias": (1000,)}


def backbone_alone(config: str, **settings: Any) -> nn.Module:
    """What `load_weights` fills, without pixel decoder and head."""
    model = nn.Module()
    model.network = nn.Module()
    model.network.backbone = build_backbone(get_cfg(config, [part for pair in settings.items() for part in pair]))
    return model


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("ade20k_semantic_R50", resnet_shapes((3, 4, 6, 3), False)),
        ("ade20k_semantic_R101c", resnet_shapes((3, 4, 23, 3), True)),
        ("ade20k_semantic_swin_tiny", swin_shapes(96, (2, 2, 6, 2), (3, 6, 12, 24), 7)),
    ],
    ids=["R50", "R101c", "Swin-T"],
)
def test_the_names_here_are_those_of_the_published_models(name: str, shapes: Shapes) -> None:
    layout = published_layouts()[name]
    published = {key.removeprefix("backbone."): shape for key, (shape, _) in layout.items() if "backbone." in key}
    extra = ("norm.", "head.", "norm0.", "norm1.", "norm2.", "norm3.")
    assert {key: shape for key, shape in published.items() if not key.startswith(extra)} == {
        key: shape for key, shape in shapes.items() if not key.startswith(extra) and not key.endswith("attn_mask")
    }


@pytest.mark.parametrize(
    ("name", "classifier"), [("R-50.pkl", "stem.fc"), ("R-101.pkl", "stem.fc"), ("R-103.pkl", "fc")]
)
def test_resnets_of_detectron2(tmp_path: Path, name: str, classifier: str) -> None:
    config, blocks, deep_stem = RESNETS[name]
    generator = np.random.default_rng(0)
    shapes = resnet_shapes(blocks, deep_stem)
    arrays = {key: generator.random(shape, dtype=np.float32) for key, shape in shapes.items()}
    beside = {f"{classifier}.weight": np.zeros((1000, 2048)), f"{classifier}.bias": np.zeros(1000)}
    content = {"model": {**arrays, **beside}, "__author__": "torchvision", "matching_heuristics": True}
    # Theirs is protocol 2, which takes Python 3 its time.
    (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2 if name == "R-50.pkl" else 4))
    model = backbone_alone(config)
    report = load_weights(model, tmp_path / name)
    assert (report.family, report.missing, report.unexpected) == ("Detectron2 ResNet", [], [])
    assert sorted(report.ignored) == sorted(beside)
    assert report.parts["backbone"] == (len(shapes), len(shapes))
    body = dict(model.state_dict())
    stem = "conv1.0.weight" if deep_stem else "conv1.weight"
    for key, theirs in {stem: "stem.conv1.weight", "layer4.2.bn3.running_var": "res5.2.conv3.norm.running_var"}.items():
        assert np.array_equal(body[f"network.backbone.body.{key}"].numpy(), arrays[theirs])


def test_a_resnet_for_another_depth_or_stem_is_refused(tmp_path: Path) -> None:
    shapes = resnet_shapes((3, 4, 23, 3), True)
    torch.save({"model": {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}}, tmp_path / "R-103.pth")
    for name in ("R-50.pkl", "R-101.pkl"):
        with pytest.raises(UserError, match=r"MODEL\.RESNETS"):
            load_weights(backbone_alone(RESNETS[name][0]), tmp_path / "R-103.pth")


@pytest.mark.parametrize("name", SWINS)
def test_original_swins(tmp_path: Path, name: str) -> None:
    config, *layout = SWINS[name]
    assert get_cfg(f"{ADE}swin/{config}.yaml").MODEL.WEIGHTS == f"{name}.pkl"
    # All but the smallest without values: what matters is that every name has its place.
    small = "tiny" in name
    with torch.device("cpu" if small else "meta"):
        model = backbone_alone(f"{ADE}swin/{config}.yaml")
    state = {key: torch.full((), 0.5).expand(shape) for key, shape in swin_shapes(*layout).items()}  # type: ignore[arg-type]
    torch.save({"model": state}, tmp_path / f"{name}.pth")
    report = load_weights(model, tmp_path / f"{name}.pth")
    assert (report.family, report.unexpected, report.reshaped) == ("original Swin", [], {})
    assert report.missing == [f"network.backbone.norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    wanted = [key for key in state if not key.startswith(("norm.", "head.")) and "attn_mask" not in key]
    assert len(report.loaded) == sum("relative_position_index" not in key for key in wanted)
    if small:
        assert all(bool((model.state_dict()[key] == 0.5).all()) for key in report.loaded)


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_resnets_give_torchvisions_maps(tmp_path: Path, depth: int) -> None:
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    with torch.no_grad():
        for key, tensor in theirs.state_dict().items():
            if key.endswith(("running_var", "running_mean")) or "bn" in key:
                tensor.copy_(torch.rand_like(tensor.float()) + 0.5)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    model = backbone_alone(RESNETS["R-50.pkl"][0], **{"MODEL.RESNETS.DEPTH": depth})
    randomised(model)
    report = load_weights(model, tmp_path / "resnet.pth")
    assert (report.family, report.missing, report.unexpected) == ("torchvision ResNet", [], [])
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        ours = model.eval().network.backbone(images)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        for name, stage in zip(ours, (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
            x = stage(x)
            assert float((ours[name] - x).abs().max() / x.abs().max()) < 1e-5, name


LOCAL_NAMES = ("R-101.pkl", *(f"{name}.pkl" for name in SWINS))


@pytest.mark.parametrize("name", LOCAL_NAMES)
def test_the_error_says_what_to_download_for_each_file_that_recipes_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"download (https://\S+\.pth) and set MODEL\.WEIGHTS to it") as caught:
        read_state_dict(name)
    assert name.removesuffix(".pkl").replace("R-101", "resnet101") in str(caught.value).split("download ")[1]


def test_every_recipe_names_one_of_these_or_an_address() -> None:
    shipped = Path(__file__).parents[3] / "configs"
    named = {get_cfg(path).MODEL.WEIGHTS for path in itertools.chain(*(shipped.glob(f"{d}/**/*.yaml") for d in _PARTS))}
    addresses = {"detectron2://ImageNetPretrained/torchvision/R-50.pkl", "detectron2://DeepLab/R-103.pkl"}
    assert named == addresses | set(LOCAL_NAMES)


_PARTS = ("ade20k*", "cityscapes-19", "coco-*", "mapillary-vistas-65")


def test_originals_under_the_recipes_names_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`R-101.pkl` may be torchvision's file renamed: what it holds decides, not how it is called."""
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.resnet101(weights=None).state_dict(), "R-101.pkl")
    model = backbone_alone(RESNETS["R-101.pkl"][0])
    assert load_weights(model, get_cfg(RESNETS["R-101.pkl"][0]).MODEL.WEIGHTS).family == "torchvision ResNet"

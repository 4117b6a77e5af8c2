"""Backbones from timm: the ResNets of the published recipes, and any other feature pyramid by its name.

Shapes: B batch, C channels, H×W image size.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from maskformer.errors import UserError
from maskformer.modeling.backbones.freezing import Backbone, Part
from maskformer.modeling.layers import NORMS

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class TimmBackbone(Backbone):
    """A timm model that returns feature maps, under the names the rest of the network uses.

    Args:
        body: a timm model made with ``features_only``.
        outputs: for each map to return, its index among the body's outputs, finest first.
        channels: channels of each map, finest first.
        strides: stride of each map.
        size_divisibility: what image sides should be a multiple of; 0: anything.
        architecture: timm's name of the model, whose weights fit; "" for our own ResNets.

    Attributes:
        channels, strides, size_divisibility, architecture: as above.
    """

    body: Any

    def __init__(
        self,
        body: nn.Module,
        *,
        outputs: Mapping[str, int],
        channels: Mapping[str, int],
        strides: Mapping[str, int],
        size_divisibility: int = 0,
        architecture: str = "",
    ) -> None:
        super().__init__()
        self.body = body
        self.architecture = architecture
        self.outputs = dict(outputs)
        self.channels = dict(channels)
        self.strides = dict(strides)
        self.size_divisibility = size_divisibility
        self.channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images → maps (B, C_i, H/s, W/s) by name, finest first."""
        maps = self.body(images)
        features = {name: maps[index] for name, index in self.outputs.items()}
        if self.channels_last:
            features = {name: feature.permute(0, 3, 1, 2) for name, feature in features.items()}
        return features

    def first_stages(self, count: int) -> Part:
        """1 is what comes before the module that makes the map of stride 4; 2 all up to that module's end, and so on.

        timm's pyramids hold their modules in the order in which they run them, and name those that make a map.

        Raises:
            UserError: if such a module is not there.
        """
        maps: list[dict[str, Any]] = self.body.feature_info.info[: 1 + max(self.body.feature_info.out_indices)]
        if 2**count >= maps[-1]["reduction"]:
            return Part(["body"])
        if count == 1:
            named = next(m["module"] for m in maps if m["reduction"] >= STRIDES["res2"])
        else:
            named = next((m["module"] for m in reversed(maps) if m["reduction"] <= 2**count), "")
        names = [name for name, _ in self.named_modules()]
        # Where timm takes a list of modules apart, stages.0 is called stages_0.
        last = next((n for n in names if named and n.endswith((f".{named}", f".{named.replace('.', '_')}"))), None)
        if last is None:
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT {count} needs the module that makes the map of stride {max(4, 2**count)}, "
                f"but this model of MODEL.TIMM.NAME has no {named!r}: set the key to 0 or 5, or choose another model"
            )
        start = names.index(last)
        around = [name for name in names if f"{last}.".startswith(f"{name}.") and name != last] + [""]
        end = start if count == 1 else 1 + max(i for i, n in enumerate(names) if f"{n}.".startswith(f"{last}."))
        modules = [name for name in names[:end] if name not in around]
        own = [
            f"{name}.{p}" for name in around if name for p, _ in self.get_submodule(name).named_parameters("", False)
        ]
        return Part(modules, own)


def make_resnet(
    *,
    depth: int = 50,
    norm: str = "FrozenBN",
    deep_stem: bool = False,
    res4_dilation: int = 1,
    res5_dilation: int = 1,
    res5_multi_grid: Sequence[int] = (1, 1, 1),
    out_features: Sequence[str] = tuple(STRIDES),
) -> TimmBackbone:
    """ResNet with the stride in the 3×3 convolutions, Kaiming normal (fan out) and every norm at identity.

    Args:
        depth: 18, 34, 50, 101 or 152.
        norm: a name of `layers.NORMS`.
        deep_stem: three 3×3 convolutions with 64, 64 and 128 outputs instead of one 7×7 (the "c" of R101c).
        res4_dilation: dilation of res4; above 1 the stage keeps the stride of res3.
        res5_dilation: dilation of res5; above 1 the stage keeps the stride of res4.
        res5_multi_grid: factor of the dilation of each block of res5; ones if its length is not the number of blocks.
        out_features: names of the maps to return; stages after the last are left out.
    """
    stem: dict[str, Any] = {"stem_type": "deep", "stem_width": 64} if deep_stem else {}
    wanted = [name for name in STRIDES if name in out_features]
    body: Any = timm.create_model(
        f"resnet{depth}",
        features_only=True,
        pretrained=False,
        out_indices=[1 + list(STRIDES).index(name) for name in wanted],
        norm_layer=NORMS[norm],
        zero_init_last=False,
        **stem,
    )
    strides = dict(STRIDES)
    res4_blocks, res5_blocks = RESNET_BLOCKS[depth][2:]
    grid = res5_multi_grid if len(res5_multi_grid) == res5_blocks else (1,) * res5_blocks
    dilations = {"res4": [res4_dilation] * res4_blocks, "res5": [res5_dilation * factor for factor in grid]}
    for name, dilation in {"res4": res4_dilation, "res5": res5_dilation}.items():
        stage = getattr(body, f"layer{int(name[3]) - 1}", None)
        if stage is not None:
            _dilate(stage, dilations[name], keep_size=dilation > 1)
        if dilation > 1:
            strides = {n: s // 2 if n >= name else s for n, s in strides.items()}
    channels = dict(zip(wanted, body.feature_info.channels(), strict=True))
    outputs = {name: i for i, name in enumerate(wanted)}
    return TimmBackbone(body, outputs=outputs, channels=channels, strides={n: strides[n] for n in wanted})


def _dilate(stage: nn.Sequential, dilations: Sequence[int], keep_size: bool) -> None:
    """Set the dilation of each block's 3×3 convolutions, and as much padding; `keep_size`: take all strides away."""
    for block, dilation in zip(stage, dilations, strict=True):
        for conv in block.modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)
            if keep_size:
                conv.stride = (1, 1)


def make_timm_pyramid(
    name: str, *, pretrained: bool = False, out_features: Sequence[str] = tuple(STRIDES)
) -> TimmBackbone:
    """Any timm model whose feature maps have strides 4, 8, 16 and 32.

    Args:
        name: timm's name, optionally with a weight tag (``convnext_tiny.fb_in1k``).
        pretrained: whether timm fetches its weights.
        out_features: names of the maps to return.

    Raises:
        UserError: if timm does not know the name, has no feature pyramid for it, or its maps do not fit.
    """
    _check_name(name)
    body = _create(name, pretrained)
    reductions = list(body.feature_info.reduction())
    missing = [n for n in out_features if STRIDES[n] not in reductions]
    if missing:
        raise UserError(
            f"MODEL.TIMM.NAME {name!r} has feature maps at strides {reductions}, but {', '.join(missing)} "
            f"needs {', '.join(str(STRIDES[n]) for n in missing)}: choose a model with strides 4, 8, 16 and 32"
        )
    wanted = {n: reductions.index(STRIDES[n]) for n in STRIDES if n in out_features}
    last = max(wanted.values())
    if last < len(reductions) - 1:
        # Made again without the stages nobody reads: parameters without a gradient break distributed training.
        body = _create(name, pretrained, out_indices=tuple(range(last + 1)))
    all_channels = body.feature_info.channels()
    backbone = TimmBackbone(
        body,
        outputs=wanted,
        channels={n: all_channels[i] for n, i in wanted.items()},
        strides={n: STRIDES[n] for n in wanted},
        size_divisibility=32,
        architecture=name,
    )
    _check_sizes(backbone, name)
    return backbone


def _check_name(name: str) -> None:
    """Refuse what timm does not know, with the names nearest to it."""
    if timm.is_model(name):
        return
    nearest = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists them"
    raise UserError(f"MODEL.TIMM.NAME {name!r} is not a model of timm {timm.__version__}: {hint}")


def _create(name: str, pretrained: bool, **options: Any) -> Any:
    """A feature extractor of timm, for images of other sizes than it was trained on where it can."""
    try:
        try:
            return timm.create_model(name, features_only=True, pretrained=pretrained, strict_img_size=False, **options)
        except TypeError:
            return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except Exception as error:  # whatever timm raises: it has no common class for "not possible"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if pretrained:
            remedy = "check the network connection, or set MODEL.TIMM.PRETRAINED False"
        else:
            remedy = "choose a model with features (timm.list_models())"
        raise UserError(
            f"MODEL.TIMM.NAME {name!r} cannot be made into a feature pyramid ({reason}): {remedy}"
        ) from error


def _check_sizes(backbone: TimmBackbone, name: str) -> None:
    """Run one small image, because timm's tables do not tell which models insist on one image size."""
    training = backbone.training
    backbone.eval()
    height, width = 64, 96
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, height, width))
        for key, feature in features.items():
            stride = backbone.strides[key]
            expected = (1, backbone.channels[key], height // stride, width // stride)
            if tuple(feature.shape) != expected:
                raise ValueError(f"{key} is {tuple(feature.shape)}, not {expected}")
    except Exception as error:  # the model's own complaint about the size, of whatever class
        raise UserError(
            f"MODEL.TIMM.NAME {name!r} cannot run on images of other sizes than it was made for ({error}): "
            "choose a convolutional or window-free model such as resnet50 or convnext_tiny"
        ) from error
    finally:
        backbone.train(training)

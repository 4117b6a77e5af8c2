"""Names of weights: the published spelling at the border, ours inside, and the families of files that are read.

Every rule is a pair of name patterns and is read in both directions, so what is loaded can be exported unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from maskformer.checkpoint.renaming import Rules, compile_rules, translate
from maskformer.errors import UserError

OURS = "network."
PARTS = ("backbone", "pixel decoder", "head")
BackboneKind = Literal["ResNet", "ResNet with a deep stem", "Swin", "other"]

# Patterns as `renaming` explains them.
_STAGES = (
    ("backbone.res{a+1}.{b}.shortcut.norm.{*}", "network.backbone.body.layer{a}.{b}.downsample.1.{*}"),
    ("backbone.res{a+1}.{b}.shortcut.{*}", "network.backbone.body.layer{a}.{b}.downsample.0.{*}"),
    ("backbone.res{a+1}.{b}.conv{c}.norm.{*}", "network.backbone.body.layer{a}.{b}.bn{c}.{*}"),
    ("backbone.res{a+1}.{b}.conv{c}.{*}", "network.backbone.body.layer{a}.{b}.conv{c}.{*}"),
)
_BACKBONES: Mapping[BackboneKind, tuple[tuple[str, str], ...]] = {
    "ResNet": (
        ("backbone.stem.conv1.norm.{*}", "network.backbone.body.bn1.{*}"),
        ("backbone.stem.conv1.{*}", "network.backbone.body.conv1.{*}"),
        *_STAGES,
    ),
    "ResNet with a deep stem": (
        ("backbone.stem.conv1.norm.{*}", "network.backbone.body.conv1.1.{*}"),
        ("backbone.stem.conv1.{*}", "network.backbone.body.conv1.0.{*}"),
        ("backbone.stem.conv2.norm.{*}", "network.backbone.body.conv1.4.{*}"),
        ("backbone.stem.conv2.{*}", "network.backbone.body.conv1.3.{*}"),
        ("backbone.stem.conv3.norm.{*}", "network.backbone.body.bn1.{*}"),
        ("backbone.stem.conv3.{*}", "network.backbone.body.conv1.6.{*}"),
        *_STAGES,
    ),
    "Swin": (("backbone.{*}", "network.backbone.{*}"),),
    "other": (),
}
_DECODER = "sem_seg_head.pixel_decoder."
_HEAD = "sem_seg_head.predictor."
_AFTER_BACKBONE = (
    (_DECODER + "adapter_{a+1}.norm.{*}", "network.pixel_decoder.lateral.{a}.norm.{*}"),
    (_DECODER + "adapter_{a+1}.{*}", "network.pixel_decoder.lateral.{a}.conv.{*}"),
    (_DECODER + "layer_{a+1}.norm.{*}", "network.pixel_decoder.output.{a}.norm.{*}"),
    (_DECODER + "layer_{a+1}.{*}", "network.pixel_decoder.output.{a}.conv.{*}"),
    (_DECODER + "mask_features.{*}", "network.pixel_decoder.embedding.{*}"),
    (_DECODER + "input_proj.{*}", "network.pixel_decoder.input_projection.{*}"),
    (_DECODER + "transformer.encoder.{*}", "network.pixel_decoder.encoder.{*}"),
    (
        _HEAD + "transformer.decoder.layers.{a}.multihead_attn.{*}",
        "network.head.transformer.decoder.layers.{a}.cross_attn.{*}",
    ),
    (_HEAD + "transformer.{*}", "network.head.transformer.{*}"),
    (_HEAD + "input_proj.{*}", "network.head.input_projection.{*}"),
    (_HEAD + "query_embed.{*}", "network.head.query_positions.{*}"),
    (_HEAD + "class_embed.{*}", "network.head.class_head.{*}"),
    (_HEAD + "mask_embed.{*}", "network.head.mask_head.{*}"),
    (_HEAD + "weight", "network.head.classifier.weight"),
    (_HEAD + "bias", "network.head.classifier.bias"),
)
_STAGE = re.compile(r"network\.backbone\.(body\.layer\d+|layers\.\d+|norm\d+)\.")
_PART_PREFIXES = {
    "network.backbone.": "backbone",
    "backbone.": "backbone",
    "network.pixel_decoder.": "pixel decoder",
    _DECODER: "pixel decoder",
    "network.head.": "head",
    "sem_seg_head.predictor": "head",
    "model.pixel_level_module.encoder.": "backbone",
    "model.pixel_level_module.decoder.": "pixel decoder",
    "model.transformer_module.": "head",
    "class_predictor.": "head",
    "mask_embedder.": "head",
}


@dataclass(frozen=True)
class Family:
    """A family of weight files, recognised by their names.

    Attributes:
        title: how reports call it.
        mark: a name that begins like this shows the family.
        prefix: what its names lack in front, to become published names (or ours, if it begins with `OURS`).
        renamed: pairs of patterns, for names that are spelled otherwise before the prefix is put in front.
        ignored: names that match are known to be of no use here.
        backbone_only: it fills a backbone; that the rest stays as initialised is no news.
    """

    title: str
    mark: re.Pattern[str]
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: re.Pattern[str] = re.compile(r"(?!)")
    backbone_only: bool = False

    def full_name(self, name: str) -> str:
        """The published name (or ours) that a name of such a file stands for."""
        return self.prefix + (translate(name, compile_rules(self.renamed)) or name)


_CALCULATED = r".*\.num_batches_tracked|.*relative_position_index|.*attn_mask|criterion\..*|pixel_(mean|std)"
# Names of these files are translated by `huggingface`, because one tensor of ours is three of theirs.
HUGGING_FACE = Family(
    "Hugging Face MaskFormer",
    re.compile(r"(model\.)?pixel_level_module\."),
    ignored=re.compile(rf"{_CALCULATED}|(model\.)?pixel_level_module\.encoder\.model\.layernorm\..*"),
)
FAMILIES = (
    Family("maskformer", re.compile(r"network\.")),
    Family("published MaskFormer", re.compile(r"(backbone|sem_seg_head)\."), ignored=re.compile(_CALCULATED)),
    HUGGING_FACE,
    Family(
        "Detectron2 ResNet",
        re.compile(r"(stem\.conv1|res2\.0)\."),
        prefix="backbone.",
        ignored=re.compile(rf"{_CALCULATED}|(stem\.)?(fc|linear)\..*"),
        backbone_only=True,
    ),
    Family(
        "timm feature pyramid",
        re.compile(r"timm\."),  # put in front by `sources`: timm's own names are as many as its models
        prefix="network.backbone.body.",
        renamed=(("timm.{*}", "{*}"),),
        backbone_only=True,
    ),
    Family(
        "timm Swin",
        # timm's stages begin with the merging of patches, those of the original end with it.
        re.compile(r"layers\.3\.downsample\."),
        prefix="backbone.",
        renamed=(("layers.{a+1}.downsample.{*}", "layers.{a}.downsample.{*}"),),
        ignored=re.compile(rf"{_CALCULATED}|(norm|head)\..*"),
        backbone_only=True,
    ),
    Family(
        "original Swin",
        re.compile(r"layers\.0\.blocks\.0\."),
        prefix="backbone.",
        ignored=re.compile(rf"{_CALCULATED}|(norm|head)\..*"),
        backbone_only=True,
    ),
    Family(
        "torchvision ResNet",
        re.compile(r"layer1\.0\.conv1\."),
        prefix="network.backbone.body.",
        ignored=re.compile(rf"{_CALCULATED}|fc\..*"),
        backbone_only=True,
    ),
)
HEURISTICS = Family("Detectron2, names matched by their ends", re.compile(r"(?!)"), ignored=re.compile(_CALCULATED))


def find_family(names: Iterable[str]) -> Family | None:
    """The family of a file with these names; None if it is of no known one."""
    names = list(names)
    return next((family for family in FAMILIES if any(map(family.mark.match, names))), None)


def backbone_kind(names: Collection[str]) -> BackboneKind:
    """What backbone a model with these (our) names has."""
    body = "network.backbone.body."
    if f"{body}layer1.0.conv1.weight" in names:
        if f"{body}conv1.6.weight" in names:
            return "ResNet with a deep stem"
        if f"{body}conv1.weight" in names:
            return "ResNet"
    return "Swin" if "network.backbone.patch_embed.proj.weight" in names else "other"


def part_of(name: str) -> str | None:
    """Which of `PARTS` a name belongs to, be it published or ours; None for anything else."""
    return next((part for prefix, part in _PART_PREFIXES.items() if name.startswith(prefix)), None)


def to_ours(name: str, kind: BackboneKind) -> str | None:
    """Our name for a published one, in a model with this kind of backbone; None if there is none."""
    if name.startswith("backbone.body."):
        return f"network.{name}"  # of a timm model that Detectron2 saved: what has no published name keeps its own
    ours = translate(current_version(name), _rules(kind, False))
    # A name that would not come back was matched by accident.
    return ours if ours is not None and to_published(ours, kind) == current_version(name) else None


def to_published(name: str, kind: BackboneKind) -> str | None:
    """The published name for one of ours; None if the published layout has none."""
    return translate(name, _rules(kind, True))


def is_of_absent_stage(name: str, targets: Collection[str]) -> bool:
    """Whether a name (published or ours) is of a backbone stage that a model leaves out because nothing reads it.

    Args:
        name: of a weight in a file.
        targets: our names in the model.
    """
    ours = name if name.startswith(OURS) else to_ours(name, backbone_kind(targets))
    stage = _STAGE.match(ours) if ours else None
    return stage is not None and not any(target.startswith(stage[0]) for target in targets)


def current_version(name: str) -> str:
    """In the first published version the pixel decoder's names stood directly under the head."""
    rest = name.removeprefix("sem_seg_head.")
    if rest == name or rest.startswith(("predictor", "pixel_decoder.")):
        return name
    return _DECODER + rest


def match_by_suffix(wanted: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Detectron2's matching: a model name takes the longest file name that equals it or ends it, cut at a dot.

    Args:
        wanted: published names of the model.
        names: names in the file.

    Returns:
        File name → model name.

    Raises:
        UserError: two model names take the same file name.
    """
    matched: dict[str, str] = {}
    for name in wanted:
        steps = name.split(".")
        found = next((end for i in range(len(steps)) if (end := ".".join(steps[i:])) in names), None)
        if found is None:
            continue
        if found in matched:
            raise UserError(
                f"The weight file's {found} would fit both {matched[found]} and {name}: "
                f"use a file with complete names, such as {name}"
            )
        matched[found] = name
    return matched


@cache
def _rules(kind: BackboneKind, from_ours: bool) -> Rules:
    return compile_rules((*_BACKBONES[kind], *_AFTER_BACKBONE), backwards=from_ours)

"""Which of the published recipes transformers' MaskFormer can be, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskformer.build import assemble_model
from maskformer.checkpoint.huggingface import huggingface_state_dict, join_projections, our_names
from maskformer.config import get_cfg
from maskformer.errors import UserError
from maskformer.integrations.huggingface_config import check_expressible

CONFIGS = Path(__file__).parents[3] / "configs"
PARTS = ("ade20k-*", "cityscapes-19", "coco-*", "mapillary-vistas-65")
PUBLISHED = sorted(
    str(path.relative_to(CONFIGS))
    for part in PARTS
    for path in CONFIGS.glob(f"{part}/**/*.yaml")
    if not path.name.startswith("Base")
)
# What the name of a recipe must hold -> the sentence about it.
REFUSED = {
    "per_pixel_baseline_plus": r"no per-pixel heads \(MODEL\.SEM_SEG_HEAD\.NAME 'PerPixelBaselinePlusHead'\)",
    "per_pixel_baseline_R": r"no per-pixel heads \(MODEL\.SEM_SEG_HEAD\.NAME 'PerPixelBaselineHead'\)",
    "R101c": r"no deep stem in its ResNet \(MODEL\.RESNETS\.STEM_TYPE 'deeplab'\)",
    "panoptic_R": r"no transformer encoder in its pixel decoder \(MODEL\.SEM_SEG_HEAD\.PIXEL_DECODER_NAME",
}


def test_there_are_thirty() -> None:
    refused = [sum(part in name for name in PUBLISHED) for part in REFUSED]
    assert (len(PUBLISHED), refused) == (30, [3, 3, 4, 4])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_exported_or_refused_for_its_reason(name: str) -> None:
    cfg = get_cfg(CONFIGS / name)
    reason = next((sentence for part, sentence in REFUSED.items() if part in name), None)
    if reason is None:
        check_expressible(cfg)
        return
    with pytest.raises(UserError, match=reason) as caught:
        check_expressible(cfg)
    assert str(caught.value).endswith("convert it with --to published or --to maskformer")
    assert "\n" not in str(caught.value)


def test_panoptic_swin_has_the_tensors_of_theirs() -> None:
    """These recipes ask for a projection, which theirs has as well, because it changes the width."""
    transformers = pytest.importorskip("transformers")
    small = {"EMBED_DIM": 12, "DEPTHS": (2, 2, 2, 2), "NUM_HEADS": (1, 2, 2, 4)}
    overrides = [part for key, value in small.items() for part in (f"MODEL.SWIN.{key}", value)]
    cfg = get_cfg(CONFIGS / "coco-panoptic/swin/maskformer_panoptic_swin_tiny_bs64_554k.yaml", overrides)
    assert cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ
    check_expressible(cfg)
    backbone = transformers.SwinConfig(embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4])
    with torch.device("meta"):
        config = transformers.MaskFormerConfig(
            backbone_config=backbone, decoder_config=transformers.DetrConfig(), num_labels=133
        )
        theirs = transformers.MaskFormerForInstanceSegmentation(config).state_dict()
    ours = huggingface_state_dict(assemble_model(cfg).state_dict())
    assert shapes(ours) == shapes(theirs)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """By our names, because theirs are others in memory than in files."""
    joined = join_projections(state)
    return {ours: tuple(joined[name].shape) for name, ours in our_names(joined).items()}

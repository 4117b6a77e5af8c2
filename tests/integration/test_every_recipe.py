"""All 30 published recipes: each builds and groups its parameters as published; a slow test runs a step of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer.build import assemble_model
from maskformer.config import get_cfg
from maskformer.engine.optimizer import build_optimizer
from tests.miniatures import family_of, make_miniature

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted(json.loads((ROOT / "tests" / "data" / "config" / "all_recipes.json").read_text())["recipes"])

LIMIT_GIB = 24.0
"""Every recipe stays far below: 9 GiB was the most, for the baseline with 847 queries."""
SIZES = {
    "ade20k": (512, 683),
    "ade20k_panoptic": (512, 683),
    "ade20k_full": (512, 683),
    "cityscapes": (1024, 2048),
    "coco_panoptic": (480, 640),
    "coco_stuff": (480, 640),
    "mapillary": (1536, 2048),
}
"""Family → (H, W) of a typical picture."""


# ------------------------------------------------------------------ parameters
def expected_groups(cfg: Any) -> Counter[tuple[float, float]]:
    """(lr, weight decay) → tensors, added up from what the parts of each network are.

    For two recipes the sums are published: R50 53, 91 and 53; Swin-T 192 and 129.
    """
    lr, decay = cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY
    groups: Counter[tuple[float, float]] = Counter()
    if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        blocks = sum(cfg.MODEL.SWIN.DEPTHS)
        # Patch embedding, three reductions; in a block: qkv, projection and two linear layers, weight and bias each.
        groups[lr, decay] += 2 + 3 + 8 * blocks
        # Norms: after the patches, before three reductions, of four outputs; in a block two, and the position table.
        groups[lr, 0.0] += 2 + 6 + 8 + 5 * blocks
    else:
        blocks = {50: 16, 101: 33}[cfg.MODEL.RESNETS.DEPTH]
        stem = 3 if cfg.MODEL.RESNETS.STEM_TYPE == "deeplab" else 1
        # Three convolutions a block, four shortcuts; norms are frozen.
        groups[lr * cfg.SOLVER.BACKBONE_MULTIPLIER, decay] += stem + 3 * blocks + 4
    # Pixel decoder: seven convolutions with a norm each, and the one that gives the embeddings.
    groups[lr, decay] += 7 + 2
    groups[lr, 0.0] += 14
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor" and cfg.MODEL.SEM_SEG_HEAD.NAME == "PerPixelBaselineHead":
        groups[lr, decay] += 2  # classifier
        return groups
    # Transformer decoder, a layer: two attentions of four tensors, two linear layers, three norms.
    layers = cfg.MODEL.MASK_FORMER.DEC_LAYERS
    groups[lr, decay] += 12 * layers
    groups[lr, 0.0] += 6 * layers + 2 + 1  # final norm, queries
    groups[lr, decay] += 2 + 6  # projection of the memory, or of the encoder's input; mask embeddings
    groups[lr, decay] += 2 if cfg.MODEL.META_ARCHITECTURE == "MaskFormer" else 0  # classes
    if cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME == "TransformerEncoderPixelDecoder":
        encoder = cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS
        groups[lr, decay] += 8 * encoder
        groups[lr, 0.0] += 4 * encoder
    return groups


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_builds_and_groups_its_parameters(name: str) -> None:
    cfg = get_cfg(name, ["MODEL.DEVICE", "cpu"])
    with torch.device("meta"):
        model = assemble_model(cfg)
    found: Counter[tuple[float, float]] = Counter()
    for group in build_optimizer(cfg, model).param_groups:
        found[group["lr"], group["weight_decay"]] += len(group["params"])
    assert found == expected_groups(cfg)


def test_the_published_counts_follow_from_the_parts() -> None:
    found = {name: sorted(expected_groups(get_cfg(name)).values()) for name in PUBLISHED}
    assert found["configs/ade20k-150/maskformer_R50_bs16_160k.yaml"] == [53, 53, 91]
    assert found["configs/ade20k-150/swin/maskformer_swin_tiny_bs16_160k.yaml"] == [129, 192]


# ------------------------------------------------------------------ a step
def free_gib() -> float:
    """Memory that programs can still get on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_of_every_recipe(name: str, tmp_path: Path) -> None:
    cfg = get_cfg(name)
    family = family_of(cfg.DATASETS.TRAIN[0])
    make_miniature(family, tmp_path / "data", train=1, val=1, size=SIZES[family])
    limit = min(LIMIT_GIB, free_gib() - 0.5)
    command = [sys.executable, "-m", "tests.integration.recipe_step", name, str(tmp_path / "out"), f"{limit:.2f}"]
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path / "data")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode and limit < LIMIT_GIB and "can't allocate memory" in result.stderr:
        pytest.skip(f"needs more than the {limit:.1f} GiB that are free")
    assert result.returncode == 0, result.stderr[-2000:]
    numbers = json.loads(result.stdout.splitlines()[-1])
    print(name, json.dumps({key: numbers[key] for key in numbers if key not in ("metrics", "files")}))
    assert numbers["finite"]
    assert numbers["peak GiB"] < LIMIT_GIB
    panoptic = cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON
    wanted = {"panoptic_seg/PQ", "panoptic_seg/PQ_st"} if panoptic else {"sem_seg/mIoU", "sem_seg/pACC"}
    assert wanted <= set(numbers["metrics"])
    assert ("predictions.json" if panoptic else "sem_seg_predictions.json") in numbers["files"]

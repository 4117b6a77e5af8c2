"""Our keys in a config of Detectron2, and our recipes read by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import detectron2.config

import maskformer
from maskformer.config.tree import flatten
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import add_maskformer_config
from maskformer.integrations.detectron2.backbones import check_keys

CONFIGS = Path(maskformer.__file__).parents[1] / "configs"
OURS_ALONE = ("quickstart", "camvid")  # written for our defaults


def values(cfg: Any) -> dict[str, Any]:
    """Dotted key → value; yacs keeps the type of sequence that a default has, which means nothing."""
    return {key: list(v) if isinstance(v, (list, tuple)) else v for key, v in flatten(cfg)}


def detectron2_defaults() -> Any:
    return detectron2.config.get_cfg()


def test_detectron2_config_gets_every_key_of_ours_and_keeps_its_own_values() -> None:
    cfg = detectron2_defaults()
    before, ours = values(cfg), values(maskformer.get_cfg())
    add_maskformer_config(cfg)
    after = values(cfg)
    assert after == {**ours, **before}
    assert after["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"] == 100
    assert after["MODEL.BACKBONE.FREEZE_AT"] == 2  # Detectron2's; ours is 0
    assert isinstance(cfg.MODEL.MASK_FORMER.TEST, type(cfg))


def test_detectron2_config_is_its_own_copy() -> None:
    one, other = detectron2_defaults(), detectron2_defaults()
    add_maskformer_config(one)
    add_maskformer_config(other)
    one.MODEL.SWIN.DEPTHS.append(7)
    one.MODEL.MASK_FORMER.NHEADS = 1
    assert other.MODEL.SWIN.DEPTHS == [2, 2, 6, 2]
    assert other.MODEL.MASK_FORMER.NHEADS == 8


def test_detectron2_config_stays_when_keys_are_added_twice_or_by_another_project_before() -> None:
    cfg = detectron2_defaults()
    cfg.SOLVER.POLY_LR_POWER = 0.5  # as add_deeplab_config adds it
    add_maskformer_config(cfg)
    cfg.MODEL.MASK_FORMER.NHEADS = 4
    add_maskformer_config(cfg)
    assert (cfg.SOLVER.POLY_LR_POWER, cfg.MODEL.MASK_FORMER.NHEADS) == (0.5, 4)


def test_detectron2_reads_every_recipe_to_the_values_it_has_natively() -> None:
    recipes = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("Base-"))
    assert len(recipes) >= 32
    for path in recipes:
        native = values(maskformer.get_cfg(path))
        if path.parent.name not in OURS_ALONE:
            # As published training scripts do, with the project of the deep stem before.
            cfg = detectron2_defaults()
            cfg.MODEL.RESNETS.STEM_TYPE, cfg.MODEL.RESNETS.RES5_MULTI_GRID = "deeplab", [1, 2, 4]
            add_maskformer_config(cfg)
            cfg.merge_from_file(str(path))
            read = values(cfg)
            assert {k: (v, read[k]) for k, v in native.items() if read[k] != v} == {"MODEL.DEVICE": ("auto", "cuda")}
        cfg = detectron2_defaults()
        add_maskformer_config(cfg, our_defaults=True)
        cfg.merge_from_file(str(path))
        read = values(cfg)
        differing = {key for key, value in native.items() if read[key] != value}
        assert differing == {"MODEL.DEVICE"}, path


def test_detectron2_config_without_our_keys_is_refused() -> None:
    with pytest.raises(UserError, match=r"lacks MODEL.MASK_FORMER .* call add_maskformer_config\(cfg\)"):
        check_keys(detectron2_defaults())
    cfg = detectron2_defaults()
    add_maskformer_config(cfg)
    check_keys(cfg)

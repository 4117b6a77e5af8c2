"""Schema, types, overrides and writing out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yacs.config

import maskformer
from maskformer.config import dump, get_cfg, validate
from maskformer.config.compat import UNREAD
from maskformer.config.tree import flatten
from maskformer.errors import UserError

DEEPLAB = ["MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone", "MODEL.RESNETS.STEM_TYPE", "deeplab"]
NEEDED_BY_UNREAD = {
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", 128): DEEPLAB,
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64): ["MODEL.RESNETS.DEPTH", "18"],
}


def message(*overrides: Any) -> str:
    with pytest.raises(UserError) as caught:
        get_cfg(None, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_get_cfg_returns_a_tree_that_can_be_changed() -> None:
    cfg = maskformer.get_cfg()
    assert isinstance(cfg, yacs.config.CfgNode)
    assert not cfg.is_frozen()
    cfg.SOLVER.MAX_ITER = 5
    assert get_cfg().SOLVER.MAX_ITER != 5


def test_lists_are_not_shared_between_configs() -> None:
    get_cfg().MODEL.PIXEL_MEAN.append(1.0)
    assert len(get_cfg().MODEL.PIXEL_MEAN) == 3


def test_defaults_that_recipes_do_not_name() -> None:
    values = dict(flatten(get_cfg()))
    published = {
        "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER.GAMMA": 0.1,
        "SOLVER.STEPS": (30000,),
        "SOLVER.MOMENTUM": 0.9,
        "SOLVER.POLY_LR_POWER": 0.9,
        "SOLVER.CHECKPOINT_PERIOD": 5000,
        "SOLVER.AMP.ENABLED": False,
        "INPUT.RANDOM_FLIP": "horizontal",
        "INPUT.MIN_SIZE_TEST": 800,
        "INPUT.MAX_SIZE_TEST": 1333,
        "INPUT.MAX_SIZE_TRAIN": 1333,
        "INPUT.COLOR_AUG_SSD": False,
        "INPUT.SIZE_DIVISIBILITY": -1,
        "INPUT.CROP.TYPE": "relative_range",
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
        "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": False,
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 32,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
        "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
        "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.SWIN.PRETRAIN_IMG_SIZE": 224,
        "MODEL.SWIN.QK_SCALE": None,
        "MODEL.SWIN.DROP_PATH_RATE": 0.3,
        "TEST.EVAL_PERIOD": 0,
        "TEST.AUG.MIN_SIZES": [400, 500, 600, 700, 800, 900, 1000, 1100, 1200],
        "TEST.AUG.MAX_SIZE": 4000,
        "DATALOADER.ASPECT_RATIO_GROUPING": True,
        "SEED": -1,
        "OUTPUT_DIR": "./output",
    }
    assert {key: values[key] for key in published} == published


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1e-4", 1e-4),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.STEPS", "(10, 20)", (10, 20)),
        ("SOLVER.STEPS", "[10, 20]", (10, 20)),
        ("SOLVER.STEPS", "()", ()),
        ("DATASETS.TRAIN", '("folder:x:train",)', ("folder:x:train",)),
        ("DATASETS.TRAIN", ["a", "b"], ("a", "b")),
        ("MODEL.PIXEL_MEAN", "(1, 2, 3)", [1, 2, 3]),
        ("MODEL.SWIN.QK_SCALE", "0.5", 0.5),
        ("MODEL.SWIN.QK_SCALE", "None", None),
        ("MODEL.WEIGHTS", "a b.pkl", "a b.pkl"),
        ("OUTPUT_DIR", "2024", "2024"),
        ("OUTPUT_DIR", "'quoted'", "quoted"),
        ("SOLVER.AMP.ENABLED", "True", True),
        ("SOLVER.AMP.ENABLED", True, True),
        ("MODEL.DEVICE", "cuda:1", "cuda:1"),
    ],
)
def test_overrides(key: str, text: Any, value: Any) -> None:
    result = dict(flatten(get_cfg(None, [key, text])))[key]
    assert result == value
    assert type(result) is type(value)


def test_overrides_win_over_files_and_the_last_one_over_others(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("SEED: 1\nLOG_PERIOD: 2\n")
    cfg = get_cfg(path, ["SEED", "3", "SEED", "4"])
    assert (cfg.SEED, cfg.LOG_PERIOD) == (4, 2)


def test_yaml_strings_in_python_notation(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('DATASETS:\n  TRAIN: ("a", "b")\n  TEST: ["c"]\nSOLVER:\n  STEPS: (5, 6)\nOUTPUT_DIR: "12"\n')
    cfg = get_cfg(path)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.SOLVER.STEPS) == (("a", "b"), ("c",), (5, 6))
    assert cfg.OUTPUT_DIR == "12"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.DEVICEE", "MODEL.DEVICE"),
        ("model.device", "MODEL.DEVICE"),
        ("SOLVER.EVAL_PERIOD", "TEST.EVAL_PERIOD"),
        ("SOLVER.BASELR", "SOLVER.BASE_LR"),
        ("MODEL.MASKFORMER.NHEADS", "MODEL.MASK_FORMER.NHEADS"),
        ("MODEL.SWIN.DEPTH", "MODEL.RESNETS.DEPTH"),
        ("SEEED", "SEED"),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, nearest: str) -> None:
    assert message(key, "1") == f"command line: unknown key {key}: did you mean {nearest}?"


def test_unknown_key_without_a_near_one() -> None:
    assert "unknown key QQQQ: see" in message("QQQQ", "1")


@pytest.mark.parametrize(
    ("key", "value", "expected", "given"),
    [
        ("SOLVER.MAX_ITER", "10.5", "int", "float"),
        ("SOLVER.MAX_ITER", "True", "int", "bool"),
        ("SOLVER.MAX_ITER", "ten", "int", "str"),
        ("SOLVER.BASE_LR", "True", "float", "bool"),
        ("SOLVER.BASE_LR", "None", "float", "NoneType"),
        ("SOLVER.AMP.ENABLED", "1", "bool", "int"),
        ("SOLVER.AMP.ENABLED", "true", "bool", "str"),
        ("SOLVER.STEPS", "10", "list of int", "int"),
        ("SOLVER.STEPS", "(10, 0.5)", "list of int", "tuple of float, int"),
        ("DATASETS.TRAIN", "ade20k_sem_seg_train", "list of str", "str"),
        ("DATASETS.TRAIN", "(1,)", "list of str", "tuple of int"),
        ("MODEL.DEVICE", "(1,)", "str", "tuple of int"),
        ("MODEL.DEVICE", "None", "str", "NoneType"),
        ("MODEL.SWIN.QK_SCALE", "x", "float or None", "str"),
        ("OUTPUT_DIR", 3, "str", "int"),
    ],
)
def test_wrong_types_name_both(key: str, value: Any, expected: str, given: str) -> None:
    text = message(key, value)
    assert text.startswith(f"command line: {key} must be {expected}, but ")
    assert f" is {given}: " in text


def test_sections_are_not_values(tmp_path: Path) -> None:
    assert "MODEL.SWIN is a section" in message("MODEL.SWIN", "1")
    path = tmp_path / "a.yaml"
    path.write_text("MODEL:\n")
    with pytest.raises(UserError, match=r"a\.yaml, line 1: MODEL is a section"):
        get_cfg(path)
    path.write_text("SEED: {A: 1}\n")
    with pytest.raises(UserError, match=r"line 1: unknown key SEED\.A"):
        get_cfg(path)


def test_overrides_come_in_pairs() -> None:
    assert "KEY VALUE pairs" in message("SOLVER.MAX_ITER", "1", "SEED")
    assert "override key 3" in message(3, "x")
    with pytest.raises(UserError, match="give a list"):
        get_cfg(None, "SEED 1")


def test_dump_reads_back(tmp_path: Path) -> None:
    cfg = get_cfg("configs/ade20k-150/swin/maskformer_swin_tiny_bs16_160k.yaml", ["OUTPUT_DIR", "12", "SEED", "3"])
    cfg.MODEL.WEIGHTS = "(1, 2) – ünïcode: yes # no"
    cfg.SOLVER.BASE_LR = 1e-30
    path = tmp_path / "config.yaml"
    path.write_text(dump(cfg), encoding="utf-8")
    again = get_cfg(path)
    assert again == cfg
    assert dump(again) == dump(cfg)


def test_the_width_of_a_stem_follows_its_type(tmp_path: Path) -> None:
    cfg = get_cfg(None, DEEPLAB)
    assert cfg.MODEL.RESNETS.STEM_OUT_CHANNELS == 128
    path = tmp_path / "config.yaml"
    path.write_text(dump(cfg))
    assert get_cfg(path) == cfg


def test_yacs_merging_goes_through_our_checks(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", "5"])
    path = tmp_path / "a.yaml"
    path.write_text("LOG_PERIOD: 7\n")
    cfg.merge_from_file(path)
    assert (cfg.SEED, cfg.LOG_PERIOD) == (5, 7)
    with pytest.raises(UserError, match="unknown key"):
        cfg.merge_from_list(["SEEED", "5"])
    with pytest.raises(UserError, match="not supported"):
        cfg.load_cfg("import os")


def test_validate_after_changes_in_python() -> None:
    cfg = get_cfg()
    validate(cfg)
    cfg.SOLVER.MAX_ITER = 0
    with pytest.raises(UserError, match=r"SOLVER\.MAX_ITER is 0"):
        validate(cfg)
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER = "x"
    with pytest.raises(UserError, match="must be int"):
        validate(cfg)
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITERS = 1
    with pytest.raises(UserError, match=r"unknown key SOLVER\.MAX_ITERS: did you mean SOLVER\.MAX_ITER"):
        validate(cfg)
    cfg = get_cfg()
    del cfg.SOLVER["MAX_ITER"]
    with pytest.raises(UserError, match=r"lacks SOLVER\.MAX_ITER"):
        validate(cfg)


def test_unread_keys_take_their_values_and_no_others() -> None:
    for key, unread in UNREAD.items():
        for value in unread.values:
            overrides = NEEDED_BY_UNREAD.get((key, value) if isinstance(value, int) else None, [])
            assert dict(flatten(get_cfg(None, [*overrides, key, value])))[key] == value
    text = message("MODEL.RESNETS.NUM_GROUPS", "2")
    assert text.startswith("command line: MODEL.RESNETS.NUM_GROUPS is 2 but may only be 1: ")
    assert "INPUT.RANDOM_FLIP is 'none'" in message("INPUT.RANDOM_FLIP", "none")
    assert "MODEL.MASK_ON is True" in message("MODEL.MASK_ON", "True")

"""What is said of a run that is taken up with another config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskformer.config import dump, get_cfg
from maskformer.engine.resume import Resumption
from maskformer.engine.training import check_differences
from maskformer.errors import UserError


def resumption(config_text: str) -> Resumption:
    checkpoint: dict[str, Any] = {"config": config_text, "extra": {}, "iteration": 3, "position": 8, "rng": []}
    return Resumption(Path("model_0000003.pth"), checkpoint)


def test_keys_that_came_later_meant_their_defaults() -> None:
    assert resumption("SEED: 4\n").differences(dump(get_cfg(None, ["SEED", 4]))) == []
    assert resumption("SEED: 4\n").run_id == ""


def test_keys_with_an_effect_are_named_and_others_are_not() -> None:
    saved = resumption(dump(get_cfg(None, ["SOLVER.BASE_LR", 0.1, "OUTPUT_DIR", "a", "SOLVER.MAX_IMS_PER_DEVICE", 2])))
    assert saved.differences(dump(get_cfg(None, ["SOLVER.BASE_LR", 0.2]))) == ["SOLVER.BASE_LR (0.1 → 0.2)"]


def test_a_run_that_was_scaled_is_not_scaled_again() -> None:
    saved = resumption(dump(get_cfg(None, ["SOLVER.REFERENCE_WORLD_SIZE", 2])))
    check_differences(saved, dump(get_cfg(None, ["SOLVER.REFERENCE_WORLD_SIZE", 2])))
    check_differences(saved, dump(get_cfg(None, ["SOLVER.REFERENCE_WORLD_SIZE", 0])))
    with pytest.raises(UserError, match=r"scaled to 2 processes and this one would be to 4; resume it with 2"):
        check_differences(saved, dump(get_cfg(None, ["SOLVER.REFERENCE_WORLD_SIZE", 4])))

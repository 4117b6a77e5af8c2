"""What is said of a run that is taken up with another config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer.checkpoint import save_checkpoint
from maskformer.config import dump, get_cfg
from maskformer.engine.resume import Resumption, find_resumable
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


@pytest.mark.parametrize(
    "state",
    [
        {"trainer": {"iteration": 7, "_trainer": {"optimizer": {"state": {}}}}, "iteration": 7},
        {"optimizer": {"state": {}}, "scheduler": {"last_epoch": 8}, "iteration": 7},  # of its earlier versions
        {"trainer": {"iteration": 7}},
    ],
    ids=["trainer", "old", "without-iteration"],
)
def test_a_folder_where_detectron2_went_on_is_not_resumed_from_an_older_state(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    weights = {"network.a": torch.zeros(2)}
    first = save_checkpoint(tmp_path, 3, model=weights)
    assert find_resumable(tmp_path) == first
    torch.save({"model": {"backbone.a": torch.ones(2)}, **state}, tmp_path / "model_0000007.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    with pytest.raises(UserError, match=r"model_0000007.pth.* Detectron2.* --resume, or start .* another OUTPUT_DIR"):
        find_resumable(tmp_path)
    # A run of ours that went on after it is the newest again.
    assert find_resumable(save_checkpoint(tmp_path, 8, model=weights).parent) == tmp_path / "model_0000008.pth"


@pytest.mark.parametrize("content", [None, b"", b"cut short"])
def test_a_newest_checkpoint_that_is_missing_or_damaged_is_still_passed_over(
    tmp_path: Path, content: bytes | None
) -> None:
    assert find_resumable(tmp_path) is None
    first = save_checkpoint(tmp_path, 3, model={"network.a": torch.zeros(2)})
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    if content is not None:
        (tmp_path / "model_0000007.pth").write_bytes(content)
    assert find_resumable(tmp_path) == first

"""Models from a config and a weight file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from maskformer.build import build_model, build_model_to_fill, load_model
from maskformer.checkpoint import checkpoint_metadata, load_checkpoint, metadata_in, save_checkpoint
from maskformer.config import get_cfg
from maskformer.data.catalog import get_metadata
from maskformer.errors import UserError

CONFIG = "configs/quickstart/shapes_panoptic.yaml"
GONE = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('folder:/nowhere/at/all:train',)"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint with random weights."""
    model = build_model(get_cfg(CONFIG, ["MODEL.DEVICE", "cpu"]))
    metadata = get_metadata("shapes_panoptic_train")
    return save_checkpoint(tmp_path_factory.mktemp("run"), 7, model=model, metadata=metadata)


def test_a_model_file_alone_suffices(saved: Path) -> None:
    model = load_model(CONFIG, str(saved), GONE)
    assert not model.training
    assert model.things == (False, False, True, True, True)
    for name, tensor in load_checkpoint(saved)["model"].items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_without_metadata_the_data_set_is_needed(saved: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pth"
    torch.save({"model": load_checkpoint(saved)["model"]}, bare)
    assert checkpoint_metadata(bare) is None
    with pytest.raises(UserError, match="/nowhere/at/all"):
        load_model(CONFIG, str(bare), GONE)
    assert load_model(CONFIG, str(bare), GONE[:2]).things == (False, False, True, True, True)


def test_metadata_of_a_checkpoint(saved: Path) -> None:
    metadata = checkpoint_metadata(saved)
    assert metadata == metadata_in(load_checkpoint(saved), saved) == get_metadata("shapes_panoptic_train")


@pytest.mark.parametrize("damage", [{"things": [True]}, {"ignore_label": 0}, {"colors": [1]}, {"classes": 5}])
def test_damaged_metadata_is_one_sentence(saved: Path, damage: dict[str, Any]) -> None:
    fields = {**load_checkpoint(saved)["metadata"], **damage}
    with pytest.raises(UserError, match=r"model_0000007\.pth has damaged metadata \(.*\): name another checkpoint"):
        metadata_in({"metadata": fields}, saved)


def test_a_model_to_be_filled_fetches_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(*arguments: Any, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no connection")
        return create(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    backbone = ["MODEL.BACKBONE.NAME", "timm", "MODEL.TIMM.NAME", "mobilenetv3_small_050", "MODEL.TIMM.PRETRAINED"]
    cfg = get_cfg(CONFIG, ["MODEL.DEVICE", "cpu", *backbone, "True"])
    cfg.freeze()
    with pytest.raises(UserError, match=r"no connection"):
        build_model(cfg)
    build_model_to_fill(cfg)
    assert cfg.MODEL.TIMM.PRETRAINED

"""Position tables at another size: values worked out by hand, and what loading does with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maskformer.checkpoint import export_published, load_weights
from maskformer.checkpoint.resizing import as_map, can_resize, resize_relative
from maskformer.errors import UserError

from .conftest import SWIN

Make = Callable[..., nn.Module]
TABLE = "network.backbone.layers.1.blocks.0.attn.relative_position_bias_table"


def places(window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative offset (down, right) of each row of a table, as a share of the largest one."""
    steps = torch.arange(1 - window, window, dtype=torch.float64) / (window - 1)
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    return down.flatten(), right.flatten()


@pytest.mark.parametrize(("window", "new"), [(7, 12), (12, 7), (7, 8), (3, 5)])
def test_constants_slopes_and_curves_stay_what_they_are(window: int, new: int) -> None:
    def table(size: int) -> torch.Tensor:
        down, right = places(size)
        return torch.stack([torch.full_like(down, 2.5), 3 * down - right + 1, down * right, down**2 - right], dim=1)

    resized = resize_relative(table(window).float(), new)
    assert resized.shape == ((2 * new - 1) ** 2, 4)
    assert torch.allclose(resized.double(), table(new), atol=1e-5)


def test_a_cubic_by_hand() -> None:
    """One dimension of a window of 4 (offsets -3…3) to one of 3 (offsets -2…2 at ±1, ±½, 0): f(t) = t³."""
    down, _ = places(4)
    resized = resize_relative((down**3).float()[:, None], 3)
    rows = resized.reshape(5, 5)[:, 0]
    assert rows.tolist() == pytest.approx([-1, -0.125, 0, 0.125, 1], abs=1e-6)


def test_the_same_window_is_the_identity_and_ends_and_middle_stay() -> None:
    table = torch.rand(169, 3)
    assert torch.allclose(resize_relative(table, 7), table, atol=1e-6)
    grown = resize_relative(table, 12).reshape(23, 23, 3)
    old = table.reshape(13, 13, 3)
    for place, new_place in {0: 0, 6: 11, 12: 22}.items():
        for other, new_other in {0: 0, 6: 11, 12: 22}.items():
            assert torch.allclose(grown[new_place, new_other], old[place, other], atol=1e-5)


def test_heads_do_not_mix() -> None:
    table = torch.zeros(9, 2)
    table[:, 1] = torch.rand(9)
    assert torch.equal(resize_relative(table, 4)[:, 0], torch.zeros(49))


def test_smallest_windows() -> None:
    assert resize_relative(torch.tensor([[3.0, 4.0]]), 2).tolist() == [[3.0, 4.0]] * 9
    assert resize_relative(torch.arange(9.0)[:, None], 1).tolist() == [[4.0]]


def test_what_can_be_resized() -> None:
    assert can_resize(TABLE, (169, 3), (529, 3))
    assert not can_resize(TABLE, (169, 3), (529, 4))
    assert not can_resize(TABLE, (168, 3), (529, 3))
    assert not can_resize(TABLE, (144, 3), (529, 3))
    assert can_resize("network.backbone.absolute_pos_embed", (1, 8, 56, 56), (1, 8, 96, 96))
    assert not can_resize("network.backbone.layers.0.blocks.0.attn.qkv.weight", (9, 3), (25, 3))


@pytest.mark.parametrize("new", [4, 12])
def test_another_window_is_loaded_resized_and_reported(tmp_path: Path, small_model: Make, new: int) -> None:
    source, model = small_model(SWIN), small_model(SWIN, MODEL__SWIN__WINDOW_SIZE=new)
    untouched = copy.deepcopy(model)
    path = export_published(source, tmp_path / "model.pkl")
    report = load_weights(model, path)
    side = (2 * new - 1) ** 2
    assert len(report.reshaped) == len(report.resized) == 8
    assert report.reshaped[TABLE] == ((169, 2), (side, 2))
    assert TABLE not in report.loaded
    assert report.parts["backbone"][0] == report.parts["backbone"][1]
    assert f"position tables resized: {report.resized[0]} ({side}, 1) (file: (169, 1)) and 7 more" in report.summary()
    old, now = source.state_dict(), model.state_dict()
    assert torch.equal(now[TABLE], resize_relative(old[TABLE], new))
    assert all(torch.equal(now[name], tensor) for name, tensor in old.items() if name in report.loaded)
    with torch.no_grad():
        model.eval().network(torch.rand(1, 3, 64, 96))

    with pytest.raises(UserError, match=r"MODEL\.SWIN\.WINDOW_SIZE or PRETRAIN_IMG_SIZE differs in network\.backbone"):
        load_weights(untouched, path, strict=True)


@pytest.mark.parametrize("flat", [False, True], ids=["published", "original release"])
def test_absolute_positions_of_another_image_size(tmp_path: Path, small_model: Make, flat: bool) -> None:
    settings: dict[str, Any] = {"MODEL__SWIN__APE": True}
    source = small_model(SWIN, MODEL__SWIN__PRETRAIN_IMG_SIZE=32, **settings)
    model = small_model(SWIN, MODEL__SWIN__PRETRAIN_IMG_SIZE=48, **settings)
    name = "network.backbone.absolute_pos_embed"
    table = source.state_dict()[name]
    state = {key.removeprefix("network.backbone."): t for key, t in source.state_dict().items() if ".backbone." in key}
    if flat:
        state["absolute_pos_embed"] = table.flatten(2).transpose(1, 2)
        assert state["absolute_pos_embed"].shape == (1, 64, 12)
    torch.save({"model": state}, tmp_path / "swin.pth")
    report = load_weights(model, tmp_path / "swin.pth")
    assert report.reshaped == {name: ((1, 12, 8, 8), (1, 12, 12, 12))}
    wanted = F.interpolate(table, size=(12, 12), mode="bicubic", align_corners=False)
    assert torch.equal(model.state_dict()[name], wanted)


def test_positions_in_rows_become_a_map_row_by_row() -> None:
    rows = torch.arange(4.0).reshape(1, 4, 1)
    assert np.array_equal(as_map("x.absolute_pos_embed", rows), [[[[0, 1], [2, 3]]]])
    assert as_map("x.other", rows) is rows

"""A native optimizer's state taken up by Detectron2's models, whatever of them is frozen."""

from __future__ import annotations

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import torch

import maskformer
from maskformer.checkpoint import layouts
from maskformer.engine.optimizer import build_optimizer, load_optimizer_state
from maskformer.integrations.detectron2.training import with_names_of

from .detectron2_models import PER_PIXEL, R50, SWIN, TINY, both, detectron2_config, labelled, with_segments, words


@pytest.mark.parametrize(
    ("recipe", "freeze_at"), [(R50, 0), (R50, 1), (R50, 2), (R50, 5), (PER_PIXEL, 2), (SWIN, 0), (SWIN, 2)]
)
def test_detectron2_optimizer_takes_up_a_native_state_with_frozen_stages(recipe: str, freeze_at: int) -> None:

    settings = {**TINY, "MODEL.BACKBONE.FREEZE_AT": freeze_at}
    native, other = both(recipe, settings)
    optimizer = build_optimizer(maskformer.get_cfg(recipe, words(settings)), native)
    sum(native(with_segments(labelled(5))).values()).backward()
    optimizer.step()
    theirs = build_optimizer(detectron2_config(recipe, settings), other)
    load_optimizer_state(theirs, with_names_of(other, optimizer.state_dict()))

    kind = layouts.backbone_kind(native.state_dict())
    published = {layouts.to_published(name, kind): p for name, p in native.named_parameters() if p.requires_grad}
    held = {tensor.data_ptr(): name for name, tensor in other.state_dict().items()}
    found = {held[p.data_ptr()]: theirs.state[p]["exp_avg"] for g in theirs.param_groups for p in g["params"]}
    assert found.keys() == published.keys()
    assert any(moment.any() for moment in found.values())
    for name, moment in found.items():
        assert torch.equal(moment, optimizer.state[published[name]]["exp_avg"]), name

"""A native optimizer's state taken up by Detectron2's models, whatever of them is frozen."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer
from detectron2.engine.hooks import LRScheduler
from detectron2.solver import build_lr_scheduler

import maskformer
from maskformer.checkpoint import layouts, save_checkpoint
from maskformer.engine.optimizer import build_optimizer, load_optimizer_state
from maskformer.engine.resume import find_resumable
from maskformer.errors import UserError
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


def test_detectron2_checkpoint_of_its_own_loop_is_not_passed_over_by_a_native_resume(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, model={"network.a": torch.zeros(2)})
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    cfg = detectron2_config(R50, {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"})
    trainer = SimpleTrainer(model, [], optimizer)
    trainer.register_hooks([LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer))])
    trainer.iter = 7
    DetectionCheckpointer(model, str(tmp_path), trainer=trainer).save("model_0000007", iteration=7)
    with pytest.raises(UserError, match=r"model_0000007.pth.* is one of a run of Detectron2"):
        find_resumable(tmp_path)

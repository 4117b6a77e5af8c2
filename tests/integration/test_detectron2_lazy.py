"""The LazyConfig example is the quickstart recipe, and its parts train together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, hooks

from maskformer.build import build_model
from maskformer.checkpoint import load_weights
from maskformer.config import get_cfg
from maskformer.data.datasets import shapes
from maskformer.engine.optimizer import build_optimizer
from maskformer.engine.schedule import build_schedule
from maskformer.integrations.detectron2.lazy import ClippingAdamW

ROOT = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart/shapes_panoptic.yaml"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(shapes.COUNTS, "val", 2)
    return LazyConfig.load(str(ROOT / "configs" / "detectron2" / "shapes_panoptic.py"))


def groups_of(optimizer: torch.optim.Optimizer) -> list[tuple[float, float, int]]:
    return [(g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in optimizer.param_groups]


def test_detectron2_lazy_config_is_the_quickstart(config: Any, tmp_path: Path) -> None:
    cfg = get_cfg(QUICKSTART, ["MODEL.DEVICE", "cpu"])
    native, model = build_model(cfg), instantiate(config.model)
    config.optimizer.params.model = model
    assert groups_of(instantiate(config.optimizer)) == groups_of(build_optimizer(cfg, native))
    factor, schedule = instantiate(config.lr_multiplier), build_schedule(cfg)
    for iteration in (0, 7, 50, 451, 899):
        assert factor(iteration / 900) == pytest.approx(schedule(iteration), rel=1e-12)

    # The same network: the same weights give the same results.
    torch.save({"model": model.state_dict()}, tmp_path / "lazy.pth")
    load_weights(native, str(tmp_path / "lazy.pth"), strict=True)
    (samples,) = [batch for batch, _ in zip(instantiate(config.dataloader.test), range(1), strict=False)]
    (theirs,), (ours,) = model.eval()(samples), native.eval()(samples)
    assert torch.allclose(theirs["sem_seg"], ours["sem_seg"], atol=1e-5)
    assert torch.equal(theirs["panoptic_seg"][0], ours["panoptic_seg"][0])


def test_detectron2_lazy_config_trains_and_evaluates(config: Any) -> None:
    config.dataloader.train.update({"total_batch_size": 2, "num_workers": 0})
    config.dataloader.train.dataset.count = 10
    config.train.max_iter = 3
    model = instantiate(config.model)
    config.optimizer.params.model = model
    before = model.sem_seg_head.predictor.class_head.weight.detach().clone()
    trainer = SimpleTrainer(model, instantiate(config.dataloader.train), instantiate(config.optimizer))
    trainer.register_hooks([hooks.LRScheduler(scheduler=instantiate(config.lr_multiplier))])
    trainer.train(0, 3)
    assert trainer.storage.history("total_loss").latest() > 0
    assert not torch.equal(model.sem_seg_head.predictor.class_head.weight, before)
    evaluator = instantiate(config.dataloader.evaluator)
    evaluator.reset()
    with torch.no_grad():
        for samples in instantiate(config.dataloader.test):
            evaluator.process(samples, model.eval()(samples))
    assert evaluator.evaluate().keys() == {"sem_seg", "panoptic_seg"}


def test_detectron2_clipping_optimizer_clips_the_norm_of_all_gradients() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = ClippingAdamW([{"params": [p]} for p in parameters], clip_norm=1.3, lr=0.1)
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])  # of norm 13
    optimizer.step()
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([1.2]))
    assert all((p < 0).all() for p in parameters)

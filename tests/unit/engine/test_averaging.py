"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskformer.config import get_cfg
from maskformer.engine.averaging import AveragingHook, WeightAverage, build_average
from tests.unit.engine.fakes import make_trainer


def test_the_average_follows_the_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)
    average = WeightAverage(model, decay=0.5)
    expected = 5.0
    for update, weight in enumerate((1.0, 2.0, 4.0, 8.0, 16.0), 1):
        nn.init.constant_(model.weight, weight)
        average.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        # The first update takes the weights as they are: what was there before is random.
        expected = weight if update == 1 else decay * expected + (1 - decay) * weight
    averaged = average.model.weight
    assert averaged.item() == pytest.approx(expected, rel=1e-6)
    assert not averaged.requires_grad
    assert model.weight.requires_grad


def test_buffers_are_the_present_ones() -> None:
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, decay=0.9)
    model(torch.randn(8, 2))
    average.update(model)
    assert torch.equal(average.model.running_mean, model.running_mean)
    assert average.model.num_batches_tracked == 1


def test_a_resumed_average_goes_on() -> None:
    model = nn.Linear(2, 2)
    whole, first = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    weights = [torch.randn(2, 2) for _ in range(4)]
    for number, weight in enumerate(weights):
        if number == 2:
            second = WeightAverage(model, 0.9)
            second.load_state_dict(first.state_dict())
            first = second
        with torch.no_grad():
            model.weight.copy_(weight)
        whole.update(model)
        first.update(model)
    assert torch.equal(first.model.weight, whole.model.weight)
    assert first.updates == 4


def test_the_hook_updates_after_every_step() -> None:
    trainer = make_trainer(max_iterations=3)
    average = WeightAverage(trainer.model, 0.9)
    trainer.train([AveragingHook(average)])
    assert average.updates == 3
    assert average.model.weight.item() != trainer.model.weight.item()


def test_there_is_no_average_unless_asked_for() -> None:
    model = nn.Linear(1, 1)
    assert build_average(get_cfg(), model) is None
    built = build_average(get_cfg(None, ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.7]), model)
    assert built is not None
    assert built.decay == 0.7

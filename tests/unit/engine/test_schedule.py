"""Schedules against numbers computed by hand from their formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maskformer.engine.schedule import build_schedule, build_scheduler
from maskformer.errors import UserError


def config(**solver: Any) -> SimpleNamespace:
    defaults = {
        "LR_SCHEDULER_NAME": "WarmupPolyLR",
        "MAX_ITER": 100,
        "POLY_LR_POWER": 0.9,
        "POLY_LR_CONSTANT_ENDING": 0.0,
        "WARMUP_FACTOR": 0.1,
        "WARMUP_ITERS": 10,
        "WARMUP_METHOD": "linear",
        "GAMMA": 0.1,
        "STEPS": (40, 80),
    }
    return SimpleNamespace(SOLVER=SimpleNamespace(**{**defaults, **solver}))


@pytest.mark.parametrize(
    ("iteration", "factor"),
    [
        (0, 0.1),
        (5, 0.55 * 0.9548854),  # w = 0.1·0.5 + 0.5; 0.95^0.9
        (10, 0.9095326),  # 0.9^0.9
        (50, 0.5358867),  # 0.5^0.9
        (99, 0.0158489),  # 0.01^0.9
        (100, 0.0),
    ],
)
def test_poly_with_linear_warmup(iteration: int, factor: float) -> None:
    assert build_schedule(config())(iteration) == pytest.approx(factor, abs=1e-6)


def test_poly_with_constant_warmup() -> None:
    at = build_schedule(config(WARMUP_METHOD="constant"))
    assert at(5) == pytest.approx(0.1 * 0.9548854, abs=1e-6)
    assert at(10) == pytest.approx(0.9095326, abs=1e-6)


def test_constant_ending_holds_after_warmup_only() -> None:
    at = build_schedule(config(POLY_LR_CONSTANT_ENDING=0.3))
    assert at(0) == pytest.approx(0.1)
    assert at(50) == pytest.approx(0.5358867, abs=1e-6)
    assert at(95) == pytest.approx(0.3)


@pytest.mark.parametrize(("iteration", "factor"), [(0, 0.1), (5, 0.55), (39, 1.0), (40, 0.1), (79, 0.1), (80, 0.01)])
def test_multi_step(iteration: int, factor: float) -> None:
    assert build_schedule(config(LR_SCHEDULER_NAME="WarmupMultiStepLR"))(iteration) == pytest.approx(factor)


def test_no_warmup() -> None:
    assert build_schedule(config(WARMUP_ITERS=0))(0) == 1.0


@pytest.mark.parametrize("key", ["LR_SCHEDULER_NAME", "WARMUP_METHOD"])
def test_unknown_names_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"SOLVER.{key} is 'Cosine'"):
        build_schedule(config(**{key: "Cosine"}))


def test_scheduler_started_in_the_middle_is_where_the_other_one_got() -> None:
    def optimizer() -> torch.optim.Optimizer:
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        return torch.optim.SGD([{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 0.1}])

    walked = build_scheduler(config(), optimizer())
    for _ in range(7):
        walked.optimizer.step()
        walked.step()
    jumped = build_scheduler(config(), optimizer(), start_iteration=7)
    for scheduler in (walked, jumped):
        scheduler.optimizer.step()
        scheduler.step()
    assert walked.get_last_lr() == jumped.get_last_lr()
    assert jumped.get_last_lr()[1] == pytest.approx(0.1 * (0.1 * 0.2 + 0.8) * 0.92**0.9)
    assert walked.last_epoch == jumped.last_epoch == 8

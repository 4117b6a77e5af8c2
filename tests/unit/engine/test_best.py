"""The best weights, and stopping early."""

from __future__ import annotations

import math

import pytest

from maskformer.engine.best import Best, BestWeights
from maskformer.engine.hooks import Evaluation, EvaluationHook
from maskformer.engine.trainer import Trainer
from maskformer.engine.writers import MetricsLog
from maskformer.errors import UserError
from tests.unit.engine.fakes import make_trainer

METRIC = "sem_seg/mIoU"


def watch(scores: list[float], **arguments: float) -> tuple[Trainer, BestWeights, list[Best]]:
    """A run of ten steps that is evaluated after every second one, and in the end."""
    saved: list[Best] = []
    left = iter(scores)
    best = BestWeights(METRIC, lambda trainer, found: saved.append(found), period=2, **arguments)  # type: ignore[arg-type]
    trainer = make_trainer(max_iterations=10)
    hook = EvaluationHook(2, lambda: Evaluation({METRIC: next(left)}, {}), MetricsLog([]), [best])
    trainer.train([hook])
    return trainer, best, saved


def test_weights_are_saved_whenever_they_are_the_best() -> None:
    trainer, best, saved = watch([1.0, 3.0, 2.0, math.nan, 4.0])
    assert [(each.score, each.iteration) for each in saved] == [(1.0, 1), (3.0, 3), (4.0, 9)]
    assert trainer.finished_iterations == 10
    assert best.best == Best(METRIC, 4.0, 9)


def test_a_run_stops_after_enough_evaluations_without_a_better_score() -> None:
    trainer, _, saved = watch([1.0, 3.0, 2.0, 2.5, 9.0], patience=2)
    assert trainer.finished_iterations == 8  # and the last evaluation is not done twice: the fifth score is left
    assert [each.score for each in saved] == [1.0, 3.0]
    trainer, _, saved = watch([1.0, 2.0, 1.9, 2.9, 9.0], patience=2, min_delta=1.0)
    assert trainer.finished_iterations == 6
    assert [each.score for each in saved] == [1.0]


def test_nothing_stops_before_the_first_number() -> None:
    trainer, _, saved = watch([math.nan] * 5, patience=1)
    assert trainer.finished_iterations == 10
    assert saved == []


def test_an_unknown_metric_names_those_there_are() -> None:
    best = BestWeights("mIoU", lambda trainer, found: None)
    with pytest.raises(UserError, match=r"CHECKPOINT.BEST_METRIC is 'mIoU'.*use one of sem_seg/mIoU$"):
        best(make_trainer(), {"sem_seg/mIoU": 1.0, "sem_seg/IoU-sky": 2.0})


def test_a_run_that_stopped_early_does_not_go_on_when_it_is_resumed() -> None:
    best = BestWeights(METRIC, lambda trainer, found: None, patience=2, period=2, best=Best(METRIC, 3.0, 3))
    for start, steps in ((6, 10), (8, 8)):  # one evaluation without a better score, and two
        trainer = make_trainer(max_iterations=10, start_iteration=start)
        best.stop_if_hopeless(trainer)
        trainer.train()
        assert trainer.finished_iterations == steps

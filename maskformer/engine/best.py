"""The best weights so far under a named score, and stopping when nothing gets better."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from maskformer.engine.trainer import Trainer
from maskformer.errors import UserError

logger = logging.getLogger(__name__)


class Best(NamedTuple):
    """The best evaluation so far.

    Attributes:
        metric: name of the score, such as ``sem_seg/mIoU``.
        score: its value; more is better.
        iteration: last step before that evaluation.
    """

    metric: str
    score: float
    iteration: int


class BestWeights:
    """Watches one score: saves the weights when it is better than ever, stops the run when that is long ago.

    Args:
        metric: name of the score.
        save: called with the trainer and what is best now.
        patience: number of evaluations without a better score after which the run stops; 0 for never.
        min_delta: how much more counts as better.
        period: iterations between evaluations.
        best: of the run that is resumed.
    """

    def __init__(
        self,
        metric: str,
        save: Callable[[Trainer, Best], None],
        *,
        patience: int = 0,
        min_delta: float = 0.0,
        period: int = 0,
        best: Best | None = None,
    ) -> None:
        self.metric = metric
        self.save = save
        self.patience = patience
        self.min_delta = min_delta
        self.period = period
        self.best = best

    def __call__(self, trainer: Trainer, scores: Mapping[str, float]) -> None:
        """Look at an evaluation's scores.

        Raises:
            UserError: if the score is not among them.
        """
        if self.metric not in scores:
            raise UserError(unknown_metric(self.metric, scores))
        score = float(scores[self.metric])
        least = -math.inf if self.best is None else self.best.score + self.min_delta
        if score > least:  # never so for NaN, the score of a data set without truth
            before = "" if self.best is None else f", {self.best.score:.4f} before"
            self.best = Best(self.metric, score, trainer.iteration)
            logger.info("best %s so far: %.4f at iteration %d%s", *self.best, before)
            self.save(trainer, self.best)
        self.stop_if_hopeless(trainer)

    def stop_if_hopeless(self, trainer: Trainer) -> None:
        """Stop the run if its best score is too long ago; before its first step, a run that had stopped stays so.

        Counted from the number of the iteration, so that a resumed run goes on counting without further state.
        """
        if not self.patience or self.best is None or trainer.is_last:
            return
        evaluations = (trainer.iteration - self.best.iteration) // self.period
        if evaluations >= self.patience:
            logger.info(
                "stopping early: %s was best (%.4f) at iteration %d, %d evaluations ago",
                *self.best,
                evaluations,
            )
            trainer.stop()


def unknown_metric(metric: str, known: Iterable[str]) -> str:
    """The sentence about a metric that no evaluation has; names those of whole data sets, not of single classes."""
    names = [name for name in known if "-" not in name.rpartition("/")[2]]
    return f"CHECKPOINT.BEST_METRIC is {metric!r}, which no evaluation gives; use one of {', '.join(names)}"


def build_best_weights(cfg: Any, save: Callable[[Trainer, Best], None], best: Best | None) -> BestWeights | None:
    """What ``CHECKPOINT.BEST_METRIC`` and ``SOLVER.EARLY_STOPPING`` ask for; None if no metric is named."""
    if not cfg.CHECKPOINT.BEST_METRIC:
        return None
    return BestWeights(
        cfg.CHECKPOINT.BEST_METRIC,
        save,
        patience=cfg.SOLVER.EARLY_STOPPING.PATIENCE,
        min_delta=cfg.SOLVER.EARLY_STOPPING.MIN_DELTA,
        period=cfg.TEST.EVAL_PERIOD,
        best=best if best is not None and best.metric == cfg.CHECKPOINT.BEST_METRIC else None,
    )

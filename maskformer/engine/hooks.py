"""What happens around the steps: numbers, progress, checkpoints, evaluations."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from maskformer import distributed
from maskformer.engine.device import preserved_rng
from maskformer.engine.metrics_log import StepTimer, max_memory_mb
from maskformer.engine.trainer import Hook, Trainer
from maskformer.engine.writers import MetricsLog, Record

logger = logging.getLogger(__name__)

STEP_PARTS = ("forward", "matching", "backward", "optimizer")


def is_due(trainer: Trainer, period: int) -> bool:
    """Whether the step just done completes a period; a period of 0 never does."""
    return period > 0 and trainer.finished_iterations % period == 0


class MetricsHook(Hook):
    """Every `period` steps, and after the last: losses (medians over the window), times (means), learning rate, memory.

    All processes take part; the log of all but the main one has no writers.

    Args:
        log: where the records go; closed at the end.
        period: steps between records.
        device: whose memory is reported.
    """

    def __init__(self, log: MetricsLog, period: int, device: torch.device) -> None:
        self.log = log
        self.period = period
        self.device = device
        self.timer = StepTimer()

    def after_step(self, trainer: Trainer) -> None:
        """Count the step; write a record when one is due."""
        self.timer.add(trainer.step_time, trainer.data_time)
        if is_due(trainer, self.period) or trainer.is_last:
            self.log.write(self.record(trainer))

    def after_train(self, trainer: Trainer) -> None:
        """Write what is left of a run that stopped early."""
        if self.timer.steps_in_window:
            self.log.write(self.record(trainer))

    def record(self, trainer: Trainer) -> Record:
        """Summary of the window; starts a new one."""
        steps = trainer.losses.read()
        scalars = {"total_loss": statistics.median(step.total for step in steps)}
        # A term that some steps lack counts where it is present.
        for name in sorted(dict.fromkeys(name for step in steps for name in step.terms), key=by_layer):
            scalars[name] = statistics.median(step.terms[name] for step in steps if name in step.terms)
        trainer.losses.clear()
        scalars["time"], data_time = self.timer.window_means()
        # A step waits for the slowest process, and the fullest memory is the one that overflows.
        slowest, fullest = zip(*distributed.gather((data_time, max_memory_mb(self.device))), strict=True)
        scalars["data_time"] = max(slowest)
        parts = trainer.watch.read()
        scalars.update({f"{part}_time": parts[part] / len(steps) for part in STEP_PARTS if part in parts})
        scalars["eta_seconds"] = self.timer.seconds_left(trainer.max_iterations - trainer.finished_iterations)
        scalars.update(learning_rates(trainer))
        if trainer.precision.scaler.is_enabled():
            scalars["loss_scale"] = trainer.precision.scaler.get_scale()
        scalars["max_mem"] = max(fullest)
        return Record(trainer.iteration, scalars)

    def close(self) -> None:
        """Close the writers."""
        self.log.close()


def learning_rates(trainer: Trainer) -> dict[str, float]:
    """The rates of the step just done.

    Returns:
        ``lr``, as in Detectron2 that of the largest group, and where they differ each group's as ``lr/<name>``.
    """
    groups = trainer.optimizer.param_groups
    largest = max(range(len(groups)), key=lambda i: len(groups[i]["params"]))
    rates = {"lr": trainer.learning_rates[largest]}
    if len(set(trainer.learning_rates)) > 1:
        names = (f"lr/{group['group_name']}" for group in groups)
        rates.update(zip(names, trainer.learning_rates, strict=True))
    return rates


def by_layer(name: str) -> int:
    """Sorts the last layer's terms, which have no number, before those of the earlier layers."""
    number = name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


class ProgressHook(Hook):
    """A progress bar with speed and time left, on a terminal."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            transient=True,
        )

    def before_train(self, trainer: Trainer) -> None:
        """Show the bar."""
        self.bar.start()
        self.task = self.bar.add_task("training", total=trainer.max_iterations, completed=trainer.start_iteration)

    def after_step(self, trainer: Trainer) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=trainer.finished_iterations)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.stop()


class CheckpointHook(Hook):
    """Saves ``model_%07d.pth`` (number of the last step) every `period` steps, and ``model_final.pth`` at the end.

    Args:
        period: steps between checkpoints; 0 for the end only.
        save: called with the trainer and a file name.
    """

    def __init__(self, period: int, save: Callable[[Trainer, str], None]) -> None:
        self.period = period
        self.save = save

    def after_step(self, trainer: Trainer) -> None:
        """Save when it is time."""
        if is_due(trainer, self.period):
            self._save(trainer, f"model_{trainer.iteration:07d}.pth")

    def after_train(self, trainer: Trainer) -> None:
        """Save the final model, unless a resumed run had nothing left to do."""
        if trainer.finished_iterations > trainer.start_iteration:
            self._save(trainer, "model_final.pth")

    def _save(self, trainer: Trainer, name: str) -> None:
        trainer.losses.read()  # stops the run here if the weights come from a loss that was not finite
        self.save(trainer, name)


class Evaluation(NamedTuple):
    """What an evaluation leaves.

    Attributes:
        scores: by flat name such as ``sem_seg/mIoU``.
        pictures: saved picture files by name.
    """

    scores: Mapping[str, float]
    pictures: Mapping[str, Path]

    def named(self, prefix: str) -> Evaluation:
        """The same with names that start with `prefix`."""
        scores = {prefix + name: score for name, score in self.scores.items()}
        return Evaluation(scores, {prefix + name: path for name, path in self.pictures.items()})

    def joined(self, other: Evaluation) -> Evaluation:
        """This and, after it, another one."""
        return Evaluation({**self.scores, **other.scores}, {**self.pictures, **other.pictures})


class EvaluationHook(Hook):
    """Evaluates every `period` steps and after the last one.

    Args:
        period: steps between evaluations; 0 for the end only.
        evaluate: evaluates the present weights.
        log: where scores and pictures go.
        watchers: called with the trainer and the scores of every evaluation; they may stop the run.
        finish: what is measured after the last step only, besides; None for nothing.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], Evaluation],
        log: MetricsLog,
        watchers: Sequence[Callable[[Trainer, Mapping[str, float]], None]] = (),
        finish: Callable[[], Evaluation] | None = None,
    ) -> None:
        self.period = period
        self.evaluate = evaluate
        self.log = log
        self.watchers = watchers
        self.finish = finish
        self._evaluated = -1

    def after_step(self, trainer: Trainer) -> None:
        """Evaluate when it is time; the last step's turn comes after training."""
        if is_due(trainer, self.period) and not trainer.is_last:
            self.run(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Evaluate the final weights, but only what is left if a run that stopped early has just done so."""
        last = [] if self.finish is None else [self.finish]
        if self._evaluated != trainer.iteration:
            self.run(trainer, last)
        elif last:
            self._write(trainer, self._measure(trainer, last))

    def run(self, trainer: Trainer, more: Sequence[Callable[[], Evaluation]] = ()) -> None:
        """Evaluate and write the scores, of `more` too; training continues as if nothing had happened."""
        evaluation = self._measure(trainer, [self.evaluate, *more])
        self._evaluated = trainer.iteration
        self._write(trainer, evaluation)
        for watch in self.watchers:
            watch(trainer, evaluation.scores)

    def _measure(self, trainer: Trainer, measures: Sequence[Callable[[], Evaluation]]) -> Evaluation:
        found = Evaluation({}, {})
        with preserved_rng():
            for measure in measures:
                found = found.joined(measure())
        trainer.model.train()
        return found

    def _write(self, trainer: Trainer, evaluation: Evaluation) -> None:
        if evaluation.scores:
            self.log.write(Record(trainer.iteration, dict(evaluation.scores)))
        for name, path in evaluation.pictures.items():
            self.log.write_picture(name, path, trainer.iteration)

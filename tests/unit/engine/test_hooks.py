"""Logging, checkpoints and evaluations around a loop with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from maskformer.engine import metrics_log
from maskformer.engine.hooks import CheckpointHook, Evaluation, EvaluationHook, MetricsHook, ProgressHook
from maskformer.engine.metrics_log import LossWindow, StepTimer
from maskformer.engine.trainer import Hook, Trainer
from maskformer.engine.writers import JsonLines, LogLine, MetricsLog, Record, TensorBoard
from maskformer.errors import UserError
from tests.unit.engine.fakes import make_trainer

CPU = torch.device("cpu")


class Memory:
    """A writer that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.pictures: list[tuple[str, Path, int]] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def write_picture(self, name: str, path: Path, iteration: int) -> None:
        self.pictures.append((name, path, iteration))

    def close(self) -> None:
        self.closed = True


def test_records_come_every_period_and_at_the_end() -> None:
    memory = Memory()
    make_trainer(max_iterations=5).train([MetricsHook(MetricsLog([memory]), 2, CPU)])
    assert [record.iteration for record in memory.records] == [1, 3, 4]
    first = memory.records[0].scalars
    # Weights 0 and 0.5 of the first two steps: losses 1 and 0.25, median 0.625.
    assert first["total_loss"] == pytest.approx(0.625)
    assert first["loss_a"] == pytest.approx(0.75 * 0.625)
    assert first["lr"] == pytest.approx(0.25 * 0.5)  # of the second step
    assert memory.records[-1].scalars["eta_seconds"] == 0
    assert {"time", "data_time", "max_mem"} <= first.keys()
    assert memory.closed


def test_what_is_left_of_a_run_that_stops_early_is_recorded() -> None:
    class Stop(Hook):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.iteration == 4:
                trainer.stop()

    memory = Memory()
    make_trainer(max_iterations=9).train([MetricsHook(MetricsLog([memory]), 3, CPU), Stop()])
    assert [record.iteration for record in memory.records] == [2, 4]
    assert all("total_loss" in record.scalars for record in memory.records)


def test_each_group_is_recorded_where_learning_rates_differ() -> None:
    memory = Memory()
    trainer = make_trainer(max_iterations=1)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    trainer.optimizer.add_param_group({"params": parameters, "lr": 7.0, "group_name": "backbone", "initial_lr": 7.0})
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda iteration: 1.0)
    trainer.train([MetricsHook(MetricsLog([memory]), 1, CPU)])
    scalars = memory.records[0].scalars
    assert (scalars["lr"], scalars["lr/head"], scalars["lr/backbone"]) == (7.0, 0.25, 7.0)


def test_log_line_reads_like_detectron2(caplog: pytest.LogCaptureFixture) -> None:
    scalars = {
        "total_loss": 10.12345,
        "loss_ce": 1.5,
        "time": 0.25,
        "data_time": 0.01,
        "eta_seconds": 62.4,
        "lr": 1e-4,
        "max_mem": 1234.4,
    }
    with caplog.at_level(logging.INFO, logger="maskformer"):
        LogLine().write(Record(19, scalars))
        LogLine().write(Record(19, {"sem_seg/mIoU": 50.0}))
    assert [record.message for record in caplog.records] == [
        " eta: 0:01:02  iter: 19  total_loss: 10.12  loss_ce: 1.5  time: 0.2500  data_time: 0.0100  "
        "lr: 0.0001  max_mem: 1234M"
    ]


def test_json_lines_are_appended_and_always_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    for iteration, value in ((19, 1.5), (39, math.nan)):
        writer = JsonLines(path)
        writer.write(Record(iteration, {"sem_seg/mIoU": value}))
        writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"iteration": 19, "sem_seg/mIoU": 1.5}, {"iteration": 39, "sem_seg/mIoU": None}]


def test_tensorboard_gets_curves_and_pictures(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (4, 3), (255, 0, 0)).save(picture)
    writer = TensorBoard(tmp_path / "events")
    writer.write(Record(3, {"total_loss": 2.0}))
    writer.write_picture("val/a", picture, 3)
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("total_loss")] == [(3, 2.0)]
    assert [(event.step, event.width, event.height) for event in events.Images("val/a")] == [(3, 4, 3)]


def test_window_reads_steps_with_different_terms_and_names_many_images_briefly() -> None:
    window = LossWindow()
    window.add(0, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, [])
    window.add(1, {"a": torch.tensor(3.0)}, [])
    assert [(step.iteration, step.terms, step.total) for step in window.read()] == [
        (0, {"a": 1.0, "b": 2.0}, 3.0),
        (1, {"a": 3.0}, 3.0),
    ]
    window.clear()
    with pytest.raises(UserError, match=r"7.png and 2 more; look"):
        window.add(2, {"a": torch.tensor(math.nan)}, [f"{i}.png" for i in range(10)])


def test_memory_is_not_known_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics_log.max_memory_mb(CPU) > 10
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows: importing it fails
    spec = importlib.util.spec_from_file_location("metrics_log_elsewhere", metrics_log.__file__)
    assert spec is not None
    assert spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert math.isnan(elsewhere.max_memory_mb(CPU))


def test_timer() -> None:
    timer = StepTimer(memory=3)
    for seconds in (9.0, 1.0, 2.0, 3.0):
        timer.add(seconds, seconds / 2)
    assert timer.window_means() == (3.75, 1.875)
    assert timer.seconds_left(10) == 20.0
    timer.add(5.0, 1.0)
    assert timer.window_means() == (5.0, 1.0)


def test_checkpoints_come_every_period_and_at_the_end() -> None:
    saved: list[str] = []

    def save(trainer: Trainer, name: str) -> None:
        saved.append(name)

    make_trainer(max_iterations=5).train([CheckpointHook(2, save)])
    assert saved == ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    saved.clear()
    make_trainer(max_iterations=5, start_iteration=5).train([CheckpointHook(2, save)])
    assert saved == []


@pytest.mark.parametrize(("period", "iterations"), [(0, [3]), (2, [1, 3]), (3, [2, 3]), (4, [3])])
def test_evaluations_come_every_period_and_once_at_the_end(period: int, iterations: list[int]) -> None:
    memory = Memory()

    def evaluate() -> Evaluation:
        torch.rand(3)
        return Evaluation({"sem_seg/mIoU": 1.0}, {"val/a": Path("a.png")})

    torch.manual_seed(3)
    expected = torch.get_rng_state()
    make_trainer(max_iterations=4).train([EvaluationHook(period, evaluate, MetricsLog([memory]))])
    assert [record.iteration for record in memory.records] == iterations
    assert [iteration for _, _, iteration in memory.pictures] == iterations
    assert torch.equal(torch.get_rng_state(), expected)


def test_what_is_measured_at_the_end_only_comes_once_even_after_an_early_stop() -> None:
    def evaluate() -> Evaluation:
        return Evaluation({"mIoU": 1.0}, {})

    def finish() -> Evaluation:
        return Evaluation({"TTA/mIoU": 2.0}, {"TTA/a": Path("a.png")})

    memory = Memory()
    make_trainer(max_iterations=4).train([EvaluationHook(2, evaluate, MetricsLog([memory]), finish=finish)])
    assert [(r.iteration, r.scalars) for r in memory.records] == [
        (1, {"mIoU": 1.0}),
        (3, {"mIoU": 1.0, "TTA/mIoU": 2.0}),
    ]
    assert [name for name, _, _ in memory.pictures] == ["TTA/a"]

    def stop(trainer: Trainer, scores: Any) -> None:
        trainer.stop()

    memory = Memory()
    make_trainer(max_iterations=4).train([EvaluationHook(2, evaluate, MetricsLog([memory]), [stop], finish)])
    assert [(r.iteration, r.scalars) for r in memory.records] == [(1, {"mIoU": 1.0}), (1, {"TTA/mIoU": 2.0})]


def test_training_continues_in_training_mode_after_an_evaluation() -> None:
    modes: list[bool] = []
    trainer: Any = make_trainer(max_iterations=3)
    forward = trainer.model.forward

    def noting(*arguments: Any, **keywords: Any) -> Any:
        modes.append(trainer.model.training)
        return forward(*arguments, **keywords)

    def evaluate() -> Evaluation:
        trainer.model.eval()
        return Evaluation({}, {})

    trainer.model.forward = noting
    trainer.train([EvaluationHook(1, evaluate, MetricsLog([]))])
    assert modes == [True, True, True]


def test_progress_bar_follows(capsys: pytest.CaptureFixture[str]) -> None:
    hook = ProgressHook()
    make_trainer(max_iterations=3, start_iteration=1).train([hook])
    assert hook.bar.tasks[0].completed == 3
    assert hook.bar.finished

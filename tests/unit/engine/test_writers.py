"""The parts of a step in the log line, Weights & Biases (a fake of it), and what is imported only when needed."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskformer.config import get_cfg
from maskformer.engine.writers import LogLine, MetricsLog, Record, WeightsAndBiases, build_wandb
from maskformer.errors import UserError


class FakeRun:
    """Keeps what it gets; `trouble` is raised from then on."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self.trouble: Exception | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:  # without `step`: wandb would drop iterations that come again
        if self.trouble is not None:
            raise self.trouble
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.exit_code = exit_code


class FakeWandb:
    def __init__(self) -> None:
        self.run = FakeRun()
        self.arguments: dict[str, Any] = {}
        self.trouble: Exception | None = None

    def init(self, **arguments: Any) -> FakeRun:
        self.arguments = arguments
        if self.trouble is not None:
            raise self.trouble
        return self.run

    @staticmethod
    def Image(path: str) -> tuple[str, str]:  # noqa: N802
        return "image", path


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake: Any = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def config(folder: Path, project: str = "segmentation") -> Any:
    return get_cfg(None, ["OUTPUT_DIR", str(folder), "WANDB_PROJECT", project])


def make_writer(folder: Path) -> WeightsAndBiases:
    writer = build_wandb(config(folder), "7f3a")
    assert writer is not None
    return writer


def test_log_line_splits_the_time_of_a_step(caplog: pytest.LogCaptureFixture) -> None:
    times = {
        "optimizer_time": 0.05,
        "backward_time": 0.2,
        "matching_time": 0.00625,
        "forward_time": 0.1,
        "data_time": 0.01,
        "time": 0.42305,
    }
    record = Record(19, {"total_loss": 1.0, "eta_seconds": 0.0, "lr": 1e-4, "max_mem": 10.0, **times})
    with caplog.at_level(logging.INFO, logger="maskformer"):
        LogLine().write(record)
        del record.scalars["matching_time"]
        LogLine().write(record)
    start, end = " eta: 0:00:00  iter: 19  total_loss: 1  time: 0.4230  data_time: 0.0100  ", "lr: 0.0001  max_mem: 10M"
    rest = "backward_time: 0.2000  optimizer_time: 0.0500  "
    assert [entry.message for entry in caplog.records] == [
        f"{start}forward_time: 0.1000  matching_time: 0.0063  {rest}{end}",
        f"{start}forward_time: 0.1000  {rest}{end}",
    ]


def test_wandb_run_has_project_name_id_and_config(wandb: FakeWandb, tmp_path: Path) -> None:
    make_writer(tmp_path / "swin_tiny")
    shown = wandb.arguments.pop("config")
    assert shown["SOLVER"]["BASE_LR"] == config(tmp_path).SOLVER.BASE_LR
    assert type(shown["SOLVER"]) is dict
    assert wandb.arguments == {
        "project": "segmentation",
        "name": "swin_tiny",
        "id": "7f3a",
        "resume": "allow",
        "allow_val_change": True,
        "dir": str(tmp_path / "swin_tiny"),
    }
    assert wandb.run.metrics == [("iteration", None), ("*", "iteration")]


def test_wandb_gets_numbers_by_iteration_and_pictures(wandb: FakeWandb, tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.write(Record(19, {"total_loss": 1.5, "sem_seg/IoU-sky": math.nan}))
    writer.write(Record(19, {"sem_seg/IoU-sky": math.nan}))
    writer.write_picture("val/a", tmp_path / "a.png", 19)
    writer.close()
    picture = ("image", str(tmp_path / "a.png"))
    assert wandb.run.logged == [{"iteration": 19, "total_loss": 1.5}, {"iteration": 19, "val/a": picture}]
    assert wandb.run.exit_code == 0


def test_wandb_run_that_an_error_ends_has_failed(wandb: FakeWandb, tmp_path: Path) -> None:
    log = MetricsLog([make_writer(tmp_path)])

    def train() -> None:
        try:
            raise UserError("a loss is not finite")
        finally:
            log.close()

    with pytest.raises(UserError):
        train()
    assert wandb.run.exit_code == 1


def test_trouble_with_wandb_is_told_once_and_training_goes_on(
    wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = make_writer(tmp_path)
    wandb.run.trouble = ConnectionError("the network is gone\nmuch detail")
    writer.write(Record(19, {"total_loss": 1.5}))
    writer.write_picture("val/a", tmp_path / "a.png", 19)
    wandb.run.trouble = None
    writer.write(Record(39, {"total_loss": 1.0}))  # trouble may pass
    wandb.run.trouble = ConnectionError("again")
    writer.close()
    assert [
        (entry.levelname, "(the network is gone); training goes on" in entry.message) for entry in caplog.records
    ] == [("WARNING", True)]
    assert wandb.run.logged == [{"iteration": 39, "total_loss": 1.0}]


@pytest.mark.parametrize(
    ("trouble", "reason"), [(Exception("No API key configured."), "No API"), (OSError(), "OSError")]
)
def test_wandb_that_cannot_start_stops_the_run(
    wandb: FakeWandb, tmp_path: Path, trouble: Exception, reason: str
) -> None:
    wandb.trouble = trouble
    with pytest.raises(UserError, match=rf"'segmentation'.*\({reason}.*`wandb login`.*WANDB_MODE=offline") as caught:
        build_wandb(config(tmp_path), "7f3a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [None, SimpleNamespace()], ids=["missing", "a folder of that name"])
def test_wandb_not_installed_says_how_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"WANDB_PROJECT 'segmentation' needs.*pip install \"maskformer\[wandb\]\""):
        build_wandb(config(tmp_path), "7f3a")


def test_wandb_is_not_imported_when_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    assert build_wandb(config(tmp_path, project=""), "7f3a") is None


def test_curve_writers_are_imported_only_when_needed() -> None:
    code = (
        "import sys, maskformer.engine.training, maskformer.engine.writers; "
        "print([name for name in sys.modules if name.startswith(('tensorboard', 'torch.utils.tensorboard'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

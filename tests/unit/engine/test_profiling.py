"""Traces of a few steps: which steps, what is in them, and what is said if they cannot be had."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer.engine import profiling
from maskformer.engine.profiling import ProfilerHook, parse_profile_window
from maskformer.engine.trainer import Hook, Trainer
from maskformer.errors import UserError
from maskformer.timing import StopWatch, section
from tests.unit.engine.fakes import make_trainer

CPU = torch.device("cpu")


class Failing(Hook):
    """Fails after a step."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self, trainer: Trainer) -> None:
        if trainer.iteration == self.iteration:
            raise ValueError("a failing hook")


def hook(start: int, end: int, folder: Path) -> ProfilerHook:
    return ProfilerHook(start=start, end=end, folder=folder / "profile", device=CPU)


def make_measured_trainer(**arguments: Any) -> Trainer:
    """A trainer whose steps have a section with their number, and another one inside."""
    trainer: Any = make_trainer(**arguments)
    watch = StopWatch(CPU)
    step = trainer.step

    def measured() -> None:
        with watch.measuring(), section(f"step {trainer.iteration}"):
            step()
            with section("matching"):
                torch.ones(3).sum()

    trainer.step = measured
    return trainer


def names_of_sections(folder: Path, window: str) -> list[str]:
    with gzip.open(folder / "profile" / f"iterations_{window}_rank0.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return sorted(name for name in names if name.startswith(("step", "matching")))


def messages(caplog: pytest.LogCaptureFixture, level: str) -> list[str]:
    return [entry.message for entry in caplog.records if entry.levelname == level]


@pytest.mark.parametrize(("start_iteration", "window"), [(0, (2, 4)), (2, (2, 4)), (0, (0, 1)), (0, (4, 6))])
def test_exactly_the_window_is_traced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, start_iteration: int, window: tuple[int, int]
) -> None:
    trainer = make_measured_trainer(max_iterations=6, start_iteration=start_iteration)
    with caplog.at_level(logging.INFO, logger="maskformer"):
        trainer.train([hook(*window, tmp_path)])
    name = f"{window[0]}-{window[1] - 1}"
    assert names_of_sections(tmp_path, name) == ["matching", *(f"step {i}" for i in range(*window))]
    assert messages(caplog, "WARNING") == []
    assert str(tmp_path / "profile" / f"iterations_{name}_rank0.json.gz") in messages(caplog, "INFO")[0]
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_summary_is_a_short_table(tmp_path: Path) -> None:
    make_measured_trainer().train([hook(1, 3, tmp_path)])
    lines = (tmp_path / "profile" / "iterations_1-2_rank0_summary.txt").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.strip() and line.split()[-1].isdigit()]
    assert len(rows) == profiling.OPERATIONS_LISTED
    assert "Self CPU" in lines[1]


@pytest.mark.parametrize(
    ("start_iteration", "window", "traced"),
    [(0, (4, 9), "4-5"), (3, (1, 5), "3-4"), (0, (6, 9), ""), (0, (20, 30), ""), (3, (0, 3), ""), (6, (2, 4), "")],
)
def test_iterations_that_a_run_does_not_do_are_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    start_iteration: int,
    window: tuple[int, int],
    traced: str,
) -> None:
    make_measured_trainer(max_iterations=6, start_iteration=start_iteration).train([hook(*window, tmp_path)])
    (warning,) = messages(caplog, "WARNING")
    assert warning.startswith(f"--profile {window[0]}:{window[1]}: this run starts at iteration {start_iteration} and")
    if traced:
        assert warning.endswith(f"only the iterations {traced.replace('-', ' to ')} are traced")
        assert len(names_of_sections(tmp_path, traced)) == 3
    else:
        assert warning.endswith("nothing is traced")
        assert not (tmp_path / "profile").exists()


def test_an_error_inside_the_window_leaves_the_steps_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="failing hook"):
        make_measured_trainer(max_iterations=6).train([hook(1, 5, tmp_path), Failing(2)])
    assert names_of_sections(tmp_path, "1-2") == ["matching", "step 1", "step 2"]
    assert messages(caplog, "WARNING") == ["the run ends inside the window of --profile, with 2 of its steps done"]
    make_trainer(max_iterations=2).train([hook(0, 1, tmp_path / "next")])  # the profiler is free again
    assert names_of_sections(tmp_path / "next", "0-0") == []


def test_an_error_in_the_first_step_leaves_what_there_is(tmp_path: Path) -> None:
    trainer: Any = make_trainer(max_iterations=6)
    trainer.batches.position = None
    with pytest.raises(TypeError):
        trainer.train([hook(0, 3, tmp_path)])
    assert (tmp_path / "profile" / "iterations_0-0_rank0.json.gz").exists()


def test_each_process_has_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "rank", lambda: 3)
    make_trainer().train([hook(1, 2, tmp_path)])
    assert (tmp_path / "profile" / "iterations_1-1_rank3.json.gz").exists()


def test_a_trace_that_cannot_be_written_does_not_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").touch()
    trainer = make_trainer()
    trainer.train([hook(1, 2, tmp_path)])
    assert trainer.finished_iterations == 4
    assert "could not be written" in messages(caplog, "WARNING")[0]


def test_window_is_parsed() -> None:
    assert parse_profile_window("20:30") == (20, 30)
    assert parse_profile_window("0:1") == (0, 1)


@pytest.mark.parametrize("text", ["abc", "30:20", "-1:3", "5", "5:5", "", "1:2:3", "1:", "1.0:3", " 1:2", "²:³"])
def test_a_window_without_iterations_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--profile .*START:END.*20:30") as caught:
        parse_profile_window(text)
    assert str(caught.value).startswith(f"--profile {text} ")

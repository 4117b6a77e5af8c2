"""Where the numbers of a run go: log line, metrics.json, TensorBoard, Weights & Biases."""

from __future__ import annotations

import datetime
import importlib
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from maskformer.config import dump
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

# Mean seconds of a step and of its parts, in the order of the log line; only the first two are always there.
TIMES = ("time", "data_time", "forward_time", "matching_time", "backward_time", "optimizer_time")


class Record(NamedTuple):
    """Numbers of one moment of training.

    Attributes:
        iteration: from 0.
        scalars: value by name, under Detectron2's names.
    """

    iteration: int
    scalars: dict[str, float]


class Writer(Protocol):
    """A place where records and pictures go."""

    def write(self, record: Record) -> None:
        """Take the numbers of a log period, or of an evaluation."""

    def write_picture(self, name: str, path: Path, iteration: int) -> None:
        """Take a picture that an evaluation saved."""

    def close(self) -> None:
        """Write what is pending."""


class LogLine:
    """The line that Detectron2's users know, through `logging`; evaluations have their own table and are left out."""

    def write(self, record: Record) -> None:
        """Log a training record."""
        s = record.scalars
        if "total_loss" not in s:
            return
        losses = [f"{name}: {value:.4g}" for name, value in s.items() if "loss" in name]
        parts = [
            f"eta: {datetime.timedelta(seconds=int(s['eta_seconds']))}",
            f"iter: {record.iteration}",
            *losses,
            *(f"{name}: {s[name]:.4f}" for name in TIMES if name in s),
            f"lr: {s['lr']:.5g}",
            f"max_mem: {s['max_mem']:.0f}M",
        ]
        logger.info(" " + "  ".join(parts))

    def write_picture(self, name: str, path: Path, iteration: int) -> None:
        """Pictures do not fit in a line."""

    def close(self) -> None:
        """Nothing is pending."""


class JsonLines:
    """``metrics.json``: one JSON object a line with Detectron2's fields, appended to when a run is resumed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a line; numbers that JSON does not know (NaN of a class without truth) become null."""
        values = {name: value if math.isfinite(value) else None for name, value in record.scalars.items()}
        line = json.dumps({"iteration": record.iteration, **values}, sort_keys=True)
        self._file.write(line + "\n")
        self._file.flush()

    def write_picture(self, name: str, path: Path, iteration: int) -> None:
        """Pictures are files already."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Curves and evaluation pictures as TensorBoard events.

    Args:
        directory: where the event files go.
        purge_step: first iteration that a resumed run does anew; None for a new run.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a stopped run wrote beyond its last checkpoint is hidden, so that curves do not go back and forth.
        self._writer: Any = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, record: Record) -> None:
        """Add a point to each curve."""
        for name, value in record.scalars.items():
            self._writer.add_scalar(name, value, record.iteration)
        self._writer.flush()

    def write_picture(self, name: str, path: Path, iteration: int) -> None:
        """Add a saved picture."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), iteration, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """Curves and evaluation pictures on Weights & Biases.

    Trouble at the start stops the run, later trouble (the network fails, the disk is full) only warns, once.

    Args:
        project: in which the run is shown.
        name: of the run.
        run_id: the same text whenever the run is resumed, another one for each new run.
        config: shown beside the run, and what runs are sorted by.
        directory: exists; wandb puts its folder ``wandb`` there.

    Raises:
        UserError: if wandb is not installed, nobody is logged in, or the server cannot be reached.
    """

    def __init__(self, *, project: str, name: str, run_id: str, config: Mapping[str, Any], directory: Path) -> None:
        self._wandb = _import_wandb(project)
        self._warned = False
        try:
            self._run: Any = self._wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                config=dict(config),
                allow_val_change=True,  # a resumed run may have another config; training has warned of it
                dir=str(directory),
            )
            # Our own step: W&B's counter would drop, without an error, the iterations that a resumed run does anew.
            self._run.define_metric("iteration")
            self._run.define_metric("*", step_metric="iteration")
        except Exception as error:  # wandb's own errors, and those of its network libraries
            raise UserError(
                f"WANDB_PROJECT {project!r}: Weights & Biases could not start the run ({_first_line(error)}); log in "
                "with `wandb login`, set the environment variable WANDB_MODE=offline to keep the curves on this "
                "machine until `wandb sync`, or leave WANDB_PROJECT empty"
            ) from error

    def write(self, record: Record) -> None:
        """Add a point to each curve; NaN and infinity, which curves do not show, are left out."""
        values = {name: value for name, value in record.scalars.items() if math.isfinite(value)}
        if values:
            self._attempt(lambda: self._run.log({"iteration": record.iteration, **values}))

    def write_picture(self, name: str, path: Path, iteration: int) -> None:
        """Add a saved picture."""
        self._attempt(lambda: self._run.log({"iteration": iteration, name: self._wandb.Image(str(path))}))

    def close(self) -> None:
        """Upload what is pending; a run that an error ends is marked as failed."""
        exit_code = 0 if sys.exc_info()[0] is None else 1
        self._attempt(lambda: self._run.finish(exit_code=exit_code))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, hours of training are worth more than a curve
            if not self._warned:
                logger.warning(
                    "Weights & Biases does not take what is logged (%s); training goes on, and metrics.json and "
                    "TensorBoard have what is missing there",
                    _first_line(error),
                )
            self._warned = True


def _import_wandb(project: str) -> Any:
    try:
        wandb = importlib.import_module("wandb")
        wandb.init  # noqa: B018  without wandb, a folder of runs called wandb/ can be imported too
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"WANDB_PROJECT {project!r} needs wandb, which cannot be imported ({_first_line(error)}); install it with "
            '`pip install "maskformer[wandb]"`, or leave WANDB_PROJECT empty'
        ) from error
    return wandb


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_wandb(cfg: Any, run_id: str) -> WeightsAndBiases | None:
    """The writer to the project ``WANDB_PROJECT``; None, and wandb is not touched, if it is empty.

    Args:
        cfg: of the run; its ``OUTPUT_DIR`` exists and gives the run its name.
        run_id: the same text whenever the run is resumed, another one for each new run.

    Raises:
        UserError: see `WeightsAndBiases`.
    """
    if not cfg.WANDB_PROJECT:
        return None
    folder = Path(cfg.OUTPUT_DIR)
    return WeightsAndBiases(
        project=cfg.WANDB_PROJECT,
        name=folder.absolute().name,
        run_id=run_id,
        config=yaml.safe_load(dump(cfg)),
        directory=folder,
    )


class MetricsLog:
    """Sends records to all writers.

    Args:
        writers: where they go.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write(self, record: Record) -> None:
        """Write a record everywhere."""
        for writer in self._writers:
            writer.write(record)

    def write_picture(self, name: str, path: Path, iteration: int) -> None:
        """Write a picture everywhere."""
        for writer in self._writers:
            writer.write_picture(name, path, iteration)

    def close(self) -> None:
        """Close all writers."""
        for writer in self._writers:
            writer.close()

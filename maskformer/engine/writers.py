"""Where the numbers of a run go: log line, metrics.json, TensorBoard."""

from __future__ import annotations

import datetime
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

logger = logging.getLogger(__name__)


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
            f"time: {s['time']:.4f}",
            f"data_time: {s['data_time']:.4f}",
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

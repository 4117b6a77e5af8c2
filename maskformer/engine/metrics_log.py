"""What a run measures of itself: the losses and durations of recent steps, and memory; `writers` takes the numbers."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskformer.errors import UserError

try:
    import resource
except ImportError:  # only on POSIX
    resource = None  # type: ignore[assignment]

MAX_FILES_NAMED = 8


class StepLosses(NamedTuple):
    """The losses of one step as numbers.

    Attributes:
        iteration: from 0.
        terms: loss by name.
    """

    iteration: int
    terms: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of all terms."""
        return sum(self.terms.values())


class LossWindow:
    """Losses of the steps since the last log line, kept on the device until someone reads them.

    Reading copies them to the host in one piece, the only synchronisation that logging costs, and stops the run if one
    is not finite. Losses that are on the CPU already are looked at right away, before they reach the weights.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, list[str], Tensor, list[str]]] = []
        self._read: list[StepLosses] = []

    def add(self, iteration: int, losses: Mapping[str, Tensor], file_names: Sequence[str]) -> None:
        """Note the losses of a step.

        Args:
            iteration: of the step, from 0.
            losses: scalar loss by name, on any device.
            file_names: images of the step, named if a loss is not finite.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._pending.append((iteration, list(losses), values, list(file_names)))
        if values.device.type == "cpu":
            self.read()

    def read(self) -> list[StepLosses]:
        """All steps of the window as numbers.

        Raises:
            UserError: if a loss is not finite, naming iteration, terms and images.
        """
        if self._pending:
            # Steps may differ in their terms, so they are joined flat and split again on the host.
            flat = torch.cat([values for _, _, values, _ in self._pending]).tolist()
            pending, self._pending = self._pending, []
            for iteration, names, _, file_names in pending:
                terms = dict(zip(names, flat[: len(names)], strict=True))
                flat = flat[len(names) :]
                check_finite(iteration, terms, file_names)
                self._read.append(StepLosses(iteration, terms))
        return self._read

    def clear(self) -> None:
        """Start a new window."""
        self._pending, self._read = [], []


def check_finite(iteration: int, terms: Mapping[str, float], file_names: Sequence[str]) -> None:
    """Stop the run if a loss is NaN or infinite.

    Raises:
        UserError: naming the iteration, the terms and the images.
    """
    broken = [f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)]
    if not broken:
        return
    files = ", ".join(file_names[:MAX_FILES_NAMED])
    if len(file_names) > MAX_FILES_NAMED:
        files += f" and {len(file_names) - MAX_FILES_NAMED} more"
    raise UserError(
        f"Training stopped at iteration {iteration}, because {', '.join(broken)} on the images {files}; look at these, "
        "lower SOLVER.BASE_LR, switch SOLVER.CLIP_GRADIENTS.ENABLED on or SOLVER.AMP.ENABLED off"
    )


class StepTimer:
    """Durations of recent steps: for the window being logged, and a longer memory for the time left."""

    def __init__(self, memory: int = 1000) -> None:
        self._memory = memory
        self._all: list[float] = []
        self._window: list[tuple[float, float]] = []

    def add(self, step_time: float, data_time: float) -> None:
        """Note the seconds of a step and the part of it spent waiting for data."""
        self._window.append((step_time, data_time))
        self._all = [*self._all[-self._memory + 1 :], step_time]

    def window_means(self) -> tuple[float, float]:
        """Mean seconds per step and per wait for data since the last call."""
        window, self._window = self._window, []
        return statistics.fmean(t for t, _ in window), statistics.fmean(d for _, d in window)

    def seconds_left(self, steps: int) -> float:
        """Estimate for `steps` more of them; the median, so that a slow first step does not mislead."""
        return statistics.median(self._all) * steps


def max_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of the tensors on a CUDA device, else of this process (resident set).

    NaN where the operating system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB

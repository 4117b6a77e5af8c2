"""What a run measures of itself: the losses and durations of recent steps, and memory; `writers` takes the numbers."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskformer import distributed

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

    Reading copies them to the host in one piece, the only synchronisation that logging costs, adds up the shares of all
    processes, and stops the run if one is not finite: every process reads at the same steps. Losses that are on the CPU
    already are looked at right away, before they reach the weights.
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
        """All steps of the window as numbers: the losses of the whole batch, over all processes.

        Raises:
            UserError: if a loss is not finite, naming iteration, terms and images.
        """
        pending, self._pending = self._pending, []
        if pending:
            # Steps may differ in their terms, so they are joined flat and split again on the host.
            flat = torch.cat([values for _, _, values, _ in pending]).tolist()
            own, problem = [], None
            for iteration, names, _, file_names in pending:
                terms = dict(zip(names, flat[: len(names)], strict=True))
                flat = flat[len(names) :]
                problem = problem or what_is_not_finite(iteration, terms, file_names)
                own.append(StepLosses(iteration, terms))
            shares = distributed.gather((own, problem))
            for _, other_problem in shares:
                if other_problem is not None:
                    raise distributed.SharedUserError(other_problem)
            self._read += [add_shares(step) for step in zip(*(steps for steps, _ in shares), strict=True)]
        return self._read

    def clear(self) -> None:
        """Start a new window."""
        self._pending, self._read = [], []


def add_shares(shares: Sequence[StepLosses]) -> StepLosses:
    """The losses of one step, from what each process has of them."""
    terms: dict[str, float] = {}
    for share in shares:
        for name, value in share.terms.items():
            terms[name] = terms.get(name, 0.0) + value
    return StepLosses(shares[0].iteration, terms)


def what_is_not_finite(iteration: int, terms: Mapping[str, float], file_names: Sequence[str]) -> str | None:
    """A sentence that names iteration, terms and images if a loss is NaN or infinite, else None."""
    broken = [f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)]
    if not broken:
        return None
    files = ", ".join(file_names[:MAX_FILES_NAMED])
    if len(file_names) > MAX_FILES_NAMED:
        files += f" and {len(file_names) - MAX_FILES_NAMED} more"
    return (
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

    @property
    def steps_in_window(self) -> int:
        """Number of steps noted since the last call of `window_means`."""
        return len(self._window)

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

"""Traces of a few training steps: what ran when, for a viewer, and the operations that took longest."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from maskformer.distributed import rank
from maskformer.engine.trainer import Hook, Trainer
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

OPERATIONS_LISTED = 10


def parse_profile_window(text: str) -> tuple[int, int]:
    """The iterations that ``--profile`` names.

    Args:
        text: ``START:END``, such as ``20:30`` for the iterations 20 to 29.

    Returns:
        The first iteration, from 0, and the one after the last.

    Raises:
        UserError: if it is not such a window, or an empty one.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    start, end = (int(number) for number in match.groups()) if match else (0, 0)
    if start >= end:
        raise UserError(
            f"--profile {text} names no iterations; write START:END with 0 <= START < END, such as 20:30 for the "
            "iterations 20 to 29"
        )
    return start, end


class ProfilerHook(Hook):
    """Traces the iterations `start` to `end` - 1 of this process.

    Leaves ``iterations_20-29_rank0.json.gz``, a trace for https://ui.perfetto.dev or chrome://tracing, and
    ``iterations_20-29_rank0_summary.txt``, the operations that took longest. Should the run end inside the window, the
    files hold, and are named after, the iterations done. Put it last among the hooks: what the others do after the step
    before the window is left out then.

    Args:
        start: first iteration to trace, from 0.
        end: the one after the last.
        folder: where the files go; made when needed.
        device: where the work is done.
    """

    def __init__(self, *, start: int, end: int, folder: Path, device: torch.device) -> None:
        self.start = start
        self.end = end
        self.folder = folder
        self.device = device
        self._profile: profile | None = None
        self._steps_done = 0  # inside the window

    def before_train(self, trainer: Trainer) -> None:
        """Warn of iterations that this run does not do; begin if the first step is to be traced."""
        begin, end = max(self.start, trainer.start_iteration), min(self.end, trainer.max_iterations)
        if (begin, end) != (self.start, self.end):
            logger.warning(
                "--profile %d:%d: this run starts at iteration %d and ends before iteration %d, so %s traced",
                self.start,
                self.end,
                trainer.start_iteration,
                trainer.max_iterations,
                f"only the iterations {begin} to {end - 1} are" if begin < end else "nothing is",
            )
        self.start, self.end = begin, end
        self._begin_if_next(trainer.start_iteration)

    def after_step(self, trainer: Trainer) -> None:
        """End the window after its last step; begin it before its first."""
        if self._profile is not None:
            self._steps_done += 1
            if trainer.finished_iterations >= self.end:
                self._finish()
        self._begin_if_next(trainer.finished_iterations)

    def close(self) -> None:
        """Write what there is if the run ends inside the window."""
        if self._profile is not None:
            logger.warning("the run ends inside the window of --profile, with %d of its steps done", self._steps_done)
            self._finish()

    def _begin_if_next(self, iteration: int) -> None:
        if iteration != self.start or self.start >= self.end:
            return
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._wait_for_device()
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _finish(self) -> None:
        """End the window and write its files; a trace that cannot be written does not end a training."""
        assert self._profile is not None
        finished, self._profile = self._profile, None
        last = self.start + max(self._steps_done, 1) - 1  # a first step that failed is in the trace as far as it came
        name = f"iterations_{self.start}-{last}_rank{rank()}"
        trace, summary = self.folder / f"{name}.json.gz", self.folder / f"{name}_summary.txt"
        try:
            self._wait_for_device()
            finished.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(trace))
            summary.write_text(summarize(finished, self.device), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            logger.warning("the trace of --profile could not be written to %s: %s", trace, error)
        else:
            logger.info("trace of the iterations %d to %d: %s", self.start, last, trace)

    def _wait_for_device(self) -> None:
        # Kernels are queued: without waiting, some of the step before would be in the trace and the last ones not.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def summarize(finished: profile, device: torch.device) -> str:
    """A table of the operations that took longest themselves, without those they called, on `device`."""
    events = finished.key_averages()
    on_cuda = device.type == "cuda"
    if on_cuda:
        # On the device a section of `maskformer.timing` counts the kernels inside as its own and would top the list.
        kept = [event for event in events if not getattr(event, "is_user_annotation", False)]
        events = EventList(kept, use_device="cuda", profile_memory=True)
    by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    return str(events.table(sort_by=by, row_limit=OPERATIONS_LISTED, max_name_column_width=60)) + "\n"

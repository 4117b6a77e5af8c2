"""Where the time of a training step goes: named sections, measured only while a `StopWatch` listens."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

_watch: StopWatch | None = None


@contextmanager
def section(name: str) -> Iterator[None]:
    """Count the time inside for `name`, if someone measures; a section inside another one interrupts that one.

    Sections carry their names in profiler traces too.
    """
    watch = _watch  # the one that leaves is the one that entered, whoever listens by then
    if watch is None:
        yield
        return
    with torch.profiler.record_function(name):
        watch.enter(name)
        try:
            yield
        finally:
            watch.leave()


class StopWatch:
    """Adds up the seconds of each section.

    On CUDA the device's own clock counts: events are put into its stream and read later, so that measuring waits for
    nothing.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: list[str] = []
        # At each moment: the section that begins or goes on then, None outside all of them.
        self._moments: list[tuple[float | torch.cuda.Event, str | None]] = []

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Sections entered inside are counted."""
        global _watch
        before, _watch = _watch, self
        try:
            yield
        finally:
            _watch = before

    def enter(self, name: str) -> None:
        """A section begins."""
        self._open.append(name)
        self._mark(name)

    def leave(self) -> None:
        """The innermost section ends."""
        self._open.pop()
        self._mark(self._open[-1] if self._open else None)

    def _mark(self, name: str | None) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append((event, name))
        else:
            self._moments.append((time.perf_counter(), name))

    def read(self) -> dict[str, float]:
        """Seconds of each section since the last call; on CUDA this waits for the device.

        Of a section under way, the time up to now is in this reading and the rest in the next.
        """
        if self._open:
            self._mark(self._open[-1])
        if self.device.type == "cuda" and self._moments:
            torch.cuda.synchronize(self.device)
        seconds: defaultdict[str, float] = defaultdict(float)
        for (start, name), (end, _) in pairwise(self._moments):
            if name is not None:
                seconds[name] += _seconds_between(start, end)
        self._moments = self._moments[-1:] if self._open else []
        return dict(seconds)


def _seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end) / 1000

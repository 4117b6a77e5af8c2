"""Long work on many files, shown while it goes on."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar on a terminal, else a log line every few seconds, with the time that is left.

    Args:
        what: is done, in a few words.
        total: how many there are.

    Yields:
        What is to be told how many are done.
    """
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    start = last_line = time.perf_counter()

    def report(done: int) -> None:
        nonlocal last_line
        now = time.perf_counter()
        if now - last_line >= SECONDS_BETWEEN_LINES and done:
            last_line = now
            left = datetime.timedelta(seconds=int((now - start) / done * (total - done)))
            logger.info("%s: %d/%d ETA=%s", what, done, total, left)

    yield report

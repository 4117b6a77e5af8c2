"""Many files made from others: in parallel, resumable, shown while it goes on, and counted at the end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from maskformer.data.progress import progress
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)
R = TypeVar("R")

MOST_FAILURES = 10
"""After so many files that cannot be made, the others are not tried: the disk is full, or none of them can be read."""


class Step(Protocol[Item, Result]):
    """What is done with each item of a preparation, in any process and order."""

    def finished(self, item: Item) -> Result | None:
        """The result of an item whose files are there, whole and as `make` makes them; else None."""

    def make(self, item: Item) -> Result:
        """Makes the files of an item, none of which ever exists half-written.

        Raises:
            UserError: if an input is missing or damaged, or a file cannot be written.
        """


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What became of all items.

    Attributes:
        results: of the items, in their order.
        made: how many were made now.
        kept: how many an earlier run had made.
    """

    results: list[R]
    made: int
    kept: int


@dataclass(frozen=True)
class _Done:
    result: Any
    made: bool
    replaced: bool = False


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a worker, in one sentence; with the traceback of one that nobody thought of."""

    message: str
    trace: str = ""


def run(step: Step[Any, R], items: Sequence[Any], *, what: str, workers: int, overwrite: bool = False) -> Outcome[R]:
    """Makes what is not there yet.

    Args:
        step: what is done with each item; pickled once for each worker.
        items: picklable; an attribute ``target`` is the file that is made, ``raw`` what it is made from.
        what: is made, named in progress and errors.
        workers: processes; 1 works in this one.
        overwrite: make also what is there.

    Raises:
        UserError: if some items cannot be made, for whatever reason: the others are made all the same, up to
            `MOST_FAILURES`.
    """
    done: dict[int, _Done] = {}
    failures: dict[int, _Failure] = {}
    # Processes first: a progress bar has a thread, which they must not be forked beside.
    with _results(step, items, workers, overwrite) as results, progress(what, len(items)) as report:
        for index, result in results:
            if isinstance(result, _Failure):
                failures[index] = result
            else:
                done[index] = result
            report(len(done) + len(failures))
            if len(failures) >= MOST_FAILURES:
                break
    if failures:
        first = failures[min(failures)]
        raise UserError(_sentence(failures, what, len(done))) from (RuntimeError(first.trace) if first.trace else None)
    ordered = [done[index] for index in range(len(items))]
    replaced = sum(one.replaced for one in ordered)
    if replaced:
        logger.warning(
            "%d %s were there, but damaged or other than this command makes them, and were made again", replaced, what
        )
    made = sum(one.made for one in ordered)
    return Outcome([one.result for one in ordered], made, len(ordered) - made)


def _sentence(failures: dict[int, _Failure], what: str, done: int) -> str:
    first = failures[min(failures)].message
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"{first}{others}; {done} {what} are finished, and running the same command again makes the others"


# ------------------------------------------------------------------ processes
_Results = Iterator[tuple[int, Any]]


@contextmanager
def _results(step: Step[Any, Any], items: Sequence[Any], workers: int, overwrite: bool) -> Iterator[_Results]:
    """Index and result of each item, as they come; what has not begun when the block ends is dropped."""
    if workers <= 1 or len(items) < 2:
        yield ((index, _one(step, item, overwrite)) for index, item in enumerate(items))
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), initializer=_remember, initargs=(step, overwrite))
    try:
        yield _completed({pool.submit(_one_remembered, item): index for index, item in enumerate(items)})
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _completed(futures: dict[Future[Any], int]) -> _Results:
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was ended from outside, probably because memory ran out: run the command again with "
            "fewer --workers, and it goes on from here"
        ) from error


_WATCH_SECONDS = 1.0
_remembered: tuple[Step[Any, Any], bool] | None = None


def _remember(step: Step[Any, Any], overwrite: bool) -> None:
    """Runs once in each worker; Ctrl-C is for the main process, which ends the workers."""
    global _remembered
    _remembered = step, overwrite
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not what the main process does, which a fork has inherited
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker soon after the main process, which a signal can end before it has ended the workers.

    Without it they would wait for work for good: each has a copy of the pipe's other end.
    """
    parent, main = os.getppid(), multiprocessing.parent_process()
    while os.getppid() == parent and (main is None or main.is_alive()):
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _one_remembered(item: Any) -> _Done | _Failure:
    assert _remembered is not None
    return _one(_remembered[0], item, _remembered[1])


def _one(step: Step[Any, Any], item: Any, overwrite: bool) -> _Done | _Failure:
    try:
        kept = None if overwrite else step.finished(item)
        if kept is not None:
            return _Done(kept, False)
        target = getattr(item, "target", None)
        replaced = not overwrite and isinstance(target, Path) and target.exists()
        return _Done(step.make(item), True, replaced)
    except UserError as error:
        return _Failure(str(error))
    except Exception as error:  # one picture that nobody thought of must not end the work on all others
        source = str(getattr(item, "raw", item))
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        message = f"what {source!r} belongs to cannot be made ({reason:.200}): unpack it again, or report this"
        return _Failure(message, traceback.format_exc())


# ------------------------------------------------------------------ the end
def verify(
    name: str, targets: Sequence[Path], outcome: Outcome[Any], *, official: int, kind: str = "label maps"
) -> None:
    """Looks whether everything is there and says how much it is; removes what killed runs left half-written of it.

    Args:
        name: of the data set.
        targets: the files that there must be, at least one.
        outcome: of the run that made them.
        official: how many there are in the complete data set; another number is a warning, since parts of a data set
            are of use too.
        kind: what the files are.

    Raises:
        UserError: if one of them is not there.
    """
    missing = [path for path in targets if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} {kind} of {name} have gone again, such as {str(missing[0])!r}: find out what removes "
            "them, and run the command again"
        )
    folders = {path.parent for path in targets}
    _remove_leftovers(folders, {path.name for path in targets})
    where = os.path.commonpath([str(folder) for folder in folders])
    logger.info("%s: %d %s in %s (%d made, %d kept)", name, len(targets), kind, where, outcome.made, outcome.kept)
    if len(targets) != official:
        logger.warning("%s: the complete data set has %d %s, not %d", name, official, kind, len(targets))


def _remove_leftovers(folders: Iterable[Path], names: Collection[str]) -> None:
    """Removes the temporary files of `maskformer.writing` for these names, but not those of processes that live."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            name, _, pid = path.name[1 : -len(".tmp")].rpartition(".")
            if name in names and pid.isdecimal() and not _lives(int(pid)):
                path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether a process of this number runs; where that cannot be asked without harm, it is taken to."""
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def default_workers() -> int:
    """As many processes as this one may use cores."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

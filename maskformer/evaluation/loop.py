"""The loop over a data set: predict, hand to the evaluators, say how long it will take."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskformer import distributed
from maskformer.errors import UserError
from maskformer.evaluation.base import DatasetEvaluator
from maskformer.evaluation.instance import InstanceEvaluator
from maskformer.evaluation.panoptic import PanopticEvaluator
from maskformer.evaluation.pictures import PictureSaver
from maskformer.evaluation.semantic import SemSegEvaluator

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
SWITCHES = {"sem_seg": "SEMANTIC_ON", "panoptic_seg": "PANOPTIC_ON", "instances": "INSTANCE_ON"}


def build_evaluators(
    cfg: Any,
    metadata: Any,
    output_dir: str | Path | None,
    *,
    folder_name: str = "inference",
    tasks: Sequence[str] | None = None,
) -> list[DatasetEvaluator]:
    """What is measured on a data set: what its protocol names, as far as the model gives it.

    Args:
        cfg: reads ``MODEL.MASK_FORMER.TEST``, ``TEST.{PICTURES, PQ_STUFF}``, ``INPUT.FORMAT``, ``DATASETS.TEST``.
        metadata: of the data set.
        output_dir: of the run; files go to its folder `folder_name` (in it one folder each if there are several test
            sets); None writes none.
        folder_name: see `output_dir`.
        tasks: only these, of ``sem_seg``, ``panoptic_seg``, ``instances``; None for all.

    Raises:
        UserError: if there is nothing to measure.
    """
    folder = None if output_dir is None else Path(output_dir) / folder_name
    if folder is not None and len(cfg.DATASETS.TEST) > 1:
        folder = folder / "".join(c if c.isalnum() or c in "-_." else "_" for c in metadata.name)
    wanted = list(metadata.evaluators)
    if "instances" not in wanted and "pan_seg" in metadata.truth and cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON:
        wanted.append("instances")  # the things of a panoptic truth are instances
    wanted = wanted if tasks is None else [task for task in wanted if task in tasks]
    given = [task for task in wanted if cfg.MODEL.MASK_FORMER.TEST[SWITCHES[task]]]
    for task in wanted:
        if task not in given:
            _say_left_out(metadata.name, task)
    if not given:
        needed = " or ".join(f"MODEL.MASK_FORMER.TEST.{SWITCHES[task]}" for task in wanted) or "another data set"
        raise UserError(f"nothing can be measured on {metadata.name} with this config; switch on {needed}")
    evaluators = [_build_evaluator(task, metadata, folder, cfg.TEST.PQ_STUFF) for task in given]
    if cfg.TEST.PICTURES > 0 and folder is not None:
        evaluators.append(PictureSaver(folder / "pictures", cfg.TEST.PICTURES, metadata, cfg.INPUT.FORMAT))
    return evaluators


@cache  # once a process, however often it is evaluated
def _say_left_out(name: str, task: str) -> None:
    if not distributed.is_main():
        return
    logger.warning(
        "%s measures %s, but MODEL.MASK_FORMER.TEST.%s is off, so it is left out", name, task, SWITCHES[task]
    )


def _build_evaluator(task: str, metadata: Any, folder: Path | None, pq_stuff: bool) -> DatasetEvaluator:
    if task == "sem_seg":
        return SemSegEvaluator(metadata.classes, metadata.ignore_label, metadata.dataset_ids, folder, pq_stuff=pq_stuff)
    if task == "panoptic_seg":
        return PanopticEvaluator(
            metadata.classes, metadata.things, metadata.dataset_ids, folder, metadata.annotation_file
        )
    return InstanceEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, folder)


def inference_on_dataset(
    model: nn.Module,
    loader: Iterable[Sequence[Mapping[str, Any]]],
    evaluators: DatasetEvaluator | Sequence[DatasetEvaluator],
    *,
    expected_ids: Sequence[Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Predict every image of a loader and evaluate; every process calls it with its own share of the data set.

    Args:
        model: with ``infer(samples, semantic="labels")``; afterwards its modules are in the modes they were in.
        loader: batches of test samples, in the order of the data set and those of a rank before those of the next;
            may be empty, if not on all processes. `len` of it, if it has one, gives the time left.
        evaluators: what is measured.
        expected_ids: ``image_id`` of every image that must come on any process; None takes those of
            ``loader.dataset.records``, if it has any.

    Returns:
        Metrics by evaluator, such as ``{"sem_seg": {"mIoU": …}}``; on every process those of the whole data set.

    Raises:
        UserError: on every process, if an image came twice or not at all; on the process that has the image, if its
            truth or result cannot be used (whoever started the processes has to end the others).
    """
    evaluators = [evaluators] if isinstance(evaluators, DatasetEvaluator) else list(evaluators)
    ids, file_names = _listed(loader) if expected_ids is None else (list(expected_ids), None)
    results: dict[str, dict[str, float]] = {}
    predictor: Any = model
    try:
        for evaluator in evaluators:
            evaluator.reset(ids, file_names)
        with evaluation_mode(model), torch.inference_mode(), Clock(loader, _device(model)) as clock:
            for samples in clock.fetch():
                with clock.timing("inference"):
                    predictions = predictor.infer(samples, semantic="labels")
                with clock.timing("evaluation"):
                    for evaluator in evaluators:
                        evaluator.process(samples, predictions)
        for evaluator in evaluators:
            metrics = evaluator.evaluate()
            if metrics:
                results[evaluator.name] = metrics
    finally:
        for evaluator in evaluators:
            evaluator.close()
    return results


def _listed(loader: Any) -> tuple[list[Any] | None, list[str] | None]:
    """Image ids and file names of the whole data set behind a loader, as far as it has them."""
    records = getattr(getattr(loader, "dataset", None), "records", None)
    if records is None:
        return None, None
    listed = [(record["image_id"], record.get("file_name")) for record in records]
    named = all(file_name is not None for _, file_name in listed)
    return [image_id for image_id, _ in listed], [str(file_name) for _, file_name in listed] if named else None


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _device(model: nn.Module) -> torch.device:
    """Where the parameters are; the CPU if there are none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


class Clock:
    """Where the time goes, how much is left: a progress bar on a terminal, else a log line every few seconds.

    Only the main process speaks: of its own share while it works, of all images at the end.

    Args:
        loader: of batches.
        device: of the model; CUDA is waited for, so that its work counts where it was asked for.
    """

    def __init__(self, loader: Iterable[Sequence[Mapping[str, Any]]], device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.total = len(loader) if isinstance(loader, Sized) else None
        self.seconds = {"data": 0.0, "inference": 0.0, "evaluation": 0.0}
        self.batches = 0
        self.images = 0
        self._first_batch = 0.0
        self._bar: Any = None

    def __enter__(self) -> Clock:
        self._start = self._last_line = time.perf_counter()
        if sys.stdout.isatty() and distributed.is_main():
            self._show_bar()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error[0] is None:
            self._report_all()

    def _report_all(self) -> None:
        shares = distributed.gather_to_main((self.images, self.seconds))
        images = sum(share[0] for share in shares)
        if not images:  # always so on other processes, which have no shares to report
            return
        spent = time.perf_counter() - self._start
        parts = ", ".join(f"{n} {sum(seconds[n] for _, seconds in shares) / images:.4f}" for n in self.seconds)
        if len(shares) > 1:
            parts = f"{len(shares)} processes, each {parts}"
        logger.info("Predicted %d images in %.1f s (%.4f s/image: %s)", images, spent, spent / images, parts)

    def fetch(self) -> Iterator[Sequence[Mapping[str, Any]]]:
        """The batches of the loader, timed."""
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            try:
                samples = next(batches)
            except StopIteration:
                return
            self.seconds["data"] += time.perf_counter() - start
            yield samples
            self.batches += 1
            self.images += len(samples)
            if self.batches == 1:  # starts workers and warms up, so it says nothing about the others
                self._first_batch = time.perf_counter() - self._start
            self._report()

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the seconds spent inside."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[what] += time.perf_counter() - start

    def _show_bar(self) -> None:
        from rich.errors import LiveError
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()
        bar = Progress(*columns, transient=True)
        try:
            bar.start()
        except LiveError:  # older rich shows one bar only, and training has it: lines will do
            return
        self._bar = bar
        self._task = bar.add_task("evaluating", total=self.total)

    def _report(self) -> None:
        if not distributed.is_main():
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.batches)
            return
        now = time.perf_counter()
        if now - self._last_line < SECONDS_BETWEEN_LINES and self.batches != self.total:
            return
        self._last_line = now
        per_batch = (now - self._start - self._first_batch) / max(1, self.batches - 1)
        left = ""
        if self.total is not None and self.batches > 1:
            left = f" ETA={datetime.timedelta(seconds=int(per_batch * (self.total - self.batches)))}"
        parts = (self.seconds[name] / self.batches for name in ("data", "inference", "evaluation"))
        data, inference, evaluation = parts
        logger.info(
            "Inference done %d/%s. Dataloading: %.4f s/iter. Inference: %.4f s/iter. Eval: %.4f s/iter. "
            "Total: %.4f s/iter.%s",
            *(self.batches, self.total if self.total is not None else "?", data, inference, evaluation),
            *((now - self._start) / self.batches, left),
        )

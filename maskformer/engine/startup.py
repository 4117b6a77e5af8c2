"""Before the first step: logging, checks that would otherwise fail hours later, and saying what is about to happen."""

from __future__ import annotations

import logging
import platform
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from maskformer import distributed
from maskformer.build import count_parameters
from maskformer.checkpoint.sources import fetch_source
from maskformer.data.checks import check_dataset_against_config
from maskformer.data.dataset import Dataset
from maskformer.data.recipes import build_recipe
from maskformer.engine.batching import BatchSplit
from maskformer.engine.device import describe_device, device_id
from maskformer.engine.resume import flat_config
from maskformer.engine.trainer import Trainer
from maskformer.errors import UserError
from maskformer.evaluation import build_evaluators

DIVIDED_BY = {"global": "the whole batch", "rank": "each process"}
FORMAT = "[%(asctime)s maskformer]: %(message)s"


class _Console(logging.StreamHandler[TextIO]):
    """Writes to whatever standard output is at the moment, so that lines go above a progress bar, not through it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else text.replace("]: ", f"]: {record.levelname} ", 1)


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Log to standard output and append to ``log.txt`` in `folder`; other processes only to ``log.txt.rank1``, ….

    Raises:
        UserError: if the folder cannot be written.
    """
    name = "log.txt" if distributed.is_main() else f"log.txt.rank{distributed.rank()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / name, encoding="utf-8")
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {folder} cannot be written ({error.strerror}); choose another folder") from error
    root = logging.getLogger("maskformer")
    before = (root.level, root.propagate)
    handlers: list[logging.Handler] = [_Console(), file] if distributed.is_main() else [file]
    for handler in handlers:
        handler.setFormatter(_Formatter(FORMAT, datefmt="%m/%d %H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False  # other libraries put handlers on the root logger, which would print every line twice
    try:
        yield
    except BaseException as error:
        # The console gets this from the command; the file would otherwise end without a reason.
        unexpected = not isinstance(error, UserError | KeyboardInterrupt)
        reason = str(error) or type(error).__name__
        trace = sys.exc_info() if unexpected else None
        file.handle(root.makeRecord(root.name, logging.ERROR, "", 0, "stopped: %s", (reason,), trace))
        raise
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(before[0])
        root.propagate = before[1]


def check_agreement(config_text: str, options: Mapping[str, Any], device: torch.device, folder: Path) -> None:
    """Refuse processes that were started differently, share a GPU, or do not see the same ``OUTPUT_DIR``.

    Args:
        config_text: of this process, as YAML.
        options: of its command line, by name.
        device: of this process.
        folder: ``OUTPUT_DIR``.

    Raises:
        UserError: naming the first key or option that differs, the processes that share a GPU, or the folder.
    """
    if distributed.world_size() == 1:
        return
    first, *others = distributed.gather({**flat_config(config_text), **options})
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise distributed.SharedUserError(
                    f"{key} is {first.get(key)!r} in process 0 but {other.get(key)!r} in process {rank}; start all "
                    "processes with the same config"
                )
    owners: dict[tuple[str, str], int] = {}
    for rank, (machine, gpu) in enumerate(distributed.gather((platform.node(), device_id(device)))):
        if gpu is not None and (machine, gpu) in owners:
            raise distributed.SharedUserError(
                f"processes {owners[machine, gpu]} and {rank} on {machine} would use the same GPU; start as many "
                "processes as there are GPUs, or check CUDA_VISIBLE_DEVICES"
            )
        if gpu is not None:
            owners[machine, gpu] = rank
    check_folder_is_shared(folder)


def check_folder_is_shared(folder: Path) -> None:
    """Refuse an ``OUTPUT_DIR`` that is not the same folder for every process.

    Raises:
        UserError: naming the folder and the machine.
    """
    mark = folder / f".shared_{distributed.broadcast(uuid.uuid4().hex)}"
    if distributed.is_main():
        mark.touch()
    distributed.barrier()
    problem = None
    if not mark.is_file():
        problem = (
            f"OUTPUT_DIR {folder} of process {distributed.rank()} on {platform.node()} is not that of process 0: "
            "it must be on a file system that all machines share"
        )
    try:
        distributed.agree(problem)
    finally:
        if distributed.is_main():
            mark.unlink(missing_ok=True)


def fetch_weights(cfg: Any) -> None:
    """Let the main process alone download ``MODEL.WEIGHTS``; the others find the file in the cache.

    Raises:
        UserError: if there is no such file, or the address cannot be had.
    """
    if cfg.MODEL.WEIGHTS:
        distributed.on_main(lambda: fetch_source(cfg.MODEL.WEIGHTS))


def check_dataset(cfg: Any, dataset: Dataset, training: bool) -> None:
    """Refuse a data set that a run would stumble over, of those for testing also what would only show hours later.

    Listing the records finds missing files and an empty data set.

    Args:
        cfg: of the run.
        dataset: to train or to evaluate on.
        training: which of the two.

    Raises:
        UserError: naming data set, key and remedy.
    """
    metadata = dataset.metadata
    check_dataset_against_config(cfg, metadata, training=training)
    records = dataset.records
    if not training:
        build_evaluators(cfg, metadata, output_dir=None)
        recipe = build_recipe(cfg, metadata, training=False)
        for record in {0: records[0], len(records) - 1: records[-1]}.values():
            recipe(record, np.random.default_rng(0))


class DataUse(NamedTuple):
    """A data set in a run.

    Attributes:
        name: in the catalog.
        images: how many it has.
        training: whether it is trained or evaluated on.
    """

    name: str
    images: int
    training: bool


def describe_run(cfg: Any, trainer: Trainer, split: BatchSplit, data: Sequence[DataUse], weights: str) -> str:
    """What the run is about to do, a line for each thing.

    Args:
        cfg: of the run.
        trainer: ready to train.
        split: of the batch.
        data: all data sets.
        weights: what the model starts from, in words.
    """
    solver, precision = cfg.SOLVER, trainer.precision
    trained, frozen = count_parameters(trainer.model)
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / trainer.batches.epoch_length
    resumed = f", {trainer.start_iteration:,} of them done" if trainer.start_iteration else ""
    clip = solver.CLIP_GRADIENTS
    clipping = f"{clip.CLIP_TYPE} to {clip.CLIP_VALUE:g}" if clip.ENABLED else "off"
    lines = [
        ("model", f"{cfg.MODEL.META_ARCHITECTURE}, {trained:,} parameters trained, {frozen:,} frozen"),
        ("weights", weights.removeprefix("weights: ").replace("\n", "\n" + " " * 14)),
        ("device", f"{describe_device(precision.device)}, {precision}"),
        *([] if trainer.parallel is None else [("processes", describe_processes(trainer.parallel))]),
        ("seed", f"{cfg.SEED}{', deterministic' if cfg.DETERMINISTIC else ''}"),
        *(("train on" if use.training else "evaluate on", f"{use.name}: {use.images:,} images") for use in data),
        ("batch", f"{split}, losses divided by those of {DIVIDED_BY[solver.LOSS_NORMALIZER]}"),
        ("length", f"{solver.MAX_ITER:,} iterations, {epochs:.2f} epochs{resumed}"),
        ("optimizer", f"{type(trainer.optimizer).__name__}, {solver.LR_SCHEDULER_NAME}, gradient clipping {clipping}"),
        *(("", describe_group(group)) for group in trainer.optimizer.param_groups),
        ("output", str(Path(cfg.OUTPUT_DIR).absolute())),
    ]
    return "\n".join(["about to train:", *(f"  {title:<12}{text}" for title, text in lines)])


def describe_processes(parallel: DistributedDataParallel) -> str:
    """How many processes there are, on which machines, and how they exchange gradients."""
    machines = list(dict.fromkeys(distributed.gather(platform.node())))
    gpu = next(parallel.parameters()).device.type == "cuda"
    return f"{distributed.world_size()} on {', '.join(machines)}, gradients over {'nccl' if gpu else 'gloo'}"


def describe_group(group: dict[str, Any]) -> str:
    """An optimizer group in words."""
    region = group["group_name"].split(",")[0]
    lr = group["initial_lr"]
    return f"lr {lr:g}, decay {group['weight_decay']:g}: {len(group['params'])} tensors of {region}"

"""From a config to a finished run: joins data, model, weights, loop and hooks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskformer import distributed
from maskformer.build import build_model, build_model_to_fill, synchronize_norms
from maskformer.checkpoint import load_weights
from maskformer.checkpoint.files import write_text
from maskformer.data.catalog import Dataset, get_dataset
from maskformer.data.loading import build_train_loader
from maskformer.engine.averaging import AveragingHook, WeightAverage, build_average
from maskformer.engine.batching import BatchSplit, build_batch_split
from maskformer.engine.best import build_best_weights
from maskformer.engine.device import amp_dtype, seed_of_process
from maskformer.engine.evaluating import check_metric, check_test_sets, evaluate_all, evaluate_augmented
from maskformer.engine.hooks import CheckpointHook, EvaluationHook, MetricsHook, ProgressHook
from maskformer.engine.optimizer import build_clipper, build_optimizer
from maskformer.engine.profiling import ProfilerHook, parse_profile_window
from maskformer.engine.resume import (
    CheckpointSaver,
    Resumption,
    find_best,
    find_restart,
    find_resumable,
    flat_config,
    start_run,
)
from maskformer.engine.schedule import build_scheduler
from maskformer.engine.startup import DataUse, check_dataset, describe_run, fetch_weights
from maskformer.engine.trainer import Hook, Precision, Trainer
from maskformer.engine.writers import JsonLines, LogLine, MetricsLog, TensorBoard, Writer, build_wandb
from maskformer.errors import UserError

logger = logging.getLogger(__name__)


def find_start(folder: Path, *, resume: bool, restarted: bool) -> Resumption | None:
    """What a run goes on from, the same for every process; None (and a line in the log) if it starts from scratch.

    Args:
        folder: ``OUTPUT_DIR``.
        resume: whether ``--resume`` was given: the newest checkpoint in the folder.
        restarted: whether this run was started anew after a failure: the newest checkpoint of this run.

    Raises:
        UserError: if there are checkpoints, but none can be read, or Detectron2 has gone on there.
    """
    if not resume and not restarted:
        return None
    # Found by the main process alone: another might see an older state of a network file system.
    path = distributed.on_main(lambda: find_resumable(folder) if resume else find_restart(folder))
    if path is None:
        logger.info(
            "%s: no checkpoint in %s, so this run starts from scratch", "--resume" if resume else "restarted", folder
        )
        return None
    with distributed.agreeing():
        resumption = Resumption.read(path)
    word = "resuming" if resume else "restarted, resuming"
    logger.info("%s from %s, %d iterations done", word, path, resumption.start_iteration)
    return resumption


def train(cfg: Any, config_text: str, resumption: Resumption | None, profile: str | None = None) -> None:
    """Train as the config says, from the beginning or from a checkpoint, and evaluate.

    Args:
        cfg: of the run; ``MODEL.DEVICE`` and ``SEED`` are decided.
        config_text: what is kept of it in ``config.yaml`` and in checkpoints.
        resumption: checkpoint to go on from.
        profile: iterations to trace, such as ``20:30``.

    Raises:
        UserError: for every mistake in config, data or weights, as early as it can be known.
    """
    folder = Path(cfg.OUTPUT_DIR)
    window = distributed.on_main(lambda: parse_profile_window(profile) if profile else None)
    if resumption is None:
        warn_of_overwriting(folder)
        fetch_weights(cfg)
    else:
        with distributed.agreeing():
            check_differences(resumption, config_text)
    split = distributed.on_main(lambda: build_batch_split(cfg, distributed.world_size()))
    with distributed.agreeing():
        datasets = find_datasets(cfg)
    distributed.on_main(lambda: check_datasets(cfg, datasets))
    metadata = datasets["TRAIN"][0].metadata
    run_id = start_run(folder, resumption)
    distributed.on_main(lambda: write_text(folder / "config.yaml", config_text))
    trainer, average, weights = build_trainer(cfg, datasets["TRAIN"], resumption, split)
    logger.info("%s", describe_run(cfg, trainer, split, data_uses(datasets), weights))
    save = CheckpointSaver(config_text, metadata, folder, cfg.CHECKPOINT.KEEP_LAST, run_id=run_id, average=average)
    hooks = build_hooks(cfg, trainer, save, datasets["TEST"], resumed=resumption is not None)
    if window is not None:
        device = trainer.precision.device
        hooks.append(ProfilerHook(start=window[0], end=window[1], folder=folder / "profile", device=device))
    datasets.clear()  # the loader has packed the training records; the list would only double them in every worker
    if resumption is not None:
        trainer.rehearse()
        resumption.restore_rng()  # last of all: building the model and its helpers draws numbers
    elif distributed.rank() > 0:
        # Dropout differs between processes; the first one's state is that of a run without others.
        torch.manual_seed(seed_of_process(cfg.SEED, distributed.rank()))
    trainer.train(hooks)


def build_trainer(
    cfg: Any, datasets: Sequence[Dataset], resumption: Resumption | None, split: BatchSplit
) -> tuple[Trainer, WeightAverage | None, str]:
    """Model, weights, optimizer, schedule and data of a run.

    Args:
        cfg: of the run.
        datasets: of ``DATASETS.TRAIN``.
        resumption: checkpoint to go on from.
        split: of the batch.

    Returns:
        The trainer, the moving average of its weights if there is one, and what its model starts from, in words.
    """
    metadata = datasets[0].metadata
    device = torch.device(cfg.MODEL.DEVICE)
    with distributed.agreeing():
        model = (build_model if resumption is None else build_model_to_fill)(cfg, metadata)
        synchronize_norms(cfg, model, device)
        weights = str(resumption) if resumption is not None else load_start_weights(cfg, model)
        optimizer = build_optimizer(cfg, model)
        precision = Precision(device, cfg.SOLVER.AMP.ENABLED, amp_dtype(cfg.SOLVER.AMP.DTYPE, device))
        if resumption is not None:
            resumption.restore(model, optimizer, precision)
        average = build_average(cfg, model)
        if average is not None and resumption is not None:
            resumption.restore_average(average)
    start_iteration = resumption.start_iteration if resumption else 0
    batches = build_train_loader(
        cfg,
        metadata,
        resumption.position if resumption else 0,
        datasets=datasets,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    trainer = Trainer(
        model,
        optimizer,
        build_scheduler(cfg, optimizer, start_iteration),
        batches,
        max_iterations=cfg.SOLVER.MAX_ITER,
        start_iteration=start_iteration,
        clip=build_clipper(cfg),
        precision=precision,
        split=split,
        parallel=distributed.data_parallel(model),
    )
    return trainer, average, weights


def warn_of_overwriting(folder: Path) -> None:
    """Say so if an earlier run's checkpoints are about to be overwritten."""
    if any(folder.glob("model_*.pth")):
        logger.warning(
            "%s holds checkpoints of an earlier run, which this one will overwrite: --resume would continue that run, "
            "another OUTPUT_DIR would keep it",
            folder,
        )


def check_differences(resumption: Resumption, config_text: str) -> None:
    """Say which keys with an effect on training differ from the interrupted run; the present ones count.

    Raises:
        UserError: if that run was scaled to another number of processes, so that its iterations mean other images.
    """
    key = "SOLVER.REFERENCE_WORLD_SIZE"
    before, now = resumption.saved_config.get(key, 0), flat_config(config_text)[key]
    if before != now and before and now:
        raise UserError(
            f"{key}: the interrupted run was scaled to {before} processes and this one would be to {now}; resume it "
            f"with {before} processes, or with the config.yaml it left and {key} 0"
        )
    differences = resumption.differences(config_text)
    if differences:
        logger.warning("the config differs from that of the interrupted run, and counts: %s", ", ".join(differences))


def find_datasets(cfg: Any) -> dict[str, list[Dataset]]:
    """All data sets of the config.

    Returns:
        For ``TRAIN`` and ``TEST`` the data sets in their order; one object for each name, so that it is listed once.

    Raises:
        UserError: if there is none to train on.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name the data set to train on, such as ('folder:my_data:train',)")
    known = {name: get_dataset(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    return {part: [known[name] for name in cfg.DATASETS[part]] for part in ("TRAIN", "TEST")}


def check_datasets(cfg: Any, datasets: Mapping[str, Sequence[Dataset]]) -> None:
    """Check all data sets of the config, and the metric that it names.

    Raises:
        UserError: if one cannot be used.
    """
    for dataset in datasets["TRAIN"]:
        check_dataset(cfg, dataset, training=True)
    check_test_sets(cfg, datasets["TEST"], datasets["TRAIN"][0].metadata)
    check_metric(cfg, datasets["TEST"])


def load_start_weights(cfg: Any, model: torch.nn.Module) -> str:
    """Give the model the weights of ``MODEL.WEIGHTS``, if any.

    Returns:
        What the model starts from, in words.
    """
    if cfg.MODEL.WEIGHTS:
        return load_weights(model, cfg.MODEL.WEIGHTS, min_fit=cfg.MODEL.WEIGHTS_MIN_FIT).summary()
    if cfg.MODEL.BACKBONE.NAME == "timm" and cfg.MODEL.TIMM.PRETRAINED:
        return f"those of timm's {cfg.MODEL.TIMM.NAME}, the rest random"
    return "random (MODEL.WEIGHTS is empty)"


def data_uses(datasets: Mapping[str, Sequence[Dataset]]) -> list[DataUse]:
    """What the data sets are for and how large they are."""
    return [
        DataUse(dataset.metadata.name, len(dataset.records), training=part == "TRAIN")
        for part, members in datasets.items()
        for dataset in members
    ]


def build_hooks(
    cfg: Any, trainer: Trainer, save: CheckpointSaver, test_sets: Sequence[Dataset], *, resumed: bool
) -> list[Hook]:
    """The hooks of a run, in the order they are called; every process has all that need the others."""
    folder = Path(cfg.OUTPUT_DIR)
    writers: list[Writer] = []
    distributed.on_main(lambda: writers.extend(build_writers(cfg, trainer, save.run_id)))
    log = MetricsLog(writers)
    hooks: list[Hook] = [MetricsHook(log, cfg.LOG_PERIOD, trainer.precision.device)]
    average = save.average
    if average is not None:
        hooks.append(AveragingHook(average))
    hooks.append(CheckpointHook(cfg.SOLVER.CHECKPOINT_PERIOD, save))
    if test_sets:
        # Found by the main process alone, so that all decide alike.
        known = distributed.on_main(lambda: find_best(folder, save.run_id)) if resumed else None
        best = build_best_weights(cfg, save.save_best, known)
        if best is not None:
            best.stop_if_hopeless(trainer)
        averaged = average.model if average is not None else None
        hooks.append(
            EvaluationHook(
                cfg.TEST.EVAL_PERIOD,
                lambda: evaluate_all(cfg, trainer.model, averaged, test_sets),
                log,
                [] if best is None else [best],
                finish=(lambda: evaluate_augmented(cfg, trainer.model, averaged, test_sets))
                if cfg.TEST.AUG.ENABLED
                else None,
            )
        )
    if distributed.is_main() and sys.stdout.isatty():
        hooks.append(ProgressHook())
    return hooks


def build_writers(cfg: Any, trainer: Trainer, run_id: str) -> list[Writer]:
    """Where the numbers of a run go."""
    folder = Path(cfg.OUTPUT_DIR)
    wandb = build_wandb(cfg, run_id)  # the only one that may not start, so the first
    writers: list[Writer] = [
        LogLine(),
        JsonLines(folder / "metrics.json"),
        TensorBoard(folder, purge_step=trainer.start_iteration or None),
    ]
    return writers if wandb is None else [*writers, wandb]

"""From a config to a finished run: joins data, model, weights, loop and hooks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskformer.build import build_model, build_model_to_fill
from maskformer.checkpoint import find_last_checkpoint, load_weights
from maskformer.data.catalog import Dataset, get_dataset
from maskformer.data.loading import build_train_loader
from maskformer.engine.evaluating import check_test_sets, evaluate
from maskformer.engine.hooks import CheckpointHook, EvaluationHook, MetricsHook, ProgressHook
from maskformer.engine.optimizer import build_clipper, build_optimizer
from maskformer.engine.resume import CheckpointSaver, Resumption
from maskformer.engine.schedule import build_scheduler
from maskformer.engine.startup import DataUse, check_dataset, describe_run
from maskformer.engine.trainer import Hook, Precision, Trainer
from maskformer.engine.writers import JsonLines, LogLine, MetricsLog, TensorBoard, Writer
from maskformer.errors import UserError

logger = logging.getLogger(__name__)


def find_resumption(folder: Path) -> Resumption | None:
    """The newest checkpoint of a run, None (and a line in the log) if there is nothing to resume."""
    path = find_last_checkpoint(folder)
    if path is None:
        logger.info("--resume: no checkpoint in %s, so this run starts from scratch", folder)
        return None
    resumption = Resumption.read(path)
    logger.info("resuming from %s, %d iterations done", path, resumption.start_iteration)
    return resumption


def train(cfg: Any, config_text: str, resumption: Resumption | None) -> None:
    """Train as the config says, from the beginning or from a checkpoint, and evaluate.

    Args:
        cfg: of the run; ``MODEL.DEVICE`` and ``SEED`` are decided.
        config_text: what is kept of it in ``config.yaml`` and in checkpoints.
        resumption: checkpoint to go on from.

    Raises:
        UserError: for every mistake in config, data or weights, as early as it can be known.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if resumption is None:
        warn_of_overwriting(folder)
    else:
        warn_of_differences(resumption, config_text)
    datasets = check_datasets(cfg)
    metadata = datasets["TRAIN"][0].metadata
    (folder / "config.yaml").write_text(config_text, encoding="utf-8")
    trainer, weights = build_trainer(cfg, datasets["TRAIN"], resumption)
    logger.info("%s", describe_run(cfg, trainer, data_uses(datasets), weights))
    save = CheckpointSaver(config_text, metadata, folder, cfg.CHECKPOINT.KEEP_LAST)
    hooks = build_hooks(cfg, trainer, save, datasets["TEST"])
    del datasets  # the loader has packed the training records; the list would only double them in every worker
    if resumption is not None:
        resumption.restore_rng()  # last of all: building the model and its helpers draws numbers
    trainer.train(hooks)


def build_trainer(cfg: Any, datasets: Sequence[Dataset], resumption: Resumption | None) -> tuple[Trainer, str]:
    """Model, weights, optimizer, schedule and data of a run; `datasets` are those of ``DATASETS.TRAIN``.

    Returns:
        The trainer, and what its model starts from, in words.
    """
    metadata = datasets[0].metadata
    model = (build_model if resumption is None else build_model_to_fill)(cfg, metadata)
    optimizer = build_optimizer(cfg, model)
    precision = Precision(torch.device(cfg.MODEL.DEVICE), cfg.SOLVER.AMP.ENABLED)
    if resumption is not None:
        resumption.restore(model, optimizer, precision)
    start_iteration = resumption.start_iteration if resumption else 0
    trainer = Trainer(
        model,
        optimizer,
        build_scheduler(cfg, optimizer, start_iteration),
        build_train_loader(cfg, metadata, resumption.position if resumption else 0, datasets=datasets),
        max_iterations=cfg.SOLVER.MAX_ITER,
        start_iteration=start_iteration,
        clip=build_clipper(cfg),
        precision=precision,
    )
    return trainer, str(resumption) if resumption is not None else load_start_weights(cfg, model)


def warn_of_overwriting(folder: Path) -> None:
    """Say so if an earlier run's checkpoints are about to be overwritten."""
    if any(folder.glob("model_*.pth")):
        logger.warning(
            "%s holds checkpoints of an earlier run, which this one will overwrite: --resume would continue that run, "
            "another OUTPUT_DIR would keep it",
            folder,
        )


def warn_of_differences(resumption: Resumption, config_text: str) -> None:
    """Say which keys with an effect on training differ from the interrupted run; the present ones count."""
    differences = resumption.differences(config_text)
    if differences:
        logger.warning("the config differs from that of the interrupted run, and counts: %s", ", ".join(differences))


def check_datasets(cfg: Any) -> dict[str, list[Dataset]]:
    """All data sets of the config, checked.

    Returns:
        For ``TRAIN`` and ``TEST`` the data sets in their order; one object for each name, so that it is listed once.

    Raises:
        UserError: if there is none to train on, or one cannot be used.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name the data set to train on, such as ('folder:my_data:train',)")
    known = {name: get_dataset(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    found = {part: [known[name] for name in cfg.DATASETS[part]] for part in ("TRAIN", "TEST")}
    for dataset in found["TRAIN"]:
        check_dataset(cfg, dataset, training=True)
    check_test_sets(cfg, found["TEST"], found["TRAIN"][0].metadata)
    return found


def load_start_weights(cfg: Any, model: torch.nn.Module) -> str:
    """Give the model the weights of ``MODEL.WEIGHTS``, if any.

    Returns:
        What the model starts from, in words.
    """
    if cfg.MODEL.WEIGHTS:
        return load_weights(model, cfg.MODEL.WEIGHTS).summary()
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


def build_hooks(cfg: Any, trainer: Trainer, save: CheckpointSaver, test_sets: Sequence[Dataset]) -> list[Hook]:
    """The hooks of a run, in the order they are called."""
    folder = Path(cfg.OUTPUT_DIR)
    curves = TensorBoard(folder, purge_step=trainer.start_iteration or None)
    writers: list[Writer] = [LogLine(), JsonLines(folder / "metrics.json"), curves]
    log = MetricsLog(writers)
    hooks: list[Hook] = [
        MetricsHook(log, cfg.LOG_PERIOD, trainer.precision.device),
        CheckpointHook(cfg.SOLVER.CHECKPOINT_PERIOD, save),
    ]
    if test_sets:
        hooks.append(EvaluationHook(cfg.TEST.EVAL_PERIOD, lambda: evaluate(cfg, trainer.model, test_sets), log))
    if sys.stdout.isatty():
        hooks.append(ProgressHook())
    return hooks

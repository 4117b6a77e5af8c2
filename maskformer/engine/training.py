"""From a config to a finished run: joins data, model, weights, loop and hooks, and evaluates."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskformer.build import build_model
from maskformer.checkpoint import find_last_checkpoint, load_weights, restore_model
from maskformer.data.catalog import Dataset, Metadata, get_dataset
from maskformer.data.loading import build_test_loader, build_train_loader
from maskformer.engine.hooks import CheckpointHook, Evaluation, EvaluationHook, MetricsHook, ProgressHook
from maskformer.engine.metrics_log import JsonLines, LogLine, MetricsLog, TensorBoard, Writer
from maskformer.engine.optimizer import build_clipper, build_optimizer
from maskformer.engine.resume import CheckpointSaver, Resumption
from maskformer.engine.schedule import build_scheduler
from maskformer.engine.startup import DataUse, check_dataset, describe_run
from maskformer.engine.trainer import Hook, Precision, Trainer
from maskformer.errors import UserError
from maskformer.evaluation import (
    PictureSaver,
    build_evaluators,
    flatten_results,
    format_results,
    inference_on_dataset,
)

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
    trainer, weights = build_trainer(cfg, metadata, resumption)
    logger.info("%s", describe_run(cfg, trainer, data_uses(datasets), weights))
    hooks = build_hooks(cfg, trainer, CheckpointSaver(config_text, metadata, folder, cfg.CHECKPOINT.KEEP_LAST))
    if resumption is not None:
        resumption.restore_rng()  # last of all: building the model and its helpers draws numbers
    trainer.train(hooks)


def build_trainer(cfg: Any, metadata: Metadata, resumption: Resumption | None) -> tuple[Trainer, str]:
    """Model, weights, optimizer, schedule and data of a run.

    Returns:
        The trainer, and what its model starts from, in words.
    """
    model = build_model(cfg, metadata)
    optimizer = build_optimizer(cfg, model)
    precision = Precision(torch.device(cfg.MODEL.DEVICE), cfg.SOLVER.AMP.ENABLED)
    if resumption is not None:
        resumption.restore(model, optimizer, precision)
    start_iteration = resumption.start_iteration if resumption else 0
    trainer = Trainer(
        model,
        optimizer,
        build_scheduler(cfg, optimizer, start_iteration),
        build_train_loader(cfg, metadata, resumption.position if resumption else 0),
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
        For ``TRAIN`` and ``TEST`` the data sets in their order.

    Raises:
        UserError: if there is none to train on, or one cannot be used.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name the data set to train on, such as ('folder:my_data:train',)")
    found = {part: [get_dataset(name) for name in cfg.DATASETS[part]] for part in ("TRAIN", "TEST")}
    for part, datasets in found.items():
        for dataset in datasets:
            check_dataset(cfg, dataset, training=part == "TRAIN")
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


def build_hooks(cfg: Any, trainer: Trainer, save: CheckpointSaver) -> list[Hook]:
    """The hooks of a run, in the order they are called."""
    folder = Path(cfg.OUTPUT_DIR)
    writers: list[Writer] = [LogLine(), JsonLines(folder / "metrics.json"), TensorBoard(folder)]
    log = MetricsLog(writers)
    hooks: list[Hook] = [
        MetricsHook(log, cfg.LOG_PERIOD, trainer.precision.device),
        CheckpointHook(cfg.SOLVER.CHECKPOINT_PERIOD, save),
    ]
    if cfg.DATASETS.TEST:
        hooks.append(EvaluationHook(cfg.TEST.EVAL_PERIOD, lambda: evaluate(cfg, trainer.model), log))
    if sys.stdout.isatty():
        hooks.append(ProgressHook())
    return hooks


def evaluate(cfg: Any, model: torch.nn.Module) -> Evaluation:
    """Evaluate the present weights on every data set of ``DATASETS.TEST``, print tables and save pictures.

    Returns:
        Scores and pictures; names start with the data set's where there are several, as in Detectron2.
    """
    scores: dict[str, float] = {}
    pictures: dict[str, Path] = {}
    several = len(cfg.DATASETS.TEST) > 1
    for name in cfg.DATASETS.TEST:
        results, saved = evaluate_dataset(cfg, model, name)
        prefix = f"{name}/" if several else ""
        scores.update({prefix + key: value for key, value in flatten_results(results).items()})
        pictures.update({prefix + picture: path for picture, path in saved.items()})
    return Evaluation(scores, pictures)


def evaluate_dataset(
    cfg: Any, model: torch.nn.Module, name: str
) -> tuple[dict[str, dict[str, float]], Mapping[str, Path]]:
    """Evaluate the present weights on one data set and print tables.

    Returns:
        Metrics by task, and the pictures saved, by name.
    """
    loader = build_test_loader(cfg, name)
    evaluators = build_evaluators(cfg, loader.metadata, cfg.OUTPUT_DIR)
    results = inference_on_dataset(model, loader, evaluators)
    logger.info("\n%s", format_results(results, loader.metadata))
    pictures = {
        picture: path
        for saver in evaluators
        if isinstance(saver, PictureSaver)
        for picture, path in saver.pictures.items()
    }
    return results, pictures


def evaluate_only(cfg: Any, resumption: Resumption | None) -> None:
    """Evaluate ``MODEL.WEIGHTS``, or a checkpoint, and write ``inference/results.json``.

    Args:
        cfg: of the run; ``MODEL.DEVICE`` is decided.
        resumption: the checkpoint whose weights are evaluated; None takes ``MODEL.WEIGHTS``.

    Raises:
        UserError: if there are no weights, nothing to evaluate on, or one of them cannot be used.
    """
    if resumption is None and not cfg.MODEL.WEIGHTS:
        raise UserError(
            "--eval-only needs weights but MODEL.WEIGHTS is empty; set it to a weight file, or add --resume for "
            "the newest checkpoint in OUTPUT_DIR"
        )
    if not cfg.DATASETS.TEST:
        raise UserError("--eval-only needs a data set but DATASETS.TEST is empty; name one like ('folder:data:val',)")
    for name in cfg.DATASETS.TEST:
        check_dataset(cfg, get_dataset(name), training=False)
    metadata = get_dataset((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[0]).metadata
    model = build_model(cfg, metadata)
    if resumption is not None:
        restore_model(model, resumption.checkpoint, resumption.path)
        weights = str(resumption.path)
    else:
        weights = cfg.MODEL.WEIGHTS
        logger.info("%s", load_weights(model, weights, strict=True).summary())
    evaluation = evaluate(cfg, model)
    path = Path(cfg.OUTPUT_DIR) / "inference" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {name: value if math.isfinite(value) else None for name, value in evaluation.scores.items()}
    path.write_text(json.dumps({"weights": weights, "scores": scores}, indent=1) + "\n", encoding="utf-8")
    logger.info("results: %s", path)

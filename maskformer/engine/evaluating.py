"""Evaluating a model on the test sets of a config, during a run or alone."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskformer import distributed
from maskformer.build import build_model_to_fill
from maskformer.checkpoint import checkpoint_metadata, load_weights, metadata_in, restore_model
from maskformer.checkpoint.files import write_text
from maskformer.data.catalog import Dataset, Metadata, get_dataset, get_metadata
from maskformer.data.checks import check_test_classes
from maskformer.data.loading import build_test_loader
from maskformer.engine.averaging import build_average
from maskformer.engine.best import unknown_metric
from maskformer.engine.hooks import Evaluation
from maskformer.engine.resume import EMA_PREFIX, Resumption
from maskformer.engine.startup import check_dataset, fetch_weights
from maskformer.errors import UserError
from maskformer.evaluation import (
    PictureSaver,
    build_augmented_model,
    build_evaluators,
    check_augmentation,
    flatten_results,
    format_results,
    inference_on_dataset,
    metric_names,
)

logger = logging.getLogger(__name__)

AUGMENTED_PREFIX = "TTA/"
"""Begins the names of scores under test-time augmentation."""


def check_test_sets(cfg: Any, datasets: Sequence[Dataset], trained: Metadata | None) -> None:
    """Refuse test sets that cannot be evaluated, or whose classes are not those of the model.

    Args:
        cfg: of the run.
        datasets: of ``DATASETS.TEST``.
        trained: what the model's classes mean; None where nothing says so.

    Raises:
        UserError: naming data set, key and remedy.
    """
    for dataset in datasets:
        check_dataset(cfg, dataset, training=False)
        check_augmentation(cfg, dataset.metadata)
        if trained is not None:
            check_test_classes(trained, dataset.metadata)


def check_metric(cfg: Any, datasets: Sequence[Dataset]) -> None:
    """Refuse a ``CHECKPOINT.BEST_METRIC`` that no evaluation of the run will give.

    Raises:
        UserError: naming those there will be.
    """
    names: list[str] = []
    for dataset in datasets:
        prefix = f"{dataset.metadata.name}/" if len(datasets) > 1 else ""
        evaluators = build_evaluators(cfg, dataset.metadata, output_dir=None)
        names += [prefix + name for name in metric_names(evaluators)]
    if cfg.SOLVER.EMA.ENABLED:
        names += [EMA_PREFIX + name for name in names]
    if cfg.CHECKPOINT.BEST_METRIC and cfg.CHECKPOINT.BEST_METRIC not in names:
        raise UserError(unknown_metric(cfg.CHECKPOINT.BEST_METRIC, names))


def evaluate(
    cfg: Any,
    model: torch.nn.Module,
    datasets: Sequence[Dataset],
    folder_name: str = "inference",
    tasks: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluate the present weights on every test set, print tables and save pictures.

    All processes take part, each on its share of the images, and get the same scores.

    Args:
        cfg: of the run.
        model: to evaluate.
        datasets: of ``DATASETS.TEST``; the same objects each time, so that each is listed once in a run.
        folder_name: where files go in ``OUTPUT_DIR``.
        tasks: see `build_evaluators`.

    Returns:
        Scores and pictures; names start with the data set's where there are several, as in Detectron2.
    """
    scores: dict[str, float] = {}
    pictures: dict[str, Path] = {}
    for dataset in datasets:
        results, saved = evaluate_dataset(cfg, model, dataset, folder_name, tasks)
        prefix = f"{dataset.metadata.name}/" if len(datasets) > 1 else ""
        scores.update({prefix + key: value for key, value in flatten_results(results).items()})
        pictures.update({prefix + picture: path for picture, path in saved.items()})
    return Evaluation(scores, pictures)


def evaluate_all(
    cfg: Any, model: torch.nn.Module, average: torch.nn.Module | None, datasets: Sequence[Dataset]
) -> Evaluation:
    """As `evaluate`, for the weights and, if there is one, their moving average; its names start with ``ema/``."""
    own = evaluate(cfg, model, datasets)
    if average is None:
        return own
    logger.info("the same with the moving average of the weights:")
    return own.joined(evaluate(cfg, average, datasets, "inference_ema").named(EMA_PREFIX))


def evaluate_augmented(
    cfg: Any, model: torch.nn.Module, average: torch.nn.Module | None, datasets: Sequence[Dataset]
) -> Evaluation:
    """As `evaluate_all` with test-time augmentation, for the end of a run, as published; names start with ``TTA/``.

    Only semantic segmentation is measured; files go to ``inference_TTA``. Nothing without ``TEST.AUG.ENABLED``.
    """
    found = Evaluation({}, {})
    settings = cfg.TEST.AUG
    if not settings.ENABLED:
        return found
    mirrored = " and mirrored" if settings.FLIP else ""
    for weights, prefix, folder_name in ((model, "", "inference_TTA"), (average, EMA_PREFIX, "inference_ema_TTA")):
        if weights is None:
            continue
        what = "the moving average of the weights" if prefix else "these weights"
        logger.info("%s with test-time augmentation, at %d sizes%s:", what, len(settings.MIN_SIZES), mirrored)
        augmented = evaluate(cfg, build_augmented_model(cfg, weights), datasets, folder_name, ("sem_seg",))
        found = found.joined(augmented.named(prefix + AUGMENTED_PREFIX))
    return found


def evaluate_dataset(
    cfg: Any,
    model: torch.nn.Module,
    dataset: Dataset,
    folder_name: str = "inference",
    tasks: Sequence[str] | None = None,
) -> tuple[dict[str, dict[str, float]], Mapping[str, Path]]:
    """Evaluate the present weights on one data set and print tables.

    Returns:
        Metrics by task, and the pictures saved, by name.
    """
    distributed.broadcast_buffers(model)
    loader = build_test_loader(cfg, dataset, rank=distributed.rank(), world_size=distributed.world_size())
    evaluators = build_evaluators(cfg, loader.metadata, cfg.OUTPUT_DIR, folder_name=folder_name, tasks=tasks)
    results = inference_on_dataset(model, loader, evaluators)
    logger.info("\n%s", format_results(results, loader.metadata))
    pictures = {
        picture: path
        for saver in evaluators
        if isinstance(saver, PictureSaver)
        for picture, path in saver.pictures.items()
    }
    return results, pictures


def evaluate_only(cfg: Any, config_text: str, resumption: Resumption | None) -> None:
    """Evaluate ``MODEL.WEIGHTS``, or a checkpoint, and write ``inference/results.json``.

    The config goes to ``config.yaml``, or to ``config_eval.yaml`` where another ``config.yaml`` is there already, such
    as that of the training in the same folder.

    Args:
        cfg: of the run; ``MODEL.DEVICE`` is decided.
        config_text: what is kept of it.
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
    if resumption is None:
        fetch_weights(cfg)
    with distributed.agreeing():
        trained = trained_classes(cfg, resumption)
        datasets = [get_dataset(name) for name in cfg.DATASETS.TEST]
    distributed.on_main(lambda: check_test_sets(cfg, datasets, trained))
    folder = Path(cfg.OUTPUT_DIR)
    distributed.on_main(lambda: write_config(folder, config_text))
    with distributed.agreeing():
        model = build_model_to_fill(cfg, trained or datasets[0].metadata)
        if resumption is not None:
            restore_model(model, resumption.checkpoint, resumption.path)
            weights = str(resumption.path)
        else:
            weights = cfg.MODEL.WEIGHTS
            logger.info("%s", load_weights(model, weights, strict=True).summary())
        average = averaged_model(cfg, model, resumption)
    evaluation = evaluate_all(cfg, model, average, datasets)
    evaluation = evaluation.joined(evaluate_augmented(cfg, model, average, datasets))
    if not distributed.is_main():
        return
    path = folder / "inference" / "results.json"
    scores = {name: value if math.isfinite(value) else None for name, value in evaluation.scores.items()}
    write_text(path, json.dumps({"weights": weights, "scores": scores}, indent=1) + "\n")
    logger.info("results: %s", path)


def averaged_model(cfg: Any, model: torch.nn.Module, resumption: Resumption | None) -> torch.nn.Module | None:
    """The moving average of the weights in a checkpoint, if ``SOLVER.EMA`` is on and the checkpoint has one."""
    average = build_average(cfg, model) if resumption is not None else None
    if average is None or resumption is None or "ema" not in resumption.checkpoint["extra"]:
        return None
    resumption.restore_average(average)
    return average.model


def trained_classes(cfg: Any, resumption: Resumption | None) -> Metadata | None:
    """What the classes of the weights mean: from their file, else from ``DATASETS.TRAIN``, else None.

    Raises:
        UserError: if weights or data set are not there.
    """
    if resumption is not None:
        saved = metadata_in(resumption.checkpoint, resumption.path)
    else:
        saved = checkpoint_metadata(cfg.MODEL.WEIGHTS)
    if saved is None and cfg.DATASETS.TRAIN:
        return get_metadata(cfg.DATASETS.TRAIN[0])
    return saved


def write_config(folder: Path, config_text: str) -> Path:
    """Keep the config of an evaluation without touching another one; returns the file."""
    path = folder / "config.yaml"
    if path.is_file() and path.read_text(encoding="utf-8") != config_text:
        path = folder / "config_eval.yaml"
    write_text(path, config_text)
    return path

"""The published recipes under Detectron2's trainer: the steps and scores of a native run, from the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase

from maskformer.checkpoint import load_weights
from maskformer.checkpoint.training import save_model
from maskformer.config import get_cfg
from maskformer.data.catalog import get_dataset
from maskformer.data.labels import read_semantic
from maskformer.engine.batching import build_batch_split
from maskformer.engine.evaluating import evaluate_dataset
from maskformer.engine.training import build_trainer
from maskformer.integrations.detectron2 import Trainer, catalog, evaluation
from maskformer.integrations.detectron2.command import build_config
from tests.miniatures import NAMES, make_miniature

ITERATIONS = 5
ADE20K_R50 = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"
ADE20K_SWIN = "configs/ade20k-150/swin/maskformer_swin_tiny_bs16_160k.yaml"
ADE20K_PIXELS = "configs/ade20k-150/per_pixel_baseline_R50_bs16_160k.yaml"
COCO_R50 = "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"
FAMILY_OF = {ADE20K_R50: "ade20k", ADE20K_SWIN: "ade20k", ADE20K_PIXELS: "ade20k", COCO_R50: "coco_panoptic"}

# Small pictures and batches, and a schedule that moves within five iterations; architectures are as published.
FAST = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SEED", 5, "TEST.PICTURES", 0),
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.WARMUP_ITERS", 2, "SOLVER.STEPS", (4,)),
    *("INPUT.MIN_SIZE_TRAIN", (72, 96), "INPUT.MAX_SIZE_TRAIN", 160, "INPUT.MIN_SIZE_TEST", 64),
    *("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0, "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0),
]
CROPS = {
    "ade20k": ["INPUT.CROP.SIZE", (64, 64), "INPUT.SIZE_DIVISIBILITY", 64],
    "coco_panoptic": ["INPUT.CROP.SIZE", (48, 64)],
}


class Steps(NamedTuple):
    """What a run did: losses and learning rates of each iteration, groups of parameters, scores at its end."""

    losses: list[dict[str, float]]
    rates: list[list[float]]
    groups: list[tuple[float, int]]
    results: Mapping[str, Mapping[str, float]]


class Run(NamedTuple):
    """A native run and one of Detectron2's of the same recipe, from the same weights."""

    config_file: str
    words: list[Any]
    native: Steps
    theirs: Steps
    native_model: torch.nn.Module
    trainer: Any


class Recorder(HookBase):  # type: ignore[misc]
    """Seeds dropout before each step, as the native run does, and keeps the learning rates that it is made with."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def before_step(self) -> None:
        torch.manual_seed(1000 + self.trainer.iter)
        self.rates.append([group["lr"] for group in self.trainer.optimizer.param_groups])


def groups_of(optimizer: torch.optim.Optimizer) -> list[tuple[float, int]]:
    return [(group["weight_decay"], sum(p.numel() for p in group["params"])) for group in optimizer.param_groups]


def native_steps(cfg: Any, trainer: Any) -> Steps:
    losses, rates = [], []
    for iteration in range(ITERATIONS):
        torch.manual_seed(1000 + iteration)
        trainer.iteration = iteration
        trainer.step()
        losses.append(trainer.losses.read()[-1].terms)
        rates.append(trainer.learning_rates)
    results, _ = evaluate_dataset(cfg, trainer.model, get_dataset(cfg.DATASETS.TEST[0]))
    return Steps(losses, rates, groups_of(trainer.optimizer), results)


def their_steps(trainer: Any) -> Steps:
    recorder = Recorder()
    trainer.register_hooks([recorder])
    trainer.train()
    histories = {name: trainer.storage.history(name).values() for name in trainer.storage.histories()}
    # The only term of a loss is kept as the total alone.
    terms = {name: name for name in histories if name.startswith("loss_")} or {"loss_sem_seg": "total_loss"}
    losses = [{name: histories[key][i][0] for name, key in terms.items()} for i in range(ITERATIONS)]
    return Steps(losses, recorder.rates, groups_of(trainer.optimizer), trainer._last_eval_results)


def prefer_classes_of(name: str, model: Any) -> None:
    """Make a new model predict classes that a data set has: else all scores would be 0 and equal for that alone."""
    records = get_dataset(name).records
    if "sem_seg_file_name" in records[0]:
        maps = [read_semantic(record, get_dataset(name).metadata) for record in records]
        present = {label for found in maps for label in np.unique(found).tolist()} - {255}
    else:
        present = {segment["category_id"] for record in records for segment in record["segments_info"]}
    head = model.network.head
    layer = head.classifier if hasattr(head, "classifier") else head.class_head
    with torch.no_grad():
        layer.bias[sorted(present)] += 3


@pytest.fixture(scope="module")
def free_names() -> Iterator[None]:
    """Both catalogs as if Detectron2 had none of our names; it fixes its root of data sets when it is imported."""
    before = [dict(each) for each in (DatasetCatalog, MetadataCatalog)]
    ours = dict(catalog._OURS)
    for family in set(FAMILY_OF.values()):
        for name in NAMES[family]:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)
    yield
    for each, content in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        each.clear()
        each.update(content)
    catalog._OURS.clear()
    catalog._OURS.update(ours)


@pytest.fixture(scope="module", params=FAMILY_OF)
def run(request: pytest.FixtureRequest, free_names: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    config_file, family = request.param, FAMILY_OF[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(make_miniature(family, folder / "data")))
        catalog.register_datasets()
        words = [*FAST, *CROPS[family]]
        torch.manual_seed(0)
        cfg = get_cfg(config_file, [*words, "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(folder / "native")])
        trainer, _, _ = build_trainer(cfg, [get_dataset(cfg.DATASETS.TRAIN[0])], None, build_batch_split(cfg, 1))
        prefer_classes_of(cfg.DATASETS.TEST[0], trainer.model)
        start = save_model(folder / "start.pth", model=trainer.model)
        native = native_steps(cfg, trainer)
        trainer.optimizer.state.clear()

        keys = ["MODEL.WEIGHTS", str(start), "OUTPUT_DIR", str(folder / "theirs")]
        theirs = Trainer(build_config(config_file, [*words, *keys]))
        theirs.resume_or_load(resume=False)
        yield Run(config_file, words, native, their_steps(theirs), trainer.model, theirs)


def test_detectron2_first_losses_are_the_native_ones(run: Run) -> None:
    first, other = run.native.losses[0], run.theirs.losses[0]
    assert other.keys() == first.keys()
    for name, loss in first.items():
        assert loss > 0
        assert other[name] == pytest.approx(loss, rel=1e-5, abs=1e-5), name


def test_detectron2_steps_are_the_native_ones(run: Run) -> None:
    """Later losses depend on data, gradients, clipping, groups and rates of all steps before."""
    for first, other in zip(run.native.losses, run.theirs.losses, strict=True):
        assert sum(other.values()) == pytest.approx(sum(first.values()), rel=1e-4)
    # They moved, and by more than the two runs differ.
    totals = [sum(losses.values()) for losses in run.native.losses]
    assert max(totals) - min(totals) > 0.01 * max(totals)


def test_detectron2_rates_and_groups_are_the_native_ones(run: Run) -> None:
    assert run.theirs.groups == run.native.groups
    np.testing.assert_allclose(run.theirs.rates, run.native.rates, rtol=1e-12)
    assert len({rates[0] for rates in run.theirs.rates}) > 1


def test_detectron2_scores_are_its_own_evaluators(run: Run) -> None:
    cfg = run.trainer.cfg
    (name,) = cfg.DATASETS.TEST
    if "panoptic" in name:
        pytest.importorskip("panopticapi", reason="panopticapi, which Detectron2 measures PQ with, is not installed")
    theirs = Trainer.test(cfg, run.trainer.model, [evaluation.build_detectron2_evaluator(cfg, name)])
    ours = run.theirs.results
    panoptic = "panoptic_seg" in ours
    assert ours.keys() == theirs.keys() == {"panoptic_seg" if panoptic else "sem_seg"}
    metrics = ("PQ", "SQ", "RQ", "PQ_th", "PQ_st") if panoptic else ("mIoU", "fwIoU", "mACC", "pACC")
    for metric in metrics:
        found, expected = (scores["panoptic_seg" if panoptic else "sem_seg"][metric] for scores in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9, err_msg=metric)
    assert panoptic or ours["sem_seg"]["pACC"] > 0


def test_detectron2_checkpoint_gives_the_same_scores_natively(run: Run) -> None:
    checkpoint = Path(run.trainer.cfg.OUTPUT_DIR) / "model_final.pth"
    cfg = get_cfg(run.config_file, [*run.words, "OUTPUT_DIR", str(checkpoint.parent / "native")])
    load_weights(run.native_model, str(checkpoint), strict=True)
    results, _ = evaluate_dataset(cfg, run.native_model, get_dataset(cfg.DATASETS.TEST[0]))
    assert results.keys() == run.theirs.results.keys()
    for task, scores in results.items():
        for metric, score in scores.items():
            found = run.theirs.results[task][metric]
            np.testing.assert_allclose(found, score, rtol=0, atol=0.05, err_msg=f"{task}/{metric}")

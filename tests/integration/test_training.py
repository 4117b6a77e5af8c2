"""The training command on small scenes: what a run leaves, and that stopping changes nothing."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maskformer import load_model
from maskformer.engine import evaluating, training
from maskformer.engine import main as train_net
from maskformer.engine.hooks import Evaluation
from maskformer.engine.trainer import Trainer

# The smallest real model, with every source of chance: dropout and augmentation included.
TINY = """
MODEL:
  DEVICE: cpu
  RESNETS: {DEPTH: 18}
  SEM_SEG_HEAD: {NUM_CLASSES: 5, CONVS_DIM: 32, MASK_DIM: 32}
  MASK_FORMER:
    HIDDEN_DIM: 32
    NHEADS: 2
    DIM_FEEDFORWARD: 32
    DEC_LAYERS: 2
    NUM_OBJECT_QUERIES: 8
    DROPOUT: 0.1
    TEST: {PANOPTIC_ON: True}
DATASETS:
  TRAIN: [shapes_panoptic_train]
INPUT:
  DATASET_MAPPER_NAME: mask_former_panoptic
  MIN_SIZE_TRAIN: [64, 80]
  MAX_SIZE_TRAIN: 80
  MIN_SIZE_TEST: 64
  MAX_SIZE_TEST: 64
  CROP: {ENABLED: True, TYPE: absolute, SIZE: [64, 64]}
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: 64
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.001
  MAX_ITER: 40
  LR_SCHEDULER_NAME: WarmupPolyLR
  WARMUP_ITERS: 5
  WARMUP_FACTOR: 0.1
  CHECKPOINT_PERIOD: 20
DATALOADER: {NUM_WORKERS: 0}
TEST: {PICTURES: 1, IMS_PER_BATCH: 4}
LOG_PERIOD: 10
SEED: 3
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def run(config: Path, output: Path, *arguments: Any) -> int:
    words = ["--config-file", str(config), *(str(word) for word in arguments), "OUTPUT_DIR", str(output)]
    return train_net.main(words)


def checkpoint(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


class Stopped(Exception):  # noqa: N818
    """Stands in for a power failure."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    step = Trainer.step

    def stopping(self: Trainer) -> None:
        if self.iteration == steps:
            raise Stopped
        step(self)

    monkeypatch.setattr(Trainer, "step", stopping)


def assert_same(one: Any, other: Any) -> None:
    """Bit-identical tensors in equal containers."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of 40 iterations that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    assert run(folder / "tiny.yaml", folder / "out") == 0
    return folder / "out"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_and_resumed_run_is_bit_identical(
    workers: int, config: Path, tmp_path: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["DATALOADER.NUM_WORKERS", workers]
    with monkeypatch.context() as patch:
        stop_after(patch, 22)  # two steps beyond the checkpoint, which are lost
        with pytest.raises(Stopped):
            run(config, tmp_path / "out", *keys)
    assert not (tmp_path / "out" / "model_final.pth").exists()
    assert run(config, tmp_path / "out", "--resume", *keys) == 0

    whole, parts = (checkpoint(folder / "model_final.pth") for folder in (whole_run, tmp_path / "out"))
    for part in ("model", "optimizer", "rng", "position", "iteration", "metadata"):
        assert_same(whole[part], parts[part])
    assert whole["scheduler"]["last_epoch"] == parts["scheduler"]["last_epoch"] == 40
    assert (whole["iteration"], whole["position"]) == (39, 80)
    halfway = checkpoint(whole_run / "model_0000019.pth")
    layer = "network.head.class_head.weight"
    assert not torch.equal(halfway["model"][layer], whole["model"][layer])


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test set has 8 scenes."""
    from maskformer.data.datasets import shapes

    monkeypatch.setitem(shapes.COUNTS, "val", 8)


@pytest.mark.usefixtures("few_scenes")
def test_what_a_run_leaves(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "LOG_PERIOD", 2, "DATASETS.TEST", "('shapes_panoptic_val',)"]
    output = tmp_path / "out"
    assert run(config, output, *keys, "SEED", -1) == 0

    said = capsys.readouterr().out
    for pattern in (
        r"about to train:",
        r"model +MaskFormer, [\d,]+ parameters trained, 0 frozen",
        r"weights +random",
        r"device +cpu \(\d+ threads of \d+ cores\), float32",
        r"train on +shapes_panoptic_train: 1,000,000 images",
        r"evaluate on +shapes_panoptic_val: 8 images",
        r"batch +2 images",
        r"lr 0.0001, decay 0.0001: \d+ tensors of backbone",
        r"eta: 0:00:\d\d  iter: 1  total_loss: [\d.]+  loss_ce: .*  loss_mask_0: .*  lr: [\d.e-]+  max_mem: \d+M",
        r"Panoptic segmentation on shapes_panoptic_val",
    ):
        assert re.search(pattern, said), pattern
    assert said in (output / "log.txt").read_text()

    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [(line["iteration"], "total_loss" in line) for line in lines] == [
        (1, True),
        (1, False),
        (3, True),
        (3, False),
    ]
    assert {"lr", "time", "data_time", "eta_seconds", "loss_dice_0"} <= lines[0].keys()
    assert {"sem_seg/mIoU", "panoptic_seg/PQ"} <= lines[1].keys()

    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["SEED"] >= 0
    assert written["SOLVER"]["MAX_ITER"] == 4
    assert len(list(output.glob("events.out.tfevents.*"))) == 1
    assert len(list((output / "inference" / "pictures").glob("*.png"))) >= 1
    assert (output / "last_checkpoint").read_text() == "model_final.pth"

    # The written config and the model file are all that evaluation needs, and give the same numbers again.
    again = tmp_path / "again"
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    assert run(output / "config.yaml", again, "--eval-only", *weights) == 0
    scores = json.loads((again / "inference" / "results.json").read_text())["scores"]
    assert scores == {name: value for name, value in lines[-1].items() if name != "iteration"}

    # Resuming a finished run trains no further and evaluates its end again.
    assert run(config, output, *keys, "--resume") == 0
    assert len((output / "metrics.json").read_text().splitlines()) == 5


def test_resume_with_nothing_to_resume_starts_from_scratch(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "out", "--resume", "SOLVER.MAX_ITER", 1) == 0
    assert "--resume: no checkpoint in" in capsys.readouterr().out
    assert run(config, tmp_path / "out", "SOLVER.MAX_ITER", 1) == 0
    assert "WARNING" in (said := capsys.readouterr().out)
    assert "holds checkpoints of an earlier run" in said


def test_resume_with_another_config_names_the_keys(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(config, output, "SOLVER.MAX_ITER", 1) == 0
    assert run(config, output, "--resume", "SOLVER.MAX_ITER", 2, "SOLVER.BASE_LR", 0.002, "LOG_PERIOD", 1) == 0
    said = capsys.readouterr().out
    assert "SOLVER.BASE_LR (0.001 → 0.002), SOLVER.MAX_ITER (1 → 2)" in said
    assert "LOG_PERIOD (" not in said
    last = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert (last["iteration"], last["lr"]) == (1, pytest.approx(0.002 * (0.1 * 0.8 + 0.2) * 0.5**0.9))


def test_ctrl_c_says_how_to_continue(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer) -> None:
        if self.iteration == 2:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert run(config, tmp_path / "out", "SOLVER.CHECKPOINT_PERIOD", 2) == 130
    assert f"the last checkpoint is {tmp_path / 'out' / 'model_0000001.pth'}, --resume" in capsys.readouterr().out


def test_mixed_precision_trains(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, tmp_path / "out", "SOLVER.MAX_ITER", 2, "SOLVER.AMP.ENABLED", True) == 0
    assert "mixed bfloat16" in capsys.readouterr().out


def test_published_parameter_groups() -> None:
    from maskformer.build import build_model
    from maskformer.config import get_cfg
    from maskformer.engine.optimizer import build_optimizer

    expected = {
        "configs/ade20k-150/maskformer_R50_bs16_160k.yaml": [(1e-5, 1e-4, 53), (1e-4, 0, 53), (1e-4, 1e-4, 91)],
        "configs/ade20k-150/swin/maskformer_swin_tiny_bs16_160k.yaml": [(6e-5, 0, 129), (6e-5, 0.01, 192)],
    }
    for config_file, groups in expected.items():
        cfg = get_cfg(config_file, ["MODEL.DEVICE", "cpu"])
        found = build_optimizer(cfg, build_model(cfg)).param_groups
        settings = sorted((group["lr"], group["weight_decay"], len(group["params"])) for group in found)
        assert [pytest.approx(group) for group in groups] == settings


def test_evaluation_of_several_data_sets_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    def fake(cfg: Any, model: Any, dataset: Any, folder_name: str, tasks: Any) -> Any:
        return {"sem_seg": {"mIoU": 1.0}}, {"semantic/00": Path(dataset.metadata.name)}

    monkeypatch.setattr(evaluating, "evaluate_dataset", fake)
    for names, keys in ((("a",), ["sem_seg/mIoU"]), (("a", "bb"), ["a/sem_seg/mIoU", "bb/sem_seg/mIoU"])):
        datasets: Any = [SimpleNamespace(metadata=SimpleNamespace(name=name)) for name in names]
        evaluation = evaluating.evaluate(None, torch.nn.Identity(), datasets)
        assert list(evaluation.scores) == keys
        assert len(evaluation.pictures) == len(names)


def test_averaged_weights_are_saved_beside_and_resumed(config: Path, tmp_path: Path) -> None:
    words = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.9, "SOLVER.CHECKPOINT_PERIOD", 3]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(config, whole, *words, "SOLVER.MAX_ITER", 6) == 0
    halves.mkdir()
    (halves / "model_0000002.pth").write_bytes((whole / "model_0000002.pth").read_bytes())
    (halves / "last_checkpoint").write_text("model_0000002.pth")
    assert run(config, halves, "--resume", *words, "SOLVER.MAX_ITER", 6) == 0
    last, averaged = checkpoint(whole / "model_final.pth"), checkpoint(whole / "model_final_ema.pth")
    resumed = checkpoint(halves / "model_final_ema.pth")
    assert last["extra"]["ema"]["updates"] == 6
    for name, tensor in averaged["model"].items():
        assert torch.equal(tensor, last["extra"]["ema"]["model"][name])
        assert torch.equal(tensor, resumed["model"][name])
    name = "network.head.class_head.weight"
    assert not torch.equal(averaged["model"][name], last["model"][name])
    assert (whole / "last_checkpoint").read_text() == "model_final.pth"
    # A file like any other: it can be evaluated, demonstrated, or trained from.
    model = load_model(str(config), str(whole / "model_final_ema.pth"))
    assert torch.equal(model.state_dict()[name], averaged["model"][name])


def test_the_best_weights_are_kept_and_training_stops_when_nothing_gets_better(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([10.0, 30.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(
        training,
        "evaluate_all",
        lambda *anything: Evaluation({"panoptic_seg/PQ": next(scores), "sem_seg/mIoU": 1.0}, {}),
    )
    words = ["DATASETS.TEST", "('shapes_panoptic_val',)", "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 4]
    words += ["CHECKPOINT.BEST_METRIC", "panoptic_seg/PQ", "SOLVER.EARLY_STOPPING.PATIENCE", 2]
    assert run(config, tmp_path, *words, "SOLVER.MAX_ITER", 6) == 0  # evaluated after 2, 4 and 6
    best = checkpoint(tmp_path / "model_best.pth")
    assert best["iteration"] == 3
    assert best["extra"]["best"] == {"metric": "panoptic_seg/PQ", "score": 30.0, "iteration": 3}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    # The resumed run knows the best score and how long ago it was: the next evaluation is the second without a better.
    assert run(config, tmp_path, "--resume", *words, "SOLVER.MAX_ITER", 12) == 0
    assert checkpoint(tmp_path / "model_final.pth")["iteration"] == 7
    assert "stopping early: panoptic_seg/PQ was best (30.0000) at iteration 3" in (tmp_path / "log.txt").read_text()
    assert checkpoint(tmp_path / "model_best.pth")["iteration"] == 3


def test_an_unknown_best_metric_is_refused_before_training(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["DATASETS.TEST", "('shapes_panoptic_val',)", "CHECKPOINT.BEST_METRIC", "PQ"]
    assert run(config, tmp_path, *words) == 2
    message = capsys.readouterr().err
    assert "'PQ'" in message
    assert "panoptic_seg/PQ" in message
    assert "IoU-" not in message


def test_a_trace_is_left_where_one_is_asked_for(config: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path, "--profile", "1:3", "SOLVER.MAX_ITER", 4) == 0
    with gzip.open(tmp_path / "profile" / "iterations_1-2_rank0.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"data", "forward", "matching", "backward", "optimizer"} <= names


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_resumes(config: Path, tmp_path: Path, dtype: str) -> None:
    words = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype]
    assert run(config, tmp_path, *words, "SOLVER.MAX_ITER", 2) == 0
    first = checkpoint(tmp_path / "model_final.pth")
    assert ("scale" in first["scaler"]) is (dtype == "float16")
    assert run(config, tmp_path, "--resume", *words, "SOLVER.MAX_ITER", 4) == 0
    assert f"mixed {dtype}" in (tmp_path / "log.txt").read_text()
    assert checkpoint(tmp_path / "model_final.pth")["iteration"] == 3
    assert all(tensor.dtype is not getattr(torch, dtype) for tensor in first["model"].values())

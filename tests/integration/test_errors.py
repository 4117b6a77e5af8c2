"""Bad input through the real command: exit code 2, one sentence that names the remedy, no traceback, no training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer.engine import main as train_net
from maskformer.engine.trainer import Trainer

CONFIG = """
MODEL:
  DEVICE: cpu
  RESNETS: {{DEPTH: 18}}
  SEM_SEG_HEAD: {{NUM_CLASSES: 3, CONVS_DIM: 32, MASK_DIM: 32}}
  MASK_FORMER: {{HIDDEN_DIM: 32, NHEADS: 2, DIM_FEEDFORWARD: 32, DEC_LAYERS: 1, NUM_OBJECT_QUERIES: 5}}
DATASETS:
  TRAIN: ["folder:{root}:train"]
  TEST: ["folder:{root}:val"]
INPUT: {{MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64, CROP: {{ENABLED: True, TYPE: absolute, SIZE: [64, 64]}}}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 2}}
DATALOADER: {{NUM_WORKERS: 0}}
OUTPUT_DIR: {root}/out
SEED: 0
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder data set of three classes, two images a split, and its config."""
    rng = np.random.default_rng(0)
    (tmp_path / "dataset.yaml").write_text("classes: [sky, road, car]\n")
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=tmp_path))
    for split in ("train", "val"):
        for kind, shape, high in (("images", (64, 64, 3), 256), ("masks", (64, 64), 3)):
            (tmp_path / kind / split).mkdir(parents=True)
            for name in "ab":
                array = rng.integers(0, high, shape).astype(np.uint8)
                Image.fromarray(array).save(tmp_path / kind / split / f"{name}.png")
    return tmp_path


def wrong_label(root: Path, split: str) -> list[Any]:
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(root / "masks" / split / "b.png")
    return []


def unreadable(root: Path, split: str, kind: str, keep: int) -> list[Any]:
    path = root / kind / split / "b.png"
    path.write_bytes(path.read_bytes()[:keep])
    return []


def without(root: Path, pattern: str) -> list[Any]:
    for path in root.glob(pattern):
        path.unlink()
    return []


def with_yaml(root: Path, old: str, new: str) -> list[Any]:
    path = root / "config.yaml"
    path.write_text(path.read_text().replace(old, new))
    return []


def other_classes(root: Path) -> list[Any]:
    """A test set of as many classes, but others."""
    other = root / "other"
    other.mkdir()
    for kind in ("images", "masks"):
        (other / kind).symlink_to(root / kind)
    (other / "dataset.yaml").write_text("classes: [sky, tree, car]\n")
    return ["DATASETS.TEST", f"('folder:{other}:val',)"]


# What is broken, and what the sentence must name: file or key, value, remedy.
CASES: dict[str, tuple[Callable[[Path], list[Any]], list[str]]] = {
    "wrong class count": (
        lambda root: ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4],
        ["MODEL.SEM_SEG_HEAD.NUM_CLASSES is 4", "3 classes"],
    ),
    "test set of other classes": (other_classes, [":train", "other:val", "class 1 ('road' and 'tree')"]),
    "label outside the range, training": (lambda root: wrong_label(root, "train"), ["masks/train/b.png", "7"]),
    "label outside the range, testing": (lambda root: wrong_label(root, "val"), ["masks/val/b.png", "7"]),
    "cut image, training": (lambda root: unreadable(root, "train", "images", 4000), ["images/train/b.png"]),
    "cut image, testing": (lambda root: unreadable(root, "val", "images", 4000), ["images/val/b.png"]),
    "empty image file": (lambda root: unreadable(root, "train", "images", 0), ["images/train/b.png", "it is empty"]),
    "cut label file": (lambda root: unreadable(root, "train", "masks", 100), ["masks/train/b.png"]),
    "empty training set": (lambda root: without(root, "images/train/*"), ["folder:", ":train", "empty"]),
    "empty test set": (lambda root: without(root, "images/val/*"), ["folder:", ":val", "empty"]),
    "missing label file": (lambda root: without(root, "masks/val/a.png"), ["images/val/a.png", "masks/val"]),
    "missing description": (lambda root: without(root, "dataset.yaml"), ["dataset.yaml"]),
    "missing weights": (lambda root: ["MODEL.WEIGHTS", root / "no.pth"], ["no.pth"]),
    "missing config": (lambda root: without(root, "config.yaml"), ["config.yaml"]),
    "unknown key on the command line": (lambda root: ["SOLVER.BASE_LRR", 1], ["SOLVER.BASE_LRR", "SOLVER.BASE_LR?"]),
    "unknown key in the file": (
        lambda root: with_yaml(root, "MAX_ITER: 2", "MAX_ITERS: 2"),
        ["config.yaml, line", "SOLVER.MAX_ITERS", "SOLVER.MAX_ITER?"],
    ),
    "wrong type": (lambda root: ["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "int", "'many'"]),
    "no data set": (lambda root: ["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN is empty"]),
    "unknown data set": (lambda root: ["DATASETS.TEST", "('shapes_semantic_vall',)"], ["'shapes_semantic_val'"]),
    "truth the model does not predict": (
        lambda root: ["MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False],
        ["MODEL.MASK_FORMER.TEST.SEMANTIC_ON"],
    ),
    "several devices": (lambda root: ["--num-gpus", 3], ["SOLVER.IMS_PER_BATCH 2", "3 processes", "use 1 or 2"]),
    "negative devices": (lambda root: ["--num-gpus", -1], ["--num-gpus is -1"]),
    "several machines": (lambda root: ["--num-machines", 2], ["--dist-url is missing", "tcp://"]),
    "no address": (lambda root: ["--num-machines", 2, "--dist-url", "tcp://a"], ["'tcp://a'", "tcp://host:port"]),
    "restarts": (lambda root: ["--max-restarts", -1], ["--max-restarts is -1"]),
    "no iterations to trace": (lambda root: ["--profile", "30:20"], ["--profile 30:20"]),
    "unknown metric": (lambda root: ["CHECKPOINT.BEST_METRIC", "mIoU"], ["'mIoU'", "sem_seg/mIoU"]),
    "patience without a metric": (lambda root: ["SOLVER.EARLY_STOPPING.PATIENCE", 2], ["CHECKPOINT.BEST_METRIC"]),
    "no such machine": (lambda root: ["--machine-rank", 1], ["--machine-rank is 1"]),
    "contradicting devices": (lambda root: ["--num-gpus", 0, "MODEL.DEVICE", "cuda"], ["--num-gpus 0", "'cuda'"]),
    "contradicting device": (lambda root: ["--num-gpus", 1, "MODEL.DEVICE", "mps"], ["--num-gpus 1", "'mps'"]),
    "evaluation without weights": (lambda root: ["--eval-only"], ["--eval-only", "MODEL.WEIGHTS"]),
    "output folder is a file": (lambda root: ["OUTPUT_DIR", root / "dataset.yaml"], ["OUTPUT_DIR", "dataset.yaml"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def trained(self: Trainer) -> None:
        raise AssertionError("this could be known before the first step")

    monkeypatch.setattr(Trainer, "update", trained)
    spoil, named = CASES[case]
    arguments = [str(word) for word in spoil(root)]
    assert train_net.main(["--config-file", str(root / "config.yaml"), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for part in named:
        assert part in message, message
    assert len(message) < 600


def test_a_worker_error_arrives_as_one_sentence(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong_label(root, "train")
    assert train_net.main(["--config-file", str(root / "config.yaml"), "DATALOADER.NUM_WORKERS", "1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert "masks/train/b.png" in message
    assert "stopped: " in (root / "out" / "log.txt").read_text()


def test_the_real_command_has_no_traceback_but_with_debug(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(repository))  # works without installation, too
    words = [
        sys.executable,
        str(repository / "tools" / "train_net.py"),
        "--config-file",
        str(root / "config.yaml"),
        "SOLVER.BASE_LRR",
        "1",
    ]
    plain = subprocess.run(words, capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert plain.stderr.startswith("error: command line: unknown key SOLVER.BASE_LRR")
    assert plain.stderr.count("\n") == 1
    debug = subprocess.run([*words, "--debug"], capture_output=True, text=True, check=False)
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr
    assert debug.stderr.splitlines()[-1] == plain.stderr.strip()

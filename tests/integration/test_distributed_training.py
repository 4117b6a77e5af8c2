"""One meaning of a config: several processes, micro-batches and restarts train the same as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
CLASSES = 4

# No chance inside the model; the learning rate of the recipes. A much higher one lets rounding decide which of two
# nearly equal queries is matched, and then no two ways of adding up the same numbers agree for long.
CONFIG = """
MODEL:
  DEVICE: cpu
  RESNETS: {DEPTH: 18}
  SEM_SEG_HEAD: {NUM_CLASSES: 4, CONVS_DIM: 32, MASK_DIM: 32}
  MASK_FORMER:
    {HIDDEN_DIM: 32, NHEADS: 2, DIM_FEEDFORWARD: 32, DEC_LAYERS: 2, NUM_OBJECT_QUERIES: 8, DROPOUT: 0.0}
INPUT:
  MIN_SIZE_TRAIN: [64, 80]
  MIN_SIZE_TEST: 64
  MAX_SIZE_TEST: 64
  CROP: {ENABLED: True, TYPE: absolute, SIZE: [64, 64]}
  SIZE_DIVISIBILITY: 64
SOLVER: {IMS_PER_BATCH: 4, BASE_LR: 0.0001, MAX_ITER: 10, CHECKPOINT_PERIOD: 4, STEPS: [100]}
DATALOADER: {NUM_WORKERS: 0}
TEST: {PICTURES: 0}
LOG_PERIOD: 1
SEED: 3
"""
PER_PIXEL = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a data set of which every third image has no segment."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        for number in range(count):
            for kind in ("images", "masks"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            labels = np.full((80, 90), 255, np.uint8)
            image = rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)
            for label in range(CLASSES if number % 3 else 0):
                y, x = rng.integers(0, 60, 2)
                labels[y : y + 30, x : x + 30] = label
                image[y : y + 30, x : x + 30, label % 3] //= 4
            cv2.imwrite(str(root / "images" / split / f"{number}.png"), image)
            cv2.imwrite(str(root / "masks" / split / f"{number}.png"), labels)
    (root / "dataset.yaml").write_text("classes: [a, b, c, d]\nignore_label: 255\n")
    (root / "config.yaml").write_text(f"{CONFIG}DATASETS: {{TRAIN: ['folder:{root}:train']}}\n")
    return root


def run(root: Path, output: Path, *words: Any, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """The real command in processes of its own; `launcher` are torchrun's options."""
    start = ["-m", "torch.distributed.run", *launcher] if launcher else []
    command = [sys.executable, *start, "tools/train_net.py", "--config-file", root / "config.yaml", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.run(
        [str(word) for word in [*command, "OUTPUT_DIR", output]],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def trained(root: Path, output: Path, *words: Any) -> Path:
    """A run that must end well."""
    finished = run(root, output, *words)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return output


def losses(output: Path) -> dict[int, dict[str, float]]:
    """Every loss of every iteration; what a resumed run did anew counts."""
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {row["iteration"]: {k: v for k, v in row.items() if "loss" in k} for row in rows if "total_loss" in row}


def final(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(output / "model_final.pth", weights_only=True)
    return content


def assert_same_training(one: Path, other: Path, iterations: int = 10) -> None:
    expected, found = losses(one), losses(other)
    assert list(expected) == list(found) == list(range(iterations))
    for iteration, terms in expected.items():
        assert found[iteration] == pytest.approx(terms, rel=5e-4), iteration
    for name, tensor in final(one)["model"].items():
        torch.testing.assert_close(final(other)["model"][name], tensor, rtol=0, atol=1e-4, msg=name)


WAYS: dict[str, list[Any]] = {
    "two processes": ["--num-gpus", 2],
    "two micro-batches": ["SOLVER.MAX_IMS_PER_DEVICE", 2],
    "two processes of two micro-batches": ["--num-gpus", 2, "SOLVER.MAX_IMS_PER_DEVICE", 1],
}


@pytest.mark.parametrize("model", [[], PER_PIXEL], ids=["MaskFormer", "per-pixel"])
def test_the_same_config_trains_the_same_however_it_is_spread(root: Path, tmp_path: Path, model: list[str]) -> None:
    alone = trained(root, tmp_path / "alone", *model)
    assert len({row["total_loss"] for row in losses(alone).values()}) == 10  # it does train
    for name, words in WAYS.items():
        assert_same_training(alone, trained(root, tmp_path / name, *words, *model))
    log = (tmp_path / "two processes of two micro-batches" / "log.txt").read_text()
    assert "4 images per iteration = 2 processes x 2 micro-batches x 1" in log
    assert (tmp_path / "two processes" / "log.txt.rank1").is_file()


def test_resume_with_another_number_of_processes_goes_on_with_the_same_images(root: Path, tmp_path: Path) -> None:
    alone = trained(root, tmp_path / "alone")
    changed = trained(root, tmp_path / "changed", "SOLVER.MAX_ITER", 4)
    trained(root, changed, "--resume", "--num-gpus", 2)
    assert "the run had 1 processes and has 2 now" in (changed / "log.txt").read_text()
    assert_same_training(alone, changed)  # the losses are those of the same images
    assert final(changed)["position"] == final(alone)["position"]


def test_resume_with_as_many_processes_is_exact(root: Path, tmp_path: Path) -> None:
    """With dropout, so that the random state of each process matters."""
    words = ["--num-gpus", 2, "MODEL.MASK_FORMER.DROPOUT", 0.1]
    whole = trained(root, tmp_path / "whole", *words)
    halves = trained(root, tmp_path / "halves", *words, "SOLVER.MAX_ITER", 4)
    trained(root, halves, "--resume", *words)
    assert losses(halves) == losses(whole)
    for name, tensor in final(whole)["model"].items():
        assert torch.equal(final(halves)["model"][name], tensor), name
    assert len(final(whole)["rng"]) == 2
    first, second = (state["torch"] for state in final(whole)["rng"])
    assert not torch.equal(first, second)


# Kills the second process with SIGKILL after iteration 6, once; what a node's failure looks like to the others.
KILLER = """
import os, signal, sys
from pathlib import Path
from maskformer.engine import main, trainer
step = trainer.Trainer.step
def dying(self):
    step(self)
    mark = Path(os.environ["KILL_MARK"])
    if self.iteration == 6 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Trainer.step = dying
sys.exit(main.main())
"""


def test_a_killed_process_is_started_again_and_nothing_but_the_steps_since_the_checkpoint_is_lost(
    root: Path, tmp_path: Path
) -> None:
    alone = trained(root, tmp_path / "alone")
    script, output = tmp_path / "killer.py", tmp_path / "killed"
    script.write_text(KILLER)
    output.mkdir()
    # A checkpoint of an earlier run in the folder is not what a restart goes on from.
    (output / "model_0000008.pth").write_bytes((alone / "model_0000007.pth").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "KILL_MARK": str(output / "m")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", script, "--config-file", root / "config.yaml", "OUTPUT_DIR", output]
    finished = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    log = (output / "log.txt").read_text()
    assert "restarted, resuming from" in log
    assert "model_0000003.pth, 4 iterations done" in log
    assert_same_training(alone, output)
    assert final(output)["iteration"] == 9


def test_a_run_that_fails_before_its_first_checkpoint_starts_from_scratch_not_from_an_earlier_run(
    root: Path, tmp_path: Path
) -> None:
    from maskformer.engine.resume import find_restart, start_run

    earlier = trained(root, tmp_path / "out", "SOLVER.MAX_ITER", 2)
    assert find_restart(earlier) is not None
    start_run(earlier, None)  # as a new run in the same folder does
    assert find_restart(earlier) is None


def test_mistakes_are_told_once_without_a_traceback(root: Path, tmp_path: Path) -> None:
    odd = run(root, tmp_path / "odd", "SOLVER.IMS_PER_BATCH", 3, launcher=["--standalone", "--nproc-per-node", "2"])
    assert odd.returncode != 0
    assert odd.stderr.count("error: SOLVER.IMS_PER_BATCH is 3, which 2 processes cannot share equally") == 1
    other = tmp_path / "broken"
    other.mkdir()
    (other / "dataset.yaml").write_text("classes: [a, b, c, d]\n")
    missing = run(root, tmp_path / "missing", "--num-gpus", 2, "DATASETS.TRAIN", f"('folder:{other}:train',)")
    assert missing.returncode == 2, missing.stdout + missing.stderr
    assert missing.stderr.count("error: ") == 1, missing.stderr
    assert "Traceback" not in missing.stderr

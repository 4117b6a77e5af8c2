"""The command that trains with Detectron2: whole runs, resumed ones, native checkpoints, and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

from detectron2.data import DatasetCatalog, MetadataCatalog

from maskformer.build import build_model
from maskformer.checkpoint import load_weights
from maskformer.checkpoint.training import save_model
from maskformer.config import get_cfg
from maskformer.data.datasets import shapes
from maskformer.engine import main as train_net
from maskformer.integrations.detectron2 import Trainer, command, training
from maskformer.integrations.detectron2.command import build_config
from maskformer.integrations.detectron2.command import main as train_net_detectron2
from tests.miniatures import make_miniature

ROOT = Path(__file__).parents[2]

# The smallest real model, on scenes drawn on the fly; without dropout, whose chance a resumed run would not share.
TINY = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: D2SwinTransformer}
  SWIN: {EMBED_DIM: 24, DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 2, 2, 4], DROP_PATH_RATE: 0.0}
  SEM_SEG_HEAD: {NUM_CLASSES: 5, CONVS_DIM: 32, MASK_DIM: 32}
  MASK_FORMER:
    HIDDEN_DIM: 32
    NHEADS: 2
    DIM_FEEDFORWARD: 32
    DEC_LAYERS: 2
    NUM_OBJECT_QUERIES: 8
    DROPOUT: 0.0
    TEST: {PANOPTIC_ON: True}
DATASETS:
  TRAIN: [shapes_panoptic_train]
  TEST: [shapes_panoptic_val]
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
  MAX_ITER: 8
  LR_SCHEDULER_NAME: WarmupPolyLR
  WARMUP_ITERS: 3
  WARMUP_FACTOR: 0.1
  CHECKPOINT_PERIOD: 4
DATALOADER: {NUM_WORKERS: 0}
TEST: {PICTURES: 0}
LOG_PERIOD: 2
SEED: 3
"""
LAYER = "sem_seg_head.predictor.class_embed.weight"


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test set has 4 scenes."""
    monkeypatch.setitem(shapes.COUNTS, "val", 4)
    monkeypatch.setitem(shapes.COUNTS, "train", 1000)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def run(config: Path, output: Path, *words: Any) -> int:
    line = ["--config-file", config, "--num-gpus", 0, *words, "OUTPUT_DIR", output]
    return train_net_detectron2([str(word) for word in line])


def checkpoint(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def scores(folder: Path) -> dict[str, float]:
    """Of the last evaluation, as Detectron2 writes them."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "sem_seg/mIoU" in line)
    return {name: value for name, value in last.items() if name.startswith(("sem_seg/", "panoptic_seg/"))}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of Detectron2's of 8 iterations that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.COUNTS, "val", 4)
        patch.setitem(shapes.COUNTS, "train", 1000)
        assert run(folder / "tiny.yaml", folder / "out") == 0
    return folder / "out"


def test_detectron2_run_leaves_what_detectron2_runs_leave(whole_run: Path) -> None:
    lines = [json.loads(line) for line in (whole_run / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 3, 5, 7, 8]  # LOG_PERIOD, and the evaluation
    assert {"loss_ce", "loss_mask_0", "lr", "total_loss"} <= lines[0].keys()
    assert {"sem_seg/mIoU", "panoptic_seg/PQ"} <= lines[-1].keys()
    assert (whole_run / "last_checkpoint").read_text() == "model_final.pth"
    assert (whole_run / "inference" / "sem_seg_predictions.json").is_file()
    assert {"config.yaml", "log.txt", "model_0000003.pth"} <= {path.name for path in whole_run.iterdir()}
    final = checkpoint(whole_run / "model_final.pth")
    assert LAYER in final["model"]
    assert not torch.equal(final["model"][LAYER], checkpoint(whole_run / "model_0000003.pth")["model"][LAYER])


def test_detectron2_run_that_is_resumed_ends_as_if_never_stopped(config: Path, whole_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "model_0000003.pth").write_bytes((whole_run / "model_0000003.pth").read_bytes())
    (output / "last_checkpoint").write_text("model_0000003.pth")
    assert run(config, output, "--resume", "SEED", 99) == 0  # the data go on with the seed that they began with
    whole, parts = (checkpoint(folder / "model_final.pth")["model"] for folder in (whole_run, output))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_detectron2_run_goes_on_from_a_native_checkpoint(config: Path, tmp_path: Path) -> None:
    native, output = tmp_path / "native", tmp_path / "theirs"
    assert train_net.main(["--config-file", str(config), "OUTPUT_DIR", str(native)]) == 0
    output.mkdir()
    (output / "model_0000003.pth").write_bytes((native / "model_0000003.pth").read_bytes())
    (output / "last_checkpoint").write_text("model_0000003.pth")
    assert run(config, output, "--resume") == 0

    # Weights, moments, rates and data were taken up: it ends where the native run did.
    model = build_model(get_cfg(str(config)))
    load_weights(model, str(output / "model_final.pth"), strict=True)
    end = checkpoint(native / "model_final.pth")["model"]
    begin = checkpoint(native / "model_0000003.pth")["model"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, end[name], rtol=1e-4, atol=1e-6)
    name = "network.head.class_head.weight"
    assert (end[name] - begin[name]).abs().max() > 1e-4
    assert scores(output) == pytest.approx(scores(native), nan_ok=True, abs=0.05)


def test_detectron2_weights_are_evaluated_on_both_sides(config: Path, whole_run: Path, tmp_path: Path) -> None:
    weights = ["MODEL.WEIGHTS", str(whole_run / "model_final.pth")]
    words = ["--config-file", str(config), "--eval-only", *weights, "OUTPUT_DIR", str(tmp_path / "native")]
    assert train_net.main(words) == 0
    native = json.loads((tmp_path / "native" / "inference" / "results.json").read_text())["scores"]
    expected = {name: value for name, value in scores(whole_run).items() if value == value}
    assert {name: native[name] for name in expected} == pytest.approx(expected, abs=0.05)


def test_detectron2_evaluation_saves_pictures(config: Path, whole_run: Path, tmp_path: Path) -> None:
    words = ["--eval-only", "MODEL.WEIGHTS", whole_run / "model_final.pth", "TEST.PICTURES", 2]
    assert run(config, tmp_path / "out", *words) == 0
    pictures = sorted(path.name[:9] for path in (tmp_path / "out" / "inference" / "pictures").iterdir())
    assert pictures == ["00_000000", "00_000000", "01_000003", "01_000003"]  # semantic and panoptic of two scenes


def test_detectron2_evaluates_alone_and_with_augmentation(
    config: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    evaluate = command.evaluate
    monkeypatch.setattr(command, "evaluate", lambda *arguments: found.append(evaluate(*arguments)))
    augmentation = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.MAX_SIZE", 80]
    words = ["--eval-only", "MODEL.WEIGHTS", whole_run / "model_final.pth", *augmentation]
    assert run(config, tmp_path / "out", *words) == 0
    (results,) = found
    assert list(results) == ["sem_seg", "panoptic_seg", "sem_seg_TTA"]
    once = scores(whole_run)
    assert results["sem_seg"]["pACC"] == pytest.approx(once["sem_seg/pACC"])
    # Natively the same.
    native = [*words, "OUTPUT_DIR", tmp_path / "n"]
    assert train_net.main(["--config-file", str(config), *map(str, native)]) == 0
    expected = json.loads((tmp_path / "n" / "inference" / "results.json").read_text())["scores"]
    for metric in ("mIoU", "fwIoU", "mACC", "pACC"):
        assert results["sem_seg_TTA"][metric] == pytest.approx(expected[f"TTA/sem_seg/{metric}"], abs=0.05)


def test_detectron2_per_pixel_model_is_evaluated_with_augmentation(config: Path, tmp_path: Path) -> None:
    words = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"]
    words += ["MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False, "SOLVER.MAX_ITER", 1, "TEST.AUG.ENABLED", True]
    words += ["TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.MAX_SIZE", 80]
    assert run(config, tmp_path / "out", *words) == 0
    last = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert {"sem_seg/mIoU", "sem_seg_TTA/mIoU"} <= last.keys()


# ------------------------------------------------------------------ several processes
def run_processes(processes: int, config: Path, output: Path, *words: Any) -> list[dict[str, Any]]:
    """What so many processes (gloo, on the CPU) write to metrics.json."""
    script = ROOT / "tests" / "integration" / "detectron2_processes.py"
    line = [sys.executable, script, processes, "--config-file", config, *words, "OUTPUT_DIR", output]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [str(word) for word in line], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(text) for text in (output / "metrics.json").read_text().splitlines()]


def test_detectron2_two_processes_train_and_score_as_one(config: Path, tmp_path: Path) -> None:
    words = ["SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 4, "LOG_PERIOD", 1]
    one = run_processes(1, config, tmp_path / "one", *words)
    two = run_processes(2, config, tmp_path / "two", *words)
    assert len(one) == len(two) == 4
    for first, other in zip(one[:3], two[:3], strict=True):
        for name in ("total_loss", "loss_ce", "loss_mask", "loss_dice_0"):
            assert other[name] == pytest.approx(first[name], rel=1e-4), name
        assert other["lr"] == first["lr"]
    for name, score in one[-1].items():
        if name.startswith(("sem_seg/", "panoptic_seg/")):
            assert two[-1][name] == pytest.approx(score, abs=0.2, nan_ok=True), name
    weights = [checkpoint(tmp_path / run / "model_final.pth")["model"] for run in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)
    # Every image is in the predictions once, whichever process saw it.
    predictions = json.loads((tmp_path / "two" / "inference" / "predictions.json").read_text())
    assert [entry["image_id"] for entry in predictions["annotations"]] == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.EMA.ENABLED", True], "SOLVER.EMA.ENABLED is True, which only tools/train_net.py does"),
        (["SOLVER.MAX_IMS_PER_DEVICE", 1], "does not accumulate"),
        (["SOLVER.AMP.ENABLED", True], "needs CUDA"),
        (["DATASETS.TRAIN", "('shapes_panoptic_trian',)"], "did you mean 'shapes_panoptic_train'"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.TEST", "('ade20k_sem_seg_val',)"], "data set 'ade20k_sem_seg_val' has 150 classes"),
        (["SOLVER.BASE_LRR", 1], "do not fit Detectron2's config: Non-existent key: SOLVER.BASE_LRR"),
        (["--eval-only"], "MODEL.WEIGHTS is empty"),
        (["--eval-only", "--resume"], "MODEL.WEIGHTS is empty"),
        (["--eval-only", "MODEL.WEIGHTS", "x.pth", "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (["--eval-only", "MODEL.WEIGHTS", "/nope.pkl"], "the weights /nope.pkl cannot be had"),
        (["MODEL.WEIGHTS", "/nope.pkl"], "the weights /nope.pkl cannot be had"),
        (["--num-machines", 2], "--num-machines is 2, but --num-gpus 0 is one process"),
        (["--num-gpus", 2, "MODEL.DEVICE", "cpu"], "--num-gpus is 2 on 1 machine(s), but MODEL.DEVICE is 'cpu'"),
        (["--num-gpus", -1], "--num-gpus is -1"),
        (["--config-file", ""], "--config-file is missing"),
        (["MODEL.LOAD_PROPOSALS", True], "MODEL.LOAD_PROPOSALS is True"),
        (["SOLVER.MAX_ITER", 0], "SOLVER.MAX_ITER is 0"),
    ],
)
def test_detectron2_command_says_in_a_sentence_what_is_wrong(
    words: list[Any], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "out", *words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


def test_detectron2_output_that_is_a_file_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, config) == 2
    assert f"error: OUTPUT_DIR {config} cannot be made (File exists)" in capsys.readouterr().err


def test_detectron2_evaluation_and_training_refuse_weights_of_another_model(
    config: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.WEIGHTS", whole_run / "model_final.pth"]
    for words in (["--eval-only"], []):
        assert run(config, tmp_path / "out", *words, *other) == 2
        assert "model_final.pth is for another backbone: only 0 tensors fit" in capsys.readouterr().err
    # What fits is taken if that is asked for.
    cfg = build_config(str(config), [*map(str, other), "MODEL.WEIGHTS_MIN_FIT", 0.0, "OUTPUT_DIR", str(tmp_path)])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    name = "sem_seg_head.predictor.query_embed.weight"
    expected = checkpoint(whole_run / "model_final.pth")["model"][name]
    assert torch.equal(trainer.model.state_dict()[name], expected)


@pytest.mark.parametrize("mistake", [True, False])
def test_detectron2_mistake_found_in_another_process_is_a_sentence_too(
    mistake: bool, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In the other process the number of GPUs is refused, or the process's number, 0, is no config.
    arguments = SimpleNamespace(num_gpus=-3 if mistake else 1, num_machines=1)
    work = partial(torch.multiprocessing.spawn, command.check_start, (arguments,))
    monkeypatch.setattr(command, "launch", lambda *_, **__: work())
    if not mistake:
        with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="AttributeError"):
            run(config, tmp_path / "out")
        return
    assert run(config, tmp_path / "out") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: --num-gpus is -3: give the number")


def test_detectron2_command_finds_shipped_recipes_from_any_folder(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--eval-only", "SOLVER.MAX_ITER", 1, "MODEL.WEIGHTS", tmp_path / "initial.pth", "TEST.PICTURES", 0]
    recipe = "configs/quickstart/shapes_panoptic.yaml"
    model = build_model(get_cfg(recipe, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))
    save_model(tmp_path / "initial.pth", model=model)
    assert run(Path(recipe), tmp_path / "out", *words) == 0
    assert (tmp_path / "out" / "config.yaml").is_file()


def test_detectron2_seeds_are_drawn_where_none_is_given(config: Path) -> None:
    cfg = build_config(str(config), ["SEED", -1])
    drawn = training.with_seed(cfg).SEED
    assert drawn >= 0
    assert cfg.SEED == -1
    assert training.with_seed(build_config(str(config), ["SEED", 4])).SEED == 4


def test_detectron2_clipping_knows_scaled_gradients() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((parameter * torch.tensor([3.0, 4.0])).sum()).backward()
    hook = training.ClippingHook(lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.5), [parameter])
    hook.trainer = SimpleNamespace(grad_scaler=scaler, optimizer=optimizer)
    hook.after_backward()
    torch.testing.assert_close(parameter.grad, torch.tensor([0.3, 0.4]))
    scaler.step(optimizer)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.3, -0.4]))


def test_detectron2_schedules_of_its_own_are_taken_too(config: Path) -> None:
    cfg = build_config(str(config), ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    assert "detectron2" in type(Trainer.build_lr_scheduler(cfg, optimizer)).__module__


def test_detectron2_tool_runs_as_written(config: Path, tmp_path: Path) -> None:
    """The script, in a process of its own, on data sets that Detectron2 has registered itself."""
    make_miniature("ade20k", tmp_path / "data")
    words = ["DATASETS.TRAIN", "('ade20k_sem_seg_train',)", "DATASETS.TEST", "('ade20k_sem_seg_val',)"]
    words += ["INPUT.DATASET_MAPPER_NAME", "mask_former_semantic", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False"]
    words += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "150", "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(tmp_path / "out")]
    line = [sys.executable, "tools/train_net_detectron2.py", "--config-file", str(config), "--num-gpus", "0", *words]
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    # The second goes on from model_final.pth and overwrites it in place.
    for more in ([], ["--resume", "SOLVER.MAX_ITER", "3"]):
        whole = [*line[:6], *more[:1], *line[6:], *more[1:]]
        result = subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
    assert checkpoint(tmp_path / "out" / "model_final.pth")["iteration"] == 2
    last = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert "sem_seg/mIoU" in last
    assert "ade20k_sem_seg_val" in DatasetCatalog
    assert MetadataCatalog.get("ade20k_sem_seg_val").evaluator_type == "sem_seg"

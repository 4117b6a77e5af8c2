"""One meaning of a config: several processes, micro-batches and restarts train the same as one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from maskformer.data.catalog import get_dataset
from maskformer.data.image_io import read_image, read_label_map
from maskformer.engine import main
from maskformer.engine.resume import find_restart, start_run

REPOSITORY = Path(__file__).parents[2]

# No chance inside the model, and the learning rate of the recipes: a much higher one lets rounding decide which of two
# nearly equal queries is matched, and then no two ways of adding up the same numbers agree for long.
CONFIG = """
MODEL:
  DEVICE: cpu
  RESNETS: {DEPTH: 18}
  SEM_SEG_HEAD: {NUM_CLASSES: 5, CONVS_DIM: 32, MASK_DIM: 32}
  MASK_FORMER:
    {HIDDEN_DIM: 32, NHEADS: 2, DIM_FEEDFORWARD: 32, DEC_LAYERS: 2, NUM_OBJECT_QUERIES: 8, DROPOUT: 0.0}
INPUT:
  MIN_SIZE_TRAIN: [64, 80]
  CROP: {ENABLED: True, TYPE: absolute, SIZE: [64, 64]}
  SIZE_DIVISIBILITY: 64
SOLVER: {IMS_PER_BATCH: 4, BASE_LR: 0.0001, MAX_ITER: 10, CHECKPOINT_PERIOD: 4, STEPS: [100]}
DATALOADER: {NUM_WORKERS: 0}
LOG_PERIOD: 1
SEED: 3
"""
PER_PIXEL = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"]
# AdamW and clipping do not care for the scale of gradients; this does.
SGD = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.ENABLED", "False", "SOLVER.BASE_LR", "0.002"]
MODELS: dict[str, list[str]] = {"mask": [], "pixel": PER_PIXEL, "sgd": SGD}
DROPOUT = ["MODEL.MASK_FORMER.DROPOUT", "0.1"]
ACCUMULATE = "SOLVER.MAX_IMS_PER_DEVICE"


def make_data(root: Path) -> None:
    """Scenes of `shapes` as a data set of files; every third image has no segment."""
    dataset = get_dataset("shapes_semantic_train")
    for number in range(9):
        record = dataset.records[number]
        image = read_image(record["file_name"], "BGR")
        labels = np.array(read_label_map(record["sem_seg_file_name"])).astype(np.uint8)
        if number % 3 == 0:
            labels[:] = 255
        for kind, picture in (("images", image), ("masks", labels)):
            (root / kind / "train").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / kind / "train" / f"{number}.png"), picture)
    names = ", ".join(dataset.metadata.classes)
    (root / "dataset.yaml").write_text(f"classes: [{names}]\nignore_label: 255\n")
    (root / "config.yaml").write_text(f"{CONFIG}DATASETS: {{TRAIN: ['folder:{root}:train']}}\n")


# In each process: all commands, one after another; importing PyTorch takes longer than any of them.
SEVERAL = """
import json, os, sys
from maskformer.engine import main
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # in torchrun's store, processes can meet once only
for words in json.load(open(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    if main.main(words) != 0:
        sys.exit("failed: " + " ".join(words))
"""


def torchrun(script: Path, *words: Any, processes: int = 2, restarts: int = 0) -> tuple[int, str]:
    """Exit code and output of a script in several processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return execute([*command, "--max-restarts", restarts, script, *words])


def execute(command: list[Any]) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [str(word) for word in command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=150
    )
    return finished.returncode, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the outputs of all runs, by name; those called ``two_…`` or ``three_…`` are of as many processes."""
    root = tmp_path_factory.mktemp("runs")
    make_data(root)

    def words(name: str, *overrides: str, resume: bool = False) -> list[str]:
        start = ["--config-file", str(root / "config.yaml"), *(["--resume"] if resume else [])]
        return [*start, *overrides, "OUTPUT_DIR", str(root / name)]

    first_part = ["SOLVER.MAX_ITER", "4"]
    alone = [words("changed", *first_part)]
    for name, model in MODELS.items():
        alone += [words(f"one_{name}", *model), words(f"accumulated_{name}", *model, ACCUMULATE, "2")]
    for command in alone:
        assert main.main(command) == 0
    together = [words("changed", resume=True)]
    for name, model in MODELS.items():
        together += [words(f"two_{name}", *model), words(f"two_accumulated_{name}", *model, ACCUMULATE, "1")]
    # Three numbers, unlike two, have more than one sum.
    threefold = [*DROPOUT, "SOLVER.IMS_PER_BATCH", "3"]
    exact = [words("three_dropout", *threefold), words("three_resumed", *threefold, *first_part)]
    exact += [words("three_resumed", *threefold, resume=True)]
    (root / "several.py").write_text(SEVERAL)
    for processes, commands in ((2, together), (3, exact)):
        (root / "commands.json").write_text(json.dumps(commands))
        code, output = torchrun(root / "several.py", root / "commands.json", processes=processes)
        assert code == 0, output
    return root


def losses(output: Path) -> dict[int, dict[str, float]]:
    """Every loss of every iteration; what a resumed run did anew counts."""
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {row["iteration"]: {k: v for k, v in row.items() if "loss" in k} for row in rows if "total_loss" in row}


def final(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(output / "model_final.pth", weights_only=True)
    return content


def assert_same_training(one: Path, other: Path, iterations: int = 10) -> None:
    expected, found = losses(one), losses(other)
    assert sorted(expected) == sorted(found) == list(range(iterations))
    for iteration, terms in expected.items():
        assert found[iteration] == pytest.approx(terms, rel=5e-4), iteration
    weights, others = final(one)["model"], final(other)["model"]
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["two", "accumulated", "two_accumulated"])
def test_the_same_config_trains_the_same_however_it_is_spread(runs: Path, way: str, model: str) -> None:
    assert len({row["total_loss"] for row in losses(runs / f"one_{model}").values()}) == 10  # it does train
    assert_same_training(runs / f"one_{model}", runs / f"{way}_{model}")


def test_the_log_of_the_main_process_tells_how_the_batch_is_spread(runs: Path) -> None:
    log = (runs / "two_accumulated_mask" / "log.txt").read_text()
    assert "4 images per iteration = 2 processes x 2 micro-batches x 1" in log
    assert "gradients over gloo" in log
    assert log.count("iter: 9 ") == 1
    assert "forward_time: " in log
    assert "matching_time: " in log
    assert "iter: 9 " not in (runs / "two_accumulated_mask" / "log.txt.rank1").read_text()


def test_resume_with_another_number_of_processes_goes_on_with_the_same_images(runs: Path) -> None:
    assert "the run had 1 processes and has 2 now" in (runs / "changed" / "log.txt").read_text()
    assert_same_training(runs / "one_mask", runs / "changed")  # the losses are those of the same images
    assert final(runs / "changed")["position"] == final(runs / "one_mask")["position"] == 40


def test_resume_with_as_many_processes_is_exact(runs: Path) -> None:
    """With dropout, so that the random state of each process matters."""
    assert losses(runs / "three_resumed") == losses(runs / "three_dropout")
    whole, resumed = final(runs / "three_dropout"), final(runs / "three_resumed")
    for name, tensor in whole["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name
    first, second, _ = (state["torch"] for state in whole["rng"])
    assert not torch.equal(first, second)


# Kills the second process with SIGKILL: after iteration 6, and once more in the first step after the restart.
KILLER = """
import os, signal, sys
from maskformer.engine import main, trainer
step = trainer.Trainer.step
def dying(self):
    step(self)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if os.environ["RANK"] == "1" and (attempt, self.iteration) in ((0, 6), (1, 4)):
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Trainer.step = dying
sys.exit(main.main())
"""


def test_a_killed_process_is_started_again_and_only_the_steps_since_the_checkpoint_are_done_anew(
    runs: Path, tmp_path: Path
) -> None:
    script, output = tmp_path / "killer.py", tmp_path / "killed"
    script.write_text(KILLER)
    output.mkdir()
    # A checkpoint of an earlier run in the folder is not what a restart goes on from.
    (output / "model_0000008.pth").write_bytes((runs / "one_mask" / "model_0000007.pth").read_bytes())
    arguments = ["--config-file", runs / "config.yaml", "OUTPUT_DIR", output]
    code, text = torchrun(script, *arguments, restarts=2)
    assert code == 0, text
    log = (output / "log.txt").read_text()
    assert "restarted, resuming from" in log
    assert "model_0000003.pth, 4 iterations done" in log
    # Whether the main process came to log the iterations of the two failures, 6 and 4, is left to chance.
    counts = {iteration: log.count(f"iter: {iteration} ") for iteration in (0, 1, 2, 3, 5, 7, 8, 9)}
    assert counts == {0: 1, 1: 1, 2: 1, 3: 1, 5: 2, 7: 1, 8: 1, 9: 1}
    assert log.count("restarted, resuming from") == 2
    assert "Traceback" not in text
    assert_same_training(runs / "one_mask", output)
    assert final(output)["iteration"] == 9


def test_a_new_run_in_the_folder_of_an_earlier_one_does_not_restart_from_its_checkpoints(
    runs: Path, tmp_path: Path
) -> None:
    for name in ("model_final.pth", "last_checkpoint", "run_id"):
        (tmp_path / name).write_bytes((runs / "one_mask" / name).read_bytes())
    assert find_restart(tmp_path) is not None
    start_run(tmp_path, None)
    assert find_restart(tmp_path) is None


def test_our_own_launcher_trains_and_tells_mistakes_once_without_a_traceback(runs: Path, tmp_path: Path) -> None:
    start = [sys.executable, "tools/train_net.py", "--num-gpus", 2, "--config-file", runs / "config.yaml"]
    code, text = execute([*start, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "out"])
    assert code == 0, text
    assert "2 processes x 2" in text
    assert "config: " in (tmp_path / "out" / "log.txt").read_text()
    assert len(losses(tmp_path / "out")) == 1
    (tmp_path / "dataset.yaml").write_text("classes: [a, b, c, d, e]\n")
    code, text = execute([*start, "DATASETS.TRAIN", f"('folder:{tmp_path}:train',)", "OUTPUT_DIR", tmp_path / "broken"])
    assert code == 2, text
    assert text.count("error: ") == 1, text
    assert "Traceback" not in text


def test_processes_of_different_configs_are_refused(runs: Path, tmp_path: Path) -> None:
    script = tmp_path / "own_config.py"
    script.write_text(
        "import os, sys\nfrom maskformer.engine import main\n"
        "sys.exit(main.main([*sys.argv[1:], 'SOLVER.BASE_LR', '0.' + os.environ['RANK'] + '1']))\n"
    )
    code, text = torchrun(script, "--config-file", runs / "config.yaml", "OUTPUT_DIR", tmp_path / "out")
    assert code != 0
    assert text.count("error: SOLVER.BASE_LR is 0.01 in process 0 but 0.11 in process 1; start all") == 1, text


def start(runs: Path, output: Path, *words: Any, **variables: str) -> subprocess.Popen[str]:
    """A process that others are started beside; output goes where `finish` finds it."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "tools/train_net.py", "--config-file", runs / "config.yaml", *words]
    command += ["SOLVER.MAX_ITER", 1, "OUTPUT_DIR", output]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, env=environment, text=True, **pipes)  # type: ignore[call-overload]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Their output, once all have ended well."""
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), texts
    return texts


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


def test_slurm_tasks_are_the_processes_of_a_run(runs: Path, tmp_path: Path) -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    slurm |= {"MASTER_PORT": str(free_port()), "SLURM_NODEID": "0"}
    tasks = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    first, second = finish([start(runs, tmp_path / "out", **slurm, **task) for task in tasks])
    assert "2 processes x 2" in first
    assert "iter: 0" not in second
    assert losses(tmp_path / "out")[0] == pytest.approx(losses(runs / "one_mask")[0], rel=5e-4)


def test_two_machines_meet_at_the_address_of_the_first(runs: Path, tmp_path: Path) -> None:
    together = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    machines = [start(runs, tmp_path / "out", *together, "--machine-rank", rank) for rank in range(2)]
    first, second = finish(machines)
    assert "2 processes x 2" in first
    assert "iter: 0" not in second
    assert losses(tmp_path / "out")[0] == pytest.approx(losses(runs / "one_mask")[0], rel=5e-4)

"""Detectron2's loop in two processes: the gradients are those of one process with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import maskformer

REPOSITORY = Path(maskformer.__file__).parents[1]
WORKER = """
import sys
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils import comm
import maskformer
from maskformer.checkpoint import published_state_dict
from maskformer.integrations.detectron2 import add_maskformer_config
from maskformer.integrations.detectron2.weights import published_names
from maskformer.structures import SegmentMap

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
comm.create_local_process_group(2)
settings = ["MODEL.DEVICE", "cpu", "MODEL.CHANNELS_LAST", False, "DATASETS.TRAIN", (), "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5,
            "MODEL.MASK_FORMER.DROPOUT", 0.0, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.MASK_DIM", 32,
            "MODEL.MASK_FORMER.HIDDEN_DIM", 32,
            "MODEL.MASK_FORMER.DEC_LAYERS", 2, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 7]
samples = []
for classes in (5, 2):  # more segments, and more supervised pixels, in one process than in the other
    labels = torch.randint(0, classes, (4, 4)).repeat_interleave(16, 0).repeat_interleave(16, 1)
    labels[:, :16 * (5 - classes)] = 255
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    segments = SegmentMap.from_label_map(labels, 255)
    samples.append({"image": image, "sem_seg": labels, "segments": segments})
for recipe in sys.argv[1:]:
    native = maskformer.build_model(maskformer.get_cfg(recipe, settings))
    cfg = get_cfg()
    add_maskformer_config(cfg)
    cfg.merge_from_file(recipe)
    cfg.merge_from_list(settings)
    model = build_model(cfg)
    published = published_state_dict(native)
    published.pop("criterion.empty_weight", None)
    model.load_state_dict(published)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    sum(parallel([samples[comm.get_rank()]]).values()).backward()
    sum(native(samples).values()).backward()
    own = model.state_dict(keep_vars=True)
    parameters = dict(native.named_parameters())
    for name, outside in published_names(parameters).items():
        expected = parameters[name].grad
        difference = (own[outside].grad - expected).abs().max()
        assert difference <= 1e-4 * expected.abs().max() + 1e-7, (recipe, outside, difference)
    print("SAME", recipe)
torch.distributed.destroy_process_group()
"""
RECIPES = (
    "configs/ade20k-150/maskformer_R50_bs16_160k.yaml",
    "configs/ade20k-150/per_pixel_baseline_R50_bs16_160k.yaml",
)


def test_detectron2_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text("import torch\ntorch.manual_seed(0)\n" + WORKER)
    workers = []
    for rank in range(2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        workers.append(
            subprocess.Popen(
                [sys.executable, str(script), *RECIPES],
                env={**os.environ, **place, "PYTHONPATH": paths},
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for worker in workers:
            output, errors = worker.communicate(timeout=200)
            assert worker.returncode == 0, errors[-2000:]
            assert output.splitlines() == [f"SAME {recipe}" for recipe in RECIPES]
    finally:
        for worker in workers:
            worker.kill()

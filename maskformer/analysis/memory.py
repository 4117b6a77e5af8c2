"""The most memory that a training step needs, measured in a process of their own so that nothing else is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode

from maskformer.config import dump
from maskformer.data.transforms import Size
from maskformer.errors import UserError

SEGMENTS = 10
LIMIT_EXCEEDED = 75  # exit codes of the process that measures
USER_ERROR = 2
GIB = 2**30


class TrainingMemory(NamedTuple):
    """Peak of a training step.

    Attributes:
        peak: bytes above what the libraries take: weights, gradients, the optimizer's state and activations. On the
            CPU memory of the process (resident set), on CUDA what torch has allocated.
        device: "cpu", or the GPU's name.
        size: (H, W) of the images.
        batch: images in a step.
        seconds: of the step.
    """

    peak: int
    device: str
    size: Size
    batch: int
    seconds: float


def available_memory() -> int:
    """Bytes that this machine can still give, or all it has where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_training_memory(
    cfg: CfgNode, size: Size, *, batch: int, segments: int = SEGMENTS, limit: int | None = None, threads: int = 1
) -> TrainingMemory:
    """Trains a step on noise with the config's optimizer and precision, in a fresh process.

    Args:
        cfg: of the recipe; ``MODEL.DEVICE`` says where.
        size: (H, W) of the images.
        batch: images in a step.
        segments: per image.
        limit: bytes the process may have in all on the CPU; it ends when it has more. None: nine tenths of what is
            available.
        threads: of torch on the CPU; more of them need a little more memory.

    Raises:
        UserError: if the machine has too little memory, or the config cannot be trained.
    """
    limit = limit if limit is not None else available_memory() * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        config = Path(folder) / "config.yaml"
        config.write_text(dump(cfg), encoding="utf-8")
        request = {"config": str(config), "size": size, "batch": batch, "segments": segments, "limit": limit}
        job.write_text(json.dumps({**request, "threads": threads}), encoding="utf-8")
        command = [sys.executable, "-m", "maskformer.analysis.memory_probe", str(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == LIMIT_EXCEEDED or done.returncode == -9:
        height, width = size
        raise UserError(
            f"A training step of {batch} {'image' if batch == 1 else 'images'} of {width}x{height} needs more than the "
            f"{limit / GIB:.1f} GiB it may have: give a smaller --batch or --size, or a larger --memory-limit"
        )
    if done.returncode == USER_ERROR:
        raise UserError(_last_line(done.stderr))
    if done.returncode:
        raise UserError(f"The training step failed, so its memory is not known: {_last_line(done.stderr)}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return TrainingMemory(answer["peak"], answer["device"], size, batch, answer["seconds"])


def _last_line(errors: str) -> str:
    """The last line of what the process said, which is its error."""
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"

"""The process that `measure_training_memory` starts: a training step on noise, then the peak as a line of JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from maskformer.analysis.inputs import random_samples
from maskformer.analysis.memory import LIMIT_EXCEEDED, USER_ERROR
from maskformer.build import build_model_to_fill
from maskformer.config import get_cfg
from maskformer.engine.device import amp_dtype
from maskformer.engine.optimizer import build_clipper, build_optimizer
from maskformer.engine.trainer import Precision, Trainer
from maskformer.errors import UserError

INTERVAL = 0.02  # seconds between two looks at the memory


class SameBatch:
    """An endless stream of one batch.

    Args:
        samples: the batch.
    """

    position = 0
    epoch_length = 1

    def __init__(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Sequence[Mapping[str, Any]]]:
        """Itself."""
        return self

    def __next__(self) -> Sequence[Mapping[str, Any]]:
        """The batch."""
        return self.samples

    def close(self) -> None:
        """Nothing to give back."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the file in the first argument asks for, and print it."""
    job = json.loads(Path((sys.argv[1:] if argv is None else argv)[0]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    cfg = get_cfg(job["config"])
    watch(job["limit"])
    before = peak_memory()
    try:
        device, seconds = train(cfg, job)
    except torch.OutOfMemoryError:
        return LIMIT_EXCEEDED
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return USER_ERROR
    if device.type == "cuda":
        answer = {"peak": torch.cuda.max_memory_allocated(device), "device": torch.cuda.get_device_name(device)}
    else:
        answer = {"peak": peak_memory() - before, "device": device.type}
    print(json.dumps({**answer, "seconds": seconds}))  # noqa: T201
    return 0


def train(cfg: Any, job: Mapping[str, Any]) -> tuple[torch.device, float]:
    """A step as any but the first; returns where it ran, and its seconds."""
    torch.manual_seed(0)
    model = build_model_to_fill(cfg)
    optimizer = build_optimizer(cfg, model)
    make_state(optimizer)
    height, width = job["size"]
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    samples = random_samples((height, width), job["batch"], classes=classes, segments=job["segments"])
    trainer = Trainer(
        model,
        optimizer,
        LambdaLR(optimizer, lambda step: 1.0),
        SameBatch(samples),
        max_iterations=1,
        clip=build_clipper(cfg),
        precision=Precision(model.device, cfg.SOLVER.AMP.ENABLED, amp_dtype(cfg.SOLVER.AMP.DTYPE, model.device)),
    )
    trainer.train()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return model.device, trainer.step_time


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its moments, which in training the first step does for all that follow."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_memory() -> int:
    """Most bytes this process has had at once.

    Linux tells it per program; what `getrusage` tells is inherited from the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def watch(limit: int) -> None:
    """End this process, from a thread of its own, when it has had more than `limit` bytes: before others suffer."""

    def look() -> None:
        while peak_memory() <= limit:
            time.sleep(INTERVAL)
        os._exit(LIMIT_EXCEEDED)

    threading.Thread(target=look, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())

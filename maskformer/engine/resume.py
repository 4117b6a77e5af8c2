"""Stopping and going on: what a checkpoint of a run holds, and how a run takes it up again."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import maskformer
from maskformer.checkpoint import load_checkpoint, restore_model, save_checkpoint
from maskformer.config.tree import flatten
from maskformer.engine.device import rng_state, set_rng_state
from maskformer.engine.optimizer import load_optimizer_state
from maskformer.engine.trainer import Precision, Trainer

logger = logging.getLogger(__name__)

# Keys that change where and how a run is watched, not what it computes.
_WITHOUT_EFFECT = (
    "OUTPUT_DIR",
    "LOG_PERIOD",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.MASK_FORMER.TEST.",
    "DATASETS.TEST",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.PREFETCH_FACTOR",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "SOLVER.CHECKPOINT_PERIOD",
    "CHECKPOINT.",
    "TEST.",
)


class CheckpointSaver:
    """Writes checkpoints that a run can be resumed from.

    Args:
        config_text: of the run, as YAML.
        metadata: of the training data set, so that a model file alone suffices to predict.
        folder: ``OUTPUT_DIR``.
        keep_last: how many numbered checkpoints stay; 0 for all.
    """

    def __init__(self, config_text: str, metadata: Any, folder: Path, keep_last: int) -> None:
        self.config_text = config_text
        self.metadata = metadata
        self.folder = folder
        self.keep_last = keep_last

    def __call__(self, trainer: Trainer, name: str) -> None:
        """Save the state after the step just done as `name`."""
        path = save_checkpoint(
            self.folder,
            trainer.iteration,
            model=trainer.model,
            optimizer=trainer.optimizer,
            scheduler=trainer.scheduler,
            scaler=trainer.precision.scaler,
            rng=[rng_state()],
            position=trainer.batches.position,
            config_text=self.config_text,
            metadata=self.metadata,
            versions=versions(),
            name=name,
            keep_last=self.keep_last,
        )
        logger.info("checkpoint: %s", path)


class Resumption:
    """A checkpoint that a run goes on from.

    Args:
        path: of the checkpoint.
        checkpoint: its content.
    """

    def __init__(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.saved_config = flat_config(checkpoint["config"])

    def __str__(self) -> str:
        return f"{self.path}, with the state of its optimizer"

    @classmethod
    def read(cls, path: Path) -> Resumption:
        """Read a checkpoint file.

        Raises:
            UserError: if it is missing, damaged, or only weights.
        """
        return cls(path, load_checkpoint(path))

    @property
    def start_iteration(self) -> int:
        """Number of steps done."""
        return int(self.checkpoint["iteration"]) + 1

    @property
    def position(self) -> int:
        """Of the training data."""
        return int(self.checkpoint["position"])

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: Precision) -> None:
        """Give model, optimizer and gradient scaler the saved state; the schedule follows from the iteration.

        Raises:
            UserError: if the checkpoint is of another model or optimizer.
        """
        restore_model(model, self.checkpoint, self.path)
        load_optimizer_state(optimizer, self.checkpoint["optimizer"])
        if precision.scaler.is_enabled() and self.checkpoint["scaler"]:
            precision.scaler.load_state_dict(dict(self.checkpoint["scaler"]))

    def restore_rng(self) -> None:
        """Set the random generators; the last thing before training, since building things draws numbers."""
        if self.checkpoint["rng"]:
            set_rng_state(self.checkpoint["rng"][0])

    @property
    def seed(self) -> int:
        """``SEED`` of the interrupted run."""
        return int(self.saved_config.get("SEED", 0))

    def differences(self, config_text: str) -> list[str]:
        """Keys with an effect on training whose value is not that of the interrupted run, as ``KEY (old → new)``.

        Args:
            config_text: the present config, as YAML.
        """
        old, new = self.saved_config, flat_config(config_text)
        return [
            f"{key} ({old.get(key)!r} → {new.get(key)!r})"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(_WITHOUT_EFFECT)
        ]


def flat_config(text: str) -> dict[str, Any]:
    """A config written by `dump`, dotted key to value."""
    return dict(flatten(yaml.safe_load(text) or {}))


def versions() -> dict[str, str]:
    """Versions of what computes the numbers of a run."""
    return {
        "maskformer": maskformer.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }

"""Stopping and going on: what a checkpoint of a run holds, and how a run takes it up again."""

from __future__ import annotations

import logging
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import maskformer
from maskformer import distributed
from maskformer.checkpoint import FINAL_NAME, find_last_checkpoint, load_checkpoint, restore_model, save_checkpoint
from maskformer.checkpoint.files import read_torch_file, recognise, write_text
from maskformer.checkpoint.training import KEYS, LAST_NAME
from maskformer.config import dump, get_cfg
from maskformer.config.tree import flatten
from maskformer.engine.averaging import WeightAverage
from maskformer.engine.best import Best
from maskformer.engine.device import rng_state, seed_of_process, set_rng_state
from maskformer.engine.optimizer import load_optimizer_state
from maskformer.engine.trainer import Precision, Trainer
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

BEST_NAME = "model_best.pth"
EMA_NAME = "model_final_ema.pth"
EMA_PREFIX = "ema/"
"""Of the scores of averaged weights."""
RUN_ID_NAME = "run_id"

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
    "SOLVER.EARLY_STOPPING.",
    "SOLVER.MAX_IMS_PER_DEVICE",
    "CHECKPOINT.",
    "TEST.",
    "WANDB_PROJECT",
    "DISTRIBUTED_TIMEOUT",
)


class CheckpointSaver:
    """Writes checkpoints that a run can be resumed from.

    Args:
        config_text: of the run, as YAML.
        metadata: of the training data set, so that a model file alone suffices to predict.
        folder: ``OUTPUT_DIR``.
        keep_last: how many numbered checkpoints stay; 0 for all.
        run_id: of the run, see `start_run`.
        average: of the weights, kept in the checkpoints and as ``model_final_ema.pth``.
    """

    def __init__(
        self,
        config_text: str,
        metadata: Any,
        folder: Path,
        keep_last: int,
        *,
        run_id: str = "",
        average: WeightAverage | None = None,
    ) -> None:
        self.config_text = config_text
        self.metadata = metadata
        self.folder = folder
        self.keep_last = keep_last
        self.run_id = run_id
        self.average = average

    def __call__(self, trainer: Trainer, name: str) -> None:
        """Save the state after the step just done as `name`; called by all processes, written by the main one."""
        distributed.broadcast_buffers(trainer.model)
        state = {
            "model": trainer.model,
            "optimizer": trainer.optimizer,
            "scheduler": trainer.scheduler,
            "scaler": trainer.precision.scaler,
            "rng": distributed.gather_to_main(rng_state()),
            "position": trainer.batches.position,
            "keep_last": self.keep_last,
        }
        extra = {} if self.average is None else {"ema": self.average.state_dict()}
        path = distributed.on_main(lambda: self._write(trainer.iteration, name, extra, **state))
        logger.info("checkpoint: %s", path)
        if name == FINAL_NAME and self.average is not None:
            self.save_weights(trainer, EMA_NAME, self.average.model)

    def save_weights(
        self, trainer: Trainer, name: str, model: torch.nn.Module, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Save weights alone, with what is needed to use them, but not to resume from them."""
        distributed.broadcast_buffers(model)
        path = distributed.on_main(lambda: self._write(trainer.iteration, name, extra or {}, model=model, newest=False))
        logger.info("weights: %s", path)

    def save_best(self, trainer: Trainer, best: Best) -> None:
        """Save the weights that `best` is about as ``model_best.pth``."""
        averaged = best.metric.startswith(EMA_PREFIX) and self.average is not None
        model = self.average.model if averaged and self.average is not None else trainer.model
        self.save_weights(trainer, BEST_NAME, model, {"best": best._asdict()})

    def _write(self, iteration: int, name: str, extra: Mapping[str, Any], **state: Any) -> Path:
        return save_checkpoint(
            self.folder,
            iteration,
            name=name,
            config_text=self.config_text,
            metadata=self.metadata,
            versions=versions(),
            extra={"run_id": self.run_id, "world_size": distributed.world_size(), **extra},
            **state,
        )


def start_run(folder: Path, resumption: Resumption | None) -> str:
    """The name by which a run knows its own checkpoints: a new one, or that of the run that is resumed.

    It is kept in the file ``run_id``, so that a restart after a failure goes on from a checkpoint of this run, never
    from one of an earlier run in the same folder.
    """
    run_id = distributed.broadcast((resumption.run_id if resumption else "") or uuid.uuid4().hex[:12])
    distributed.on_main(lambda: write_text(folder / RUN_ID_NAME, run_id))
    return run_id


def find_resumable(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, for ``--resume``; None if there is none.

    Raises:
        UserError: if there are checkpoints but none can be read, or if Detectron2 has gone on in the folder: its
            checkpoint cannot be resumed from, and an older one of ours would silently undo its steps.
    """
    pointer = folder / LAST_NAME
    newest = folder / Path(pointer.read_text(errors="replace").strip()).name if pointer.is_file() else folder
    if newest.is_file() and _is_of_detectron2(newest):
        raise UserError(
            f"{newest}, the newest checkpoint there, is one of a run of Detectron2: go on with "
            "tools/train_net_detectron2.py --resume, or start a run in another OUTPUT_DIR with MODEL.WEIGHTS set to it"
        )
    return find_last_checkpoint(folder)


def _is_of_detectron2(path: Path) -> bool:
    """Whether a file has the state of a run, but not as ours have it; read without its tensors."""
    try:
        content = read_torch_file(path, mapped=True) if recognise(path) == "torch" else None
    except UserError:  # damaged: `find_last_checkpoint` says so
        return False
    if not isinstance(content, dict) or set(KEYS) <= content.keys():
        return False
    return {"model", "iteration"} <= content.keys() or {"model", "trainer"} <= content.keys()


def find_restart(folder: Path) -> Path | None:
    """The newest checkpoint of the run that was going on in a folder when it failed; None if it had none yet."""
    pointer = folder / RUN_ID_NAME
    path = find_last_checkpoint(folder) if pointer.is_file() else None
    if path is None or Resumption.read(path).run_id != pointer.read_text(encoding="utf-8"):
        return None
    return path


def find_best(folder: Path, run_id: str) -> Best | None:
    """The best evaluation of a run that is resumed, kept with its weights; None if there was none."""
    path = folder / BEST_NAME
    if not path.is_file():
        return None
    extra = load_checkpoint(path)["extra"]
    return Best(**extra["best"]) if extra.get("run_id") == run_id and "best" in extra else None


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
    def run_id(self) -> str:
        """Of the interrupted run; empty in checkpoints of earlier versions."""
        return str(self.checkpoint["extra"].get("run_id", ""))

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

    def restore_average(self, average: WeightAverage) -> None:
        """Give a moving average its saved state, or start it from the weights if the run had none."""
        saved = self.checkpoint["extra"].get("ema")
        if saved is None:
            logger.warning("%s has no average of its weights; SOLVER.EMA starts from the weights themselves", self.path)
        else:
            average.load_state_dict(saved)

    def restore_rng(self) -> None:
        """Set the random generators; the last thing before training, since building things draws numbers.

        With another number of processes than before, no state fits, and each gets a new one.
        """
        states, rank = self.checkpoint["rng"], distributed.rank()
        if len(states) == distributed.world_size():
            set_rng_state(states[rank])
        elif states:
            logger.info("the run had %d processes and has %d now", len(states), distributed.world_size())
            torch.manual_seed(seed_of_process(self.seed, rank, self.start_iteration))

    @property
    def seed(self) -> int:
        """``SEED`` of the interrupted run."""
        return int(self.saved_config.get("SEED", 0))

    def differences(self, config_text: str) -> list[str]:
        """Keys with an effect on training whose value is not that of the interrupted run, as ``KEY (old → new)``.

        Args:
            config_text: the present config, as YAML.
        """
        # A key that came later meant its default.
        old, new = {**flat_config(dump(get_cfg())), **self.saved_config}, flat_config(config_text)
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

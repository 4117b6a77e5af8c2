"""Detectron2's `DefaultTrainer` with our optimizer groups, clipping, schedule, data and evaluators."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine import hooks as detectron2_hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler
from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskformer.build import synchronize_norms
from maskformer.checkpoint import layouts
from maskformer.data.loading import TrainLoader
from maskformer.engine.device import amp_dtype
from maskformer.engine.evaluating import check_test_sets
from maskformer.engine.optimizer import Clipper, build_clipper, build_optimizer, load_optimizer_state
from maskformer.engine.schedule import build_scheduler
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import catalog, data, evaluation
from maskformer.integrations.detectron2.validation import check_values
from maskformer.integrations.detectron2.weights import MaskFormerCheckpointer

logger = logging.getLogger(__name__)

OWN_SCHEDULES = ("WarmupPolyLR", "WarmupMultiStepLR")
NATIVE_ONLY = {
    "SOLVER.EMA.ENABLED": False,
    "SOLVER.EARLY_STOPPING.PATIENCE": 0,
    "CHECKPOINT.KEEP_LAST": 0,
    "CHECKPOINT.BEST_METRIC": "",
    "WANDB_PROJECT": "",
}
"""Keys that nothing reads here, with the value that they may have."""


class ClippingHook(HookBase):
    """Clips gradients between backward pass and optimizer step, also scaled ones of mixed precision.

    Args:
        clip: what to do with the gradients.
        parameters: that have them.
    """

    def __init__(self, clip: Clipper, parameters: Sequence[nn.Parameter]) -> None:
        self.clip = clip
        self.parameters = parameters

    def after_backward(self) -> None:
        """Called by the loop that has optimizer and scaler (`SimpleTrainer`)."""
        scaler = getattr(self.trainer, "grad_scaler", None)
        if scaler is not None:
            scaler.unscale_(self.trainer.optimizer)
        self.clip(self.parameters)


class Trainer(DefaultTrainer):
    """Trains the models of this integration as `tools/train_net.py` does, within Detectron2's loop, hooks and logs.

    Args:
        cfg: a Detectron2 config with our keys (`add_maskformer_config`).

    Raises:
        UserError: if the config asks for something that only `tools/train_net.py` does, or cannot be trained.
    """

    def __init__(self, cfg: Any) -> None:
        check_config(cfg, comm.get_world_size())
        check_test_data(cfg)
        super().__init__(with_seed(cfg))
        self.seed = int(self.cfg.SEED)
        clip = build_clipper(cfg)
        if clip is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            # The inner trainer's hook: only that one runs between backward pass and step.
            self._trainer.register_hooks([ClippingHook(clip, trained)])
        if cfg.SOLVER.AMP.ENABLED:
            dtype = amp_dtype(cfg.SOLVER.AMP.DTYPE, torch.device("cuda"))
            self._trainer.precision = dtype or torch.float16

    # ---------------------------------------------------------------- parts
    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """Detectron2's, with batch norms over all processes if ``MODEL.SYNC_BN`` says so."""
        model: nn.Module = super().build_model(cfg)
        synchronize_norms(cfg, model, torch.device(cfg.MODEL.DEVICE))
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> Optimizer:
        """Our groups of learning rate and weight decay."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: Any, optimizer: Optimizer) -> LRScheduler:
        """Our schedule, or Detectron2's where its name is not one of ours."""
        if cfg.SOLVER.LR_SCHEDULER_NAME in OWN_SCHEDULES:
            return build_scheduler(cfg, optimizer)
        scheduler: LRScheduler = build_detectron2_scheduler(cfg, optimizer)
        return scheduler

    @classmethod
    def build_train_loader(cls, cfg: Any, start_position: int = 0) -> TrainLoader | data.LabelledBatches:
        """The samples of a native run, in its order; see `data.build_train_loader`."""
        return data.build_train_loader(cfg, start_position)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """See `data.build_test_loader`."""
        return data.build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> DatasetEvaluator:
        """Our evaluators; `evaluation.build_detectron2_evaluator` has Detectron2's own."""
        return evaluation.build_evaluator(cfg, dataset_name)

    @classmethod
    def test_with_TTA(cls, cfg: Any, model: nn.Module) -> Mapping[str, Any]:  # noqa: N802 - Detectron2's name for it
        """Semantic metrics with test-time augmentation, as ``TEST.AUG`` says; names end in ``_TTA``."""
        logger.info("evaluating with test-time augmentation, at %d sizes", len(cfg.TEST.AUG.MIN_SIZES))
        augmented = evaluation.build_augmented_evaluation(cfg, getattr(model, "module", model))
        evaluators = [
            evaluation.build_evaluator(cfg, name, folder_name="inference_TTA", tasks=("sem_seg",))
            for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, augmented, evaluators)
        return OrderedDict((f"{name}_TTA", found) for name, found in results.items())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, a line every ``LOG_PERIOD`` iterations, and test-time augmentation at the end."""
        # Here, because one of the hooks saves with it.
        self.checkpointer = MaskFormerCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, min_fit=self.cfg.MODEL.WEIGHTS_MIN_FIT, trainer=weakref.proxy(self)
        )
        hooks: list[HookBase] = super().build_hooks()
        writers = [hook for hook in hooks if isinstance(hook, detectron2_hooks.PeriodicWriter)]
        for hook in writers:
            hook._period = self.cfg.LOG_PERIOD
        if self.cfg.TEST.AUG.ENABLED:
            augmented = detectron2_hooks.EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model))
            hooks.insert(len(hooks) - len(writers), augmented)  # the writers come last: they write its results
        return hooks

    # ---------------------------------------------------------------- going on
    def resume_or_load(self, resume: bool = True) -> None:
        """Load ``MODEL.WEIGHTS``, or with `resume` go on from the newest checkpoint in ``OUTPUT_DIR``.

        That may be one of `tools/train_net.py`: optimizer, schedule and place in the data are taken from it too.
        """
        left = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if not (resume and self.checkpointer.has_checkpoint()):
            return
        if "optimizer" in left:
            self._restore_native(left)
        self.start_iter = self.iter + 1
        start_position = self.start_iter * int(self.cfg.SOLVER.IMS_PER_BATCH)
        self._trainer.reset_data_loader(lambda: self.build_train_loader(self._seeded(), start_position))

    def _restore_native(self, checkpoint: Mapping[str, Any]) -> None:
        self.iter = int(checkpoint["iteration"])
        model: Any = self.model
        model = getattr(model, "module", model)
        load_optimizer_state(self.optimizer, with_names_of(model, checkpoint["optimizer"]))
        self.scheduler = build_scheduler(self.cfg, self.optimizer, self.iter + 1)
        if "scale" in (checkpoint.get("scaler") or {}) and hasattr(self._trainer, "grad_scaler"):
            self._trainer.grad_scaler.load_state_dict(checkpoint["scaler"])
        logger.info("going on from a checkpoint of a native run, %d iterations done", self.iter + 1)

    def _seeded(self) -> Any:
        """The config with the seed of the run that is resumed, so that its data go on where they stopped."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SEED = self.seed
        return cfg

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's, and the seed of the data."""
        return {**super().state_dict(), "seed": self.seed}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self.seed = int(state_dict.get("seed", self.seed))


def with_names_of(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A native optimizer's state under the names that a model's parameters have here.

    Args:
        model: built by Detectron2.
        saved: `state_dict()` of a native optimizer.
    """
    # A parameter and its entry in the state dict, which has the published name, share their memory.
    held = {tensor.data_ptr(): name for name, tensor in model.state_dict().items()}
    known = {held.get(parameter.data_ptr(), name): name for name, parameter in model.named_parameters()}
    native = [name for group in saved["param_groups"] for name in group["param_names"]]
    # Which backbone it was, its names alone do not say where the first stages are frozen.
    kinds: tuple[layouts.BackboneKind, ...] = get_args(layouts.BackboneKind)
    readings = [
        {name: layouts.to_published(name, kind) or name.removeprefix(layouts.OURS) for name in native} for kind in kinds
    ]
    names = max(readings, key=lambda reading: sum(name in known for name in reading.values()))
    groups = [
        {**group, "param_names": [known.get(names[name], name) for name in group["param_names"]]}
        for group in saved["param_groups"]
    ]
    return {**saved, "param_groups": groups}


# ------------------------------------------------------------------ configs
def with_seed(cfg: Any) -> Any:
    """The config with a seed drawn anew, the same for all processes, where ``SEED`` is negative."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = int(comm.shared_random_seed())
    return cfg


def check_config(cfg: Any, processes: int) -> None:
    """Refuse values that cannot work, and what would silently not happen here.

    Raises:
        UserError: naming the key and the way.
    """
    check_values(cfg)
    for key, idle in NATIVE_ONLY.items():
        value: Any = cfg
        for part in key.split("."):
            value = value[part]
        if value != idle:
            raise UserError(f"{key} is {value!r}, which only tools/train_net.py does; train with it, or set {idle!r}")
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name the data set to train on, such as ('folder:my_data:train',)")
    solver = cfg.SOLVER
    share = -(-solver.IMS_PER_BATCH // processes)
    if 0 < solver.MAX_IMS_PER_DEVICE < share:
        raise UserError(
            f"SOLVER.MAX_IMS_PER_DEVICE is {solver.MAX_IMS_PER_DEVICE}, but Detectron2 does not accumulate the "
            f"gradients of {share} images; train with tools/train_net.py, or set it to 0"
        )
    if solver.AMP.ENABLED and not (torch.cuda.is_available() and cfg.MODEL.DEVICE.startswith("cuda")):
        raise UserError(
            f"SOLVER.AMP.ENABLED is True, but MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, and Detectron2's mixed precision "
            "needs CUDA; set it to False, or train with tools/train_net.py"
        )


def check_test_data(cfg: Any) -> None:
    """Refuse test sets that would fail, or mean nothing, when they are evaluated hours later.

    Raises:
        UserError: naming data set, key and remedy.
    """
    trained = catalog.get_metadata(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
    check_test_sets(cfg, [catalog.get_dataset(name) for name in cfg.DATASETS.TEST], trained)

"""Training: the loop, its hooks, optimizers and schedules, and the command that joins them."""

from __future__ import annotations

from maskformer.engine.hooks import CheckpointHook, EvaluationHook, MetricsHook, ProgressHook
from maskformer.engine.optimizer import build_clipper, build_optimizer
from maskformer.engine.schedule import build_scheduler
from maskformer.engine.trainer import Hook, Precision, Trainer

__all__ = [
    "CheckpointHook",
    "EvaluationHook",
    "Hook",
    "MetricsHook",
    "Precision",
    "ProgressHook",
    "Trainer",
    "build_clipper",
    "build_optimizer",
    "build_scheduler",
]

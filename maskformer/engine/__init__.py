"""Training: the loop, its hooks, optimizers and schedules, and the command that joins them.

The names are loaded on first use, so that ``maskformer train --help`` need not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "CheckpointHook": "hooks",
    "EvaluationHook": "hooks",
    "Hook": "trainer",
    "MetricsHook": "hooks",
    "Precision": "trainer",
    "ProgressHook": "hooks",
    "Trainer": "trainer",
    "build_clipper": "optimizer",
    "build_optimizer": "optimizer",
    "build_scheduler": "schedule",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a LazyConfig of Detectron2 names instead of keys: our groups, clipping, schedule and records as plain calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from maskformer.data.dataset import Record
from maskformer.engine.optimizer import parameter_groups, parameter_rules
from maskformer.engine.schedule import Factor
from maskformer.integrations.detectron2 import catalog


def optimizer_groups(
    model: nn.Module,
    *,
    base_lr: float,
    backbone_multiplier: float = 0.1,
    weight_decay: float = 0.0001,
    weight_decay_norm: float = 0.0,
    weight_decay_embed: float = 0.0,
) -> list[dict[str, Any]]:
    """The groups of `parameter_rules`, as an optimizer takes them."""
    rules = parameter_rules(
        model,
        base_lr=base_lr,
        backbone_multiplier=backbone_multiplier,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        weight_decay_embed=weight_decay_embed,
    )
    return parameter_groups(rules)


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips the norm of all gradients first, for loops that do nothing between backward pass and step.

    Args:
        params: as of every optimizer.
        clip_norm: limit of the L2 norm of all gradients together.
        **options: of AdamW; not ``fused``, which would get the scaled gradients of mixed precision.
    """

    def __init__(self, params: Iterable[Any], *, clip_norm: float = 0.01, **options: Any) -> None:
        super().__init__(params, **options)
        self.clip_norm = clip_norm

    def step(self, closure: Any = None) -> Any:
        """Clip, then AdamW's step."""
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.clip_norm)
        return super().step(closure)


class IterationFactor(ParamScheduler):
    """One of our schedules as fvcore's: a function of the part of the run that is done.

    Args:
        factor: iteration -> factor, such as `maskformer.engine.schedule.poly`.
        iterations: of the whole run.
    """

    def __init__(self, factor: Factor, iterations: int) -> None:
        self.factor = factor
        self.iterations = iterations

    def __call__(self, where: float) -> float:
        """The factor when `where` of the run is done, [0, 1]."""
        return self.factor(round(where * self.iterations))


def list_records(name: str, count: int | None = None) -> list[Record]:
    """The first `count` records of a data set of Detectron2's catalogs or ours; None for all.

    Raises:
        UserError: if neither has it.
    """
    return list(catalog.get_dataset(name).records[:count])

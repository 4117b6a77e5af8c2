"""A moving average of the weights: often better than the last weights, evaluated and saved beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from maskformer.engine.trainer import Hook, Trainer

Tensors = tuple[Tensor, ...] | list[Tensor]


class WeightAverage:
    """Exponential moving average of a model's parameters; its buffers are the model's present ones.

    The first update takes the weights as they are. Update n makes the average ``d · average + (1 - d) · weights`` with
    ``d = min(decay, (1 + n) / (10 + n))``: the weights of the first steps are forgotten soon.

    Args:
        model: whose weights are averaged; copied.
        decay: of the average in each update, in [0, 1).

    Attributes:
        updates: number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._averaged = AveragedModel(model, multi_avg_fn=self._mix)
        self._averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        module: nn.Module = self._averaged.module
        return module

    def _mix(self, averages: Tensors, weights: Tensors, _: Any) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the present weights."""
        self.updates += 1
        self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`."""
        self.updates = int(state["updates"])
        self._averaged.n_averaged.fill_(self.updates)
        self.model.load_state_dict(state["model"])


def build_average(cfg: Any, model: nn.Module) -> WeightAverage | None:
    """The average that ``SOLVER.EMA`` asks for; None if it is off."""
    ema = cfg.SOLVER.EMA
    return WeightAverage(model, ema.DECAY) if ema.ENABLED else None


class AveragingHook(Hook):
    """Updates the average after every step.

    Args:
        average: of the trainer's model.
    """

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def after_step(self, trainer: Trainer) -> None:
        """Take in the step's weights."""
        self.average.update(trainer.model)

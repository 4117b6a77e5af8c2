"""What every backbone shares: its maps' sizes, and freezing it from the images up to a stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

from torch import nn

B = TypeVar("B", bound="Backbone")


class Part(NamedTuple):
    """What belongs to the first stages of a backbone.

    Attributes:
        modules: names of modules whose every parameter belongs to it.
        parameters: names of parameters outside these modules.
    """

    modules: Collection[str]
    parameters: Collection[str] = ()


class Backbone(nn.Module):
    """Images (B, 3, H, W) → maps by name; can be frozen from the images up to a stage.

    A frozen part is not trained and stays in evaluation mode when the rest trains: batch norms use their constant
    statistics, and neither dropout nor stochastic depth acts. Modules and names stay what they were, so that a weight
    file fits whatever is frozen. Nothing of it needs a gradient, so no activation is kept for the backward pass.

    Attributes:
        channels: channels of each map by name, finest first.
        strides: stride of each map by name.
        size_divisibility: what image sides should be a multiple of; 0: anything.
        frozen_modules: names of the modules that stay in evaluation mode.
    """

    channels: Mapping[str, int]
    strides: Mapping[str, int]
    size_divisibility: int

    def __init__(self) -> None:
        super().__init__()
        self.frozen_modules: tuple[str, ...] = ()

    def first_stages(self, count: int) -> Part:
        """What is frozen with `count` 1 (what comes before res2), 2 (also res2), … 5 (also res5: everything)."""
        raise NotImplementedError("a backbone says what its stages are")

    def freeze(self, count: int) -> None:
        """Train only what comes after the first stages; a later call can freeze more, none less.

        Args:
            count: 0 (nothing) to 5 (everything), as of `first_stages`.

        Raises:
            UserError: if it cannot be told what belongs to these stages.
        """
        if count == 0:
            return
        part = self.first_stages(count)
        for name in part.modules:
            self.get_submodule(name).requires_grad_(False)
        for name in part.parameters:
            self.get_parameter(name).requires_grad_(False)
        self.frozen_modules = tuple(part.modules)
        self.train(self.training)

    def train(self: B, mode: bool = True) -> B:
        """Training or evaluation mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for name in self.frozen_modules:
            self.get_submodule(name).eval()
        return self

"""Numbers of parameters, by part of the network."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from maskformer.build import count_parameters

PARTS = {"backbone": "backbone", "pixel_decoder": "pixel decoder", "head": "head"}
"""Names of the parts of a network, and how they are called in tables."""


class PartParameters(NamedTuple):
    """Numbers of one part, or of the whole.

    Attributes:
        trained: parameters with a gradient.
        frozen: parameters without.
        buffers: numbers that are no parameters but belong to weight files, such as frozen batch norm.
    """

    trained: int
    frozen: int
    buffers: int

    @property
    def parameters(self) -> int:
        """Trained and frozen ones: what papers report."""
        return self.trained + self.frozen


def count_parts(network: nn.Module) -> dict[str, PartParameters]:
    """Parameters of each part of a network (see `PARTS`), and of all under ``total``; on any device, also meta."""
    counts = {title: _count(network.get_submodule(name)) for name, title in PARTS.items()}
    counts["total"] = _count(network)
    return counts


def _count(module: nn.Module) -> PartParameters:
    trained, frozen = count_parameters(module)
    # Buffers that weight files do not hold (index tables) are no property of the model.
    saved = module.state_dict().keys()
    buffers = sum(buffer.numel() for name, buffer in module.named_buffers() if name in saved)
    return PartParameters(trained, frozen, buffers)

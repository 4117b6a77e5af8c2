"""The modules of a network as a tree, each with what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from maskformer.analysis.flops import multiply_adds_by_module
from maskformer.build import count_parameters
from maskformer.data.transforms import Size
from maskformer.modeling.meta_arch import MaskFormer, SemanticSegmentor


class ModuleCosts(NamedTuple):
    """One module of the network.

    Attributes:
        name: dotted, below the network; "" for the network itself.
        kind: name of its class.
        parameters: trained and frozen, those of its own modules included.
        multiply_adds: likewise.
    """

    name: str
    kind: str
    parameters: int
    multiply_adds: int


def module_costs(model: MaskFormer | SemanticSegmentor, size: Size, depth: int) -> list[ModuleCosts]:
    """The network's modules down to `depth` names, parents before children.

    Args:
        model: best on the meta device; left as it was.
        size: (H, W) of the one image whose multiply-adds are counted.
        depth: 0 for the network alone.
    """
    counts = multiply_adds_by_module(model, size)
    modules: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in model.network.named_modules() if len(name.split(".")) <= depth or not name
    ]
    return [
        ModuleCosts(name, type(module).__name__, sum(count_parameters(module)), _multiply_adds(name, module, counts))
        for name, module in modules
    ]


def _multiply_adds(name: str, module: nn.Module, counts: Mapping[str, int]) -> int:
    """Those of a module, or of what is in it if it is only a list that nobody calls."""
    if name in counts or not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return counts.get(name, 0)
    return sum(_multiply_adds(f"{name}.{child}", inner, counts) for child, inner in module.named_children())

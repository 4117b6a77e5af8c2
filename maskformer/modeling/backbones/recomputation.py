"""Gradient checkpointing: blocks keep their inputs alone and compute their activations again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

_LISTS = (nn.Sequential, nn.ModuleList)


def recompute_activations(backbone: nn.Module) -> list[nn.Module]:
    """Let every block of a backbone compute its activations again; losses and gradients stay the same.

    It has an effect in training alone, and none on frozen blocks, which keep nothing anyway. Names of weights do not
    change, random numbers are drawn again as they were, and running statistics are updated once.

    Returns:
        The blocks (see `find_blocks`).
    """
    blocks = list(find_blocks(backbone))
    for block in blocks:
        # A bound method, because a copy of the model copies it bound to the copied block.
        block.forward = MethodType(_recomputed_forward, block)
    return blocks


def find_blocks(module: nn.Module, element: bool = False) -> Iterator[nn.Module]:
    """The blocks of a network: elements of its lists of modules that hold layers with weights.

    A stage that holds such a list itself is walked through; one that does not (RegNet's name their blocks one by
    one) is a block as a whole.

    Args:
        module: the network.
        element: whether it is an element of a list itself.
    """
    if isinstance(module, _LISTS):
        for child in module.children():
            yield from find_blocks(child, element=True)
    elif element and not any(_is_list_of_blocks(child) for child in module.children()):
        if _holds_layers(module):
            yield module
    else:
        # timm's pyramids are dictionaries of stages.
        for child in module.children():
            yield from find_blocks(child, element=isinstance(module, nn.ModuleDict))


def _is_list_of_blocks(module: nn.Module) -> bool:
    return isinstance(module, _LISTS) and any(_holds_layers(child) for child in module.children())


def _holds_layers(module: nn.Module) -> bool:
    """Whether there are convolutions or linear layers inside; a layer alone would save nothing."""
    return any(isinstance(inner, (nn.Conv2d, nn.Linear)) for inner in module.modules() if inner is not module)


def _recomputed_forward(self: nn.Module, *args: Any, **options: Any) -> Any:
    forward = partial(type(self).forward, self)
    if not (self.training and torch.is_grad_enabled()):
        return forward(*args, **options)
    settings: dict[str, Any] = {}
    # A compiler takes no contexts, and needs none: it draws the updates of statistics out of what is computed again.
    if not torch.compiler.is_compiling() and _norms_with_statistics(self):
        settings["context_fn"] = partial(_contexts, self)
    return checkpoint(forward, *args, use_reentrant=False, **settings, **options)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first computation, and around the second."""
    return nullcontext(), _StatisticsKept(block)


def _norms_with_statistics(block: nn.Module) -> list[nn.Module]:
    norms = (module for module in block.modules() if isinstance(module, _NormBase))
    return [norm for norm in norms if norm.training and norm.track_running_stats]


class _StatisticsKept(AbstractContextManager[None]):
    """Norms of a block update copies of their running statistics and counters, which are then thrown away.

    Copies in their place, because setting the originals back would be a change that autograd complains about.
    """

    def __init__(self, block: nn.Module) -> None:
        self.norms = _norms_with_statistics(block)
        self.kept: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.kept = [dict(norm._buffers) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *_: object) -> None:
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update(buffers)


def check_recomputation(backbone: nn.Module, height: int = 64, width: int = 96) -> None:
    """`recompute_activations`, proved on a small batch: same gradients and statistics, fewer activations kept.

    For a network of someone else, which may change activations in place or keep some aside. Random state, statistics
    and gradients of the parameters are left alone.

    Raises:
        ValueError: if it does not work, and why.
    """
    plain, plain_size = _trial(backbone, height, width)
    if not recompute_activations(backbone):
        raise ValueError("it has no blocks that are found")
    again, size = _trial(backbone, height, width)
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True) for a, b in zip(plain, again, strict=True)):
        raise ValueError("its gradients change")
    if size >= plain_size:
        raise ValueError("it saves nothing")


def _trial(backbone: nn.Module, height: int, width: int) -> tuple[list[Tensor], int]:
    """Gradients and statistics of a step on two images, and the bytes that it kept for the backward pass."""
    before = [buffer.clone() for buffer in backbone.buffers()]
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = backbone(torch.randn(2, 3, height, width))
            loss = torch.stack([feature.float().square().mean() for feature in maps.values()]).sum()
        gradients = torch.autograd.grad(loss, [p for p in backbone.parameters() if p.requires_grad], allow_unused=True)
    outcome = [torch.zeros(()) if gradient is None else gradient for gradient in gradients]
    with torch.no_grad():
        for buffer, old in zip(backbone.buffers(), before, strict=True):
            outcome.append(buffer.detach().clone())
            buffer.copy_(old)
    return outcome, sum(sizes.values())

"""Multiply-adds of an evaluation step, counted as published: by `torch.utils.flop_counter` and what that leaves out.

The published numbers are fvcore's, whose "FLOP" is one multiplication with its addition: half of what torch counts.
fvcore also gives norms and resampling a number for each element; torch does not, so they are added here. Softmax,
activations, sums and copies count nothing in either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maskformer.analysis.inputs import random_samples
from maskformer.analysis.parameters import PARTS
from maskformer.data.transforms import Size
from maskformer.modeling.backbones.swin_blocks import WindowAttention
from maskformer.modeling.meta_arch import MaskFormer, SemanticSegmentor

INFERENCE = "inference"
"""The part after the network: masks brought to the size of the result, classes and masks joined."""

ATTENTION = "attention"
PRODUCTS = "matrix products"
ATTENTION_MODULES = (nn.MultiheadAttention, WindowAttention)

# What torch counts, by the name it has here. Attention is composed of products on the meta device; other devices have a
# kernel for it.
COUNTED = {
    "convolution": "convolution",
    "_convolution": "convolution",
    "addmm": "linear",
    "mm": "linear",
    "bmm": PRODUCTS,
    "baddbmm": PRODUCTS,
}
# What fvcore counts besides: name here, and how many for each element of input and of output.
PER_ELEMENT = {
    "native_layer_norm": ("layer norm", 5, 0),
    "native_group_norm": ("group norm", 5, 0),
    "native_batch_norm": ("batch norm", 2, 0),
    "cudnn_batch_norm": ("batch norm", 2, 0),
    "_native_batch_norm_legit": ("batch norm", 2, 0),
    "_native_batch_norm_legit_no_training": ("batch norm", 2, 0),
    "_batch_norm_no_update": ("batch norm", 2, 0),
    "addcmul": ("batch norm", 0, 2),  # frozen batch norm is one of these
    "upsample_nearest2d": ("resampling", 0, 1),
    "upsample_bilinear2d": ("resampling", 0, 4),
    "_upsample_bilinear2d_aa": ("resampling", 0, 4),
    "_adaptive_avg_pool2d": ("average pooling", 1, 0),
}


class FlopCounts(NamedTuple):
    """Multiply-adds of one evaluation step.

    Attributes:
        size: (H, W) of the images.
        batch: number of images; the counts are of all of them.
        parts: part of the model → operator → multiply-adds.
    """

    size: Size
    batch: int
    parts: dict[str, dict[str, int]]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(sum(operators.values()) for operators in self.parts.values())

    def by_part(self) -> dict[str, int]:
        """Part → multiply-adds."""
        return {part: sum(operators.values()) for part, operators in self.parts.items()}

    def by_operator(self) -> dict[str, int]:
        """Operator → multiply-adds, most first."""
        totals: dict[str, int] = {}
        for operators in self.parts.values():
            for operator, count in operators.items():
                totals[operator] = totals.get(operator, 0) + count
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def count_flops(model: MaskFormer | SemanticSegmentor, size: Size, batch: int = 1) -> FlopCounts:
    """Multiply-adds of network and semantic inference on zero or random images, the last layer's masks only.

    Panoptic merging and instance scores are left out: they have nothing that counts.

    Args:
        model: best on the meta device (see `maskformer.build.assemble_model`), where nothing is computed; it is left
            as it was.
        size: (H, W) of the images.
        batch: how many.
    """
    root = type(model.network).__name__
    modules = _run_counted(model, size, batch)
    parts = {
        title: _readable(modules.get(f"{root}.{name}", {}), _attention_of(model.network, name, root, modules))
        for name, title in PARTS.items()
    }
    inside: dict[Any, int] = modules.get(root, {})
    outside = {operator: count - inside.get(operator, 0) for operator, count in modules["Global"].items()}
    parts[INFERENCE] = _readable(outside, 0)
    return FlopCounts(size, batch, parts)


def multiply_adds_by_module(model: MaskFormer | SemanticSegmentor, size: Size) -> dict[str, int]:
    """Dotted name below the network ("" is the network) → multiply-adds of one image, as of `count_flops`."""
    root = type(model.network).__name__
    counts = {module: sum(operators.values()) // 2 for module, operators in _run_counted(model, size, 1).items()}
    return {name[len(root) + 1 :]: count for name, count in counts.items() if name.split(".")[0] == root}


def _run_counted(model: MaskFormer | SemanticSegmentor, size: Size, batch: int) -> dict[str, dict[Any, int]]:
    """Module → torch's operator → twice its multiply-adds in an evaluation step."""
    samples = random_samples(size, batch, classes=1, device=model.device)
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with _counting(model), torch.no_grad(), counter:
        model.infer(samples)
    return counter.get_flop_counts()


@contextmanager
def _counting(model: MaskFormer | SemanticSegmentor) -> Iterator[None]:
    """In evaluation mode, without gradients (the counter would look for them) and without panoptic merging."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = model.panoptic_on, model.instance_on
    model.eval().requires_grad_(False)
    model.panoptic_on = model.instance_on = False
    try:
        yield
    finally:
        model.panoptic_on, model.instance_on = results
        for module, mode in modes.items():
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def _formulas() -> dict[Any, Callable[..., int]]:
    """For `FlopCounterMode`: what each operator of `PER_ELEMENT` counts, doubled, as all of its counts are halved."""

    def formula(by_input: int, by_output: int) -> Callable[..., int]:
        def count(input_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
            return 2 * (by_input * math.prod(input_shape) + (by_output * math.prod(out_shape) if by_output else 0))

        return count

    known = {name: getattr(torch.ops.aten, name, None) for name in PER_ELEMENT}
    formulas: dict[Any, Callable[..., int]] = {
        known[name]: formula(*scales) for name, (_, *scales) in PER_ELEMENT.items() if known[name] is not None
    }
    # The CPU's kernel, which older versions of torch do not count.
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _attention
    # By overload too: torch 2.6 takes apart what it does not find so, and then counts nothing of it.
    return formulas | {packet.default: formula for packet, formula in formulas.items() if hasattr(packet, "default")}


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Twice the multiply-adds of shapes (B, heads, Q, C), (B, heads, N, C) and (B, heads, N, C')."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_of(network: nn.Module, part: str, root: str, modules: Mapping[str, Mapping[Any, int]]) -> int:
    """Products of queries with keys and of weights with values in one part; twice the multiply-adds.

    On the meta device they look like any other product, so they are told by the module they happen in.
    """
    names = [
        name for name, module in network.get_submodule(part).named_modules() if isinstance(module, ATTENTION_MODULES)
    ]
    counts = [modules.get(f"{root}.{part}.{name}", {}) for name in names]
    return sum(c for count in counts for operator, c in count.items() if COUNTED.get(_name(operator)) == PRODUCTS)


def _readable(operators: Mapping[Any, int], attention: int) -> dict[str, int]:
    """Multiply-adds by the names used here, most first, from torch's operators and twice the multiply-adds.

    Args:
        operators: of one part.
        attention: how many of its products belong to attention.
    """
    counts = {ATTENTION: attention, PRODUCTS: -attention}
    for operator, count in operators.items():
        name = _name(operator)
        # Whatever else torch counts are kernels of attention.
        title = PER_ELEMENT[name][0] if name in PER_ELEMENT else COUNTED.get(name, ATTENTION)
        counts[title] = counts.get(title, 0) + count
    return {title: count // 2 for title, count in sorted(counts.items(), key=lambda item: -item[1]) if count}


def _name(operator: Any) -> str:
    """``aten.bmm`` → ``bmm``."""
    return str(operator).rpartition(".")[2]

"""Small layers that several parts of the network share.

Shapes: B batch, C channels, H×W map size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

GROUPS = 32


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and fixed affine, all of them buffers.

    Shallow backbones are fine-tuned with a few images per device, too few for statistics of their own. Nothing here is
    a parameter, so no gradient, weight decay or optimizer state is spent on it.

    Args:
        channels: C.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W), dtype of `x`."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # One fused pass that keeps nothing of `x` for the backward; the cast keeps reduced precision reduced.
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])

    def extra_repr(self) -> str:
        """What `repr` shows in the parentheses."""
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Files of trainable batch norm count their batches; fixed statistics have no use for the count.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with 32 groups.

    Args:
        channels: C, a multiple of 32.
    """

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(GROUPS, channels, eps=1e-5, device=device, dtype=dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": GroupNorm32,
}


def trained_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Batch norms that use the statistics of their batch when the model trains, by name.

    Args:
        model: in training mode; a frozen part of it is in evaluation mode.
    """
    return {
        name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training
    }


def synchronize_batch_norms(model: nn.Module) -> None:
    """Let the batch norms that are trained use the statistics of all processes; names and weights stay.

    Args:
        model: in training mode; a frozen part of it is in evaluation mode. Changed in place.
    """
    for name, norm in trained_batch_norms(model).items():
        parent, _, own_name = name.rpartition(".")
        # timm's conversion is torch's, but keeps the activation that timm's norms end with.
        setattr(model.get_submodule(parent), own_name, convert_sync_batchnorm(norm))


class ConvNorm(nn.Module):
    """Convolution that keeps the size, then norm and ReLU if asked for; a bias only where no norm follows.

    Kaiming uniform initialisation with a = 1, which is Xavier's for equal fan in and out; bias 0.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel_size: odd.
        norm: a name of `NORMS`, or "" for none.
        activation: whether ReLU ends it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str, activation: bool) -> None:
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, kernel_size, bias=not norm)
        self.norm = NORMS[norm](out_channels) if norm else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C_out, H, W)."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu(x) if self.activation else x


class MLP(nn.Module):
    """Linear layers with ReLU between them, in PyTorch's own initialisation.

    Args:
        widths: input width, each hidden width, output width.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, widths[0]) → (B, N, widths[-1]), for any leading axes."""
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == last else F.relu(layer(x))
        return x


def make_conv(in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the size, Kaiming uniform with a = 1, bias 0."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv

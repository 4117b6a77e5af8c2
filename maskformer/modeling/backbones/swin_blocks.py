"""The parts of a Swin Transformer (Liu et al., ICCV 2021), as the published dense-prediction models run them.

Not timm's: that one shifts before it pads and drops the shift on maps no larger than a window, so weights trained with
the published code give other features there.
Shapes: B batch, C channels, H×W tokens, w window side, N = w² tokens of a window, W windows of a map, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

OTHER_REGION = -100.0


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for each relative position.

    Args:
        channels: C.
        window: w.
        num_heads: h.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the scores; None: head dimension to the power -½.
        attention_dropout: on attention weights.
        dropout: on the output.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        channels: int,
        window: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale
        self.attention_dropout = attention_dropout
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, windows: Tensor, region_bias: Tensor | None) -> Tensor:
        """Attend.

        Args:
            windows: (B, W, N, C).
            region_bias: (W, N, N), added to the scores of every head; None where the map is not shifted.

        Returns:
            (B, W, N, C).
        """
        batch, count, tokens, _ = windows.shape
        qkv = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.unflatten(0, (tokens, tokens)).permute(2, 0, 1)
        # The bias differs by head, and by window only where regions differ: the axes it shares are the batch of
        # the attention, so that it is broadcast instead of copied.
        if region_bias is None:
            qkv, bias = qkv.flatten(1, 2), bias[None]
        else:
            qkv, bias = qkv.flatten(2, 3), (bias + region_bias[:, None]).flatten(0, 1)[None]
        query, key, value = qkv.unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout, scale=self.scale
        )
        out = out.reshape(batch, count, self.num_heads, tokens, -1).transpose(2, 3).flatten(-2)
        return self.proj_drop(self.proj(out))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class SwinBlock(nn.Module):
    """Window attention, on a shifted map in every second block, and a feed-forward, each a residual branch.

    Args:
        channels: C.
        num_heads: h.
        window: w.
        shift: how far the map is shifted before it is cut into windows.
        mlp_ratio: hidden width of the feed-forward by C.
        drop_path: probability that a branch is dropped for a sample.
        dropout, attention_dropout, qkv_bias, qk_scale: as of `WindowAttention`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: int,
        shift: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(
            channels,
            window,
            num_heads,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attention_dropout=attention_dropout,
            dropout=dropout,
        )
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = FeedForward(channels, int(channels * mlp_ratio), dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, region_bias: Tensor) -> Tensor:
        """(B, H, W, C) and the (windows, N, N) bias of shifted maps → (B, H, W, C)."""
        x = x + self.drop_path(self._attend(self.norm1(x), region_bias))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, region_bias: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = _ceil_div(height, self.window), _ceil_div(width, self.window)
        # Padded after the norm: pads enter as zeros and are attended to like other tokens.
        x = F.pad(x, (0, 0, 0, columns * self.window - width, 0, rows * self.window - height))
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self.attn(_cut_windows(x, rows, columns, self.window), region_bias if self.shift else None)
        x = _join_windows(x, rows, columns, self.window)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        # Not a slice, on whose bounds the compiler of PyTorch 2.6 would build another graph.
        return x.narrow(1, 0, height).narrow(2, 0, width)


class PatchMerging(nn.Module):
    """Halves a map: four neighbours are concatenated, normed and projected to twice the channels.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C)."""
        batch, height, width, channels = x.shape
        rows, columns = _ceil_div(height, 2), _ceil_div(width, 2)
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        # The column of a corner counts before its row: (0, 0), (1, 0), (0, 1), (1, 1).
        x = x.reshape(batch, rows, 2, columns, 2, channels).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3)))


class SwinStage(nn.Module):
    """Blocks on maps of one size, and the merging that follows every stage but the last.

    Args:
        channels: C.
        num_heads: h.
        window: w.
        drop_paths: of each block, the probability that a branch is dropped for a sample.
        merge: whether a merging follows.
        **block_options: as of `SwinBlock`.
    """

    def __init__(
        self, channels: int, num_heads: int, window: int, drop_paths: Sequence[float], merge: bool, **block_options: Any
    ) -> None:
        super().__init__()
        # Every second block is shifted, also where the map is no larger than a window.
        self.blocks = nn.ModuleList(
            SwinBlock(channels, num_heads, window, window // 2 if i % 2 else 0, drop_path=rate, **block_options)
            for i, rate in enumerate(drop_paths)
        )
        self.window = window
        self.downsample = PatchMerging(channels) if merge else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C), before merging."""
        region_bias = _region_bias(x.shape[1], x.shape[2], self.window, self.window // 2, x.device)
        for block in self.blocks:
            x = block(x, region_bias)
        return x


class PatchEmbedding(nn.Module):
    """Cuts the image into patches and projects each.

    Args:
        patch_size: side of a patch.
        channels: C.
        norm: whether a LayerNorm follows.
    """

    def __init__(self, patch_size: int, channels: int, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, channels, patch_size, patch_size)
        self.norm = nn.LayerNorm(channels) if norm else None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, ⌈H/patch⌉, ⌈W/patch⌉, C)."""
        height, width = images.shape[-2:]
        rows, columns = _ceil_div(height, self.patch_size), _ceil_div(width, self.patch_size)
        images = F.pad(images, (0, columns * self.patch_size - width, 0, rows * self.patch_size - height))
        x = self.proj(images).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)


def _relative_position_index(window: int) -> Tensor:
    """(N, N) int64: row of the bias table for each query (first axis) and key."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    rows = row[:, None] - row[None, :] + window - 1
    columns = column[:, None] - column[None, :] + window - 1
    return rows * (2 * window - 1) + columns


def _region_bias(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, N, N): what keeps tokens apart that only the shift brought into one window.

    A shifted map is cut, at `window` and at `shift` from its padded end, into regions that were neighbours before.
    The bias is large but finite, as published, so that a window's scores stay comparable.
    """
    rows, columns = _ceil_div(height, window), _ceil_div(width, window)
    regions = []
    for count in (rows, columns):
        from_end = count * window - torch.arange(count * window, device=device)
        regions.append((from_end <= window).float() + (from_end <= shift).float())
    region = 3 * regions[0][:, None] + regions[1]
    windows = _cut_windows(region[None, :, :, None], rows, columns, window)[0, :, :, 0]
    return (windows[:, :, None] != windows[:, None, :]).float() * OTHER_REGION


def _cut_windows(x: Tensor, rows: int, columns: int, window: int) -> Tensor:
    """(B, rows·w, columns·w, C) → (B, rows·columns, N, C)."""
    batch, channels = x.shape[0], x.shape[-1]
    x = x.reshape(batch, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(batch, rows * columns, window * window, channels)


def _join_windows(x: Tensor, rows: int, columns: int, window: int) -> Tensor:
    """(B, rows·columns, N, C) → (B, rows·w, columns·w, C)."""
    batch, channels = x.shape[0], x.shape[-1]
    x = x.reshape(batch, rows, columns, window, window, channels).transpose(2, 3)
    return x.reshape(batch, rows * window, columns * window, channels)


def _ceil_div(size: int, step: int) -> int:
    """⌈size / step⌉. One division of a size that may be symbolic: remainders of remainders take a compiler minutes."""
    return (size + step - 1) // step

"""Encoder, decoder and sine positions of the transformer, as mask classification uses them.

The transformer is DETR's (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020). Positions are not
added to the content once but to queries and keys in every attention; values carry content only.
Shapes: B batch, Q queries, L decoder layers, C hidden size, h×w map size, N = h·w.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer.errors import UserError


def sine_positions(
    channels: int, height: int, width: int, device: torch.device | None = None, temperature: float = 10000.0
) -> Tensor:
    """Sine and cosine of each row and column at geometrically spaced wavelengths.

    The first half of the channels encodes the row, the second the column; in each half even features are sines and odd
    ones cosines. Coordinates are 1…n, scaled to end just below 2π, so a map of any size spans the same range.

    Args:
        channels: C, divisible by 4.
        height: h.
        width: w.
        device: where to make them.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        (1, C, h, w), in [-1, 1].

    Raises:
        ValueError: if `channels` is not divisible by 4.
    """
    if channels % 4:
        raise ValueError(f"sine positions need channels divisible by 4, not {channels}")
    half = channels // 2
    pair = torch.arange(half // 2, device=device, dtype=torch.float32)
    wavelength = temperature ** (2 * pair / half)

    def encode(length: int) -> Tensor:
        coordinate = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        angle = (coordinate / (length + 1e-6) * (2 * math.pi))[:, None] / wavelength
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)

    rows = encode(height).t()[:, :, None].expand(half, height, width)
    columns = encode(width).t()[:, None, :].expand(half, height, width)
    return torch.cat((rows, columns))[None]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each a residual branch.

    Args:
        channels: C.
        num_heads: attention heads.
        feedforward: width of the hidden layer of the feed-forward.
        dropout: on attention weights, on each branch and inside the feed-forward.
        pre_norm: whether each branch starts with its norm instead of the norm following the sum.
    """

    def __init__(self, channels: int, num_heads: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, num_heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, N, C) content and (B or 1, N, C) positions → (B, N, C)."""
        if self.pre_norm:
            x = x + self._attend(self.norm1(x), positions)
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self._attend(x, positions))
        return self.norm2(x + self._feed_forward(x))

    def _attend(self, x: Tensor, positions: Tensor) -> Tensor:
        keys = x + positions
        return self.dropout(self.self_attn(keys, keys, x, need_weights=False)[0])

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory and feed-forward, each a residual branch.

    Args: as of `EncoderLayer`.
    """

    def __init__(self, channels: int, num_heads: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, num_heads, dropout=dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(channels, num_heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, query_positions: Tensor, memory: Tensor, memory_keys: Tensor) -> Tensor:
        """One layer.

        Args:
            x: (B, Q, C) query features.
            query_positions: (B or 1, Q, C).
            memory: (B, N, C) values of the cross-attention.
            memory_keys: (B, N, C) its keys, the memory with positions.

        Returns:
            (B, Q, C) query features.
        """
        if self.pre_norm:
            x = x + self._attend_self(self.norm1(x), query_positions)
            x = x + self._attend_memory(self.norm2(x), query_positions, memory, memory_keys)
            return x + self._feed_forward(self.norm3(x))
        x = self.norm1(x + self._attend_self(x, query_positions))
        x = self.norm2(x + self._attend_memory(x, query_positions, memory, memory_keys))
        return self.norm3(x + self._feed_forward(x))

    def _attend_self(self, x: Tensor, positions: Tensor) -> Tensor:
        keys = x + positions
        return self.dropout(self.self_attn(keys, keys, x, need_weights=False)[0])

    def _attend_memory(self, x: Tensor, positions: Tensor, memory: Tensor, memory_keys: Tensor) -> Tensor:
        return self.dropout(self.cross_attn(x + positions, memory_keys, memory, need_weights=False)[0])

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class TransformerEncoder(nn.Module):
    """A stack of encoder layers; with `pre_norm` it ends in a norm, also when it has no layer.

    Args:
        num_layers: depth, 0 or more.
        channels, num_heads, feedforward, dropout, pre_norm: as of `EncoderLayer`.
    """

    def __init__(
        self, num_layers: int, channels: int, num_heads: int, feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = _stack(EncoderLayer(channels, num_heads, feedforward, dropout, pre_norm), num_layers)
        self.norm = nn.LayerNorm(channels) if pre_norm else None

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, N, C) content and (B or 1, N, C) positions → (B, N, C)."""
        for layer in self.layers:
            x = layer(x, positions)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(nn.Module):
    """A stack of decoder layers and one norm that every returned layer output passes.

    Args:
        num_layers: depth, 1 or more.
        channels, num_heads, feedforward, dropout, pre_norm: as of `DecoderLayer`.
    """

    def __init__(
        self, num_layers: int, channels: int, num_heads: int, feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = _stack(DecoderLayer(channels, num_heads, feedforward, dropout, pre_norm), num_layers)
        self.norm = nn.LayerNorm(channels)

    def forward(self, query_positions: Tensor, memory: Tensor, positions: Tensor, all_layers: bool) -> Tensor:
        """Turn positions of queries into query features.

        Args:
            query_positions: (Q, C); the content of every query starts at zero.
            memory: (B, N, C).
            positions: (1, N, C) positions of the memory.
            all_layers: whether every layer's output is returned or only the last one's.

        Returns:
            (L, B, Q, C) query features; L = 1 unless `all_layers`.
        """
        query_positions = query_positions[None]
        memory_keys = memory + positions
        x = torch.zeros_like(query_positions, dtype=memory.dtype).expand(memory.shape[0], -1, -1)
        outputs = []
        for layer in self.layers:
            x = layer(x, query_positions, memory, memory_keys)
            outputs.append(x)
        return self.norm(torch.stack(outputs if all_layers else outputs[-1:]))


class Transformer(nn.Module):
    """Encoder and decoder together: a feature map and learned queries in, query features out.

    Args:
        channels: C.
        num_heads: attention heads.
        feedforward: width of the hidden layer of the feed-forward.
        enc_layers: depth of the encoder, 0 or more.
        dec_layers: depth of the decoder, 1 or more.
        dropout: on attention weights, on each branch and inside the feed-forward.
        pre_norm: whether norms precede their branch.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int,
        feedforward: int,
        enc_layers: int,
        dec_layers: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(enc_layers, channels, num_heads, feedforward, dropout, pre_norm)
        self.decoder = TransformerDecoder(dec_layers, channels, num_heads, feedforward, dropout, pre_norm)

    def forward(self, feature: Tensor, query_positions: Tensor, all_layers: bool) -> Tensor:
        """(B, C, h, w) feature map and (Q, C) query positions → (L, B, Q, C) query features."""
        memory, positions = map_to_sequence(feature)
        return self.decoder(query_positions, self.encoder(memory, positions), positions, all_layers)


def map_to_sequence(feature: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, h, w) → the same as (B, N, C) and its sine positions (1, N, C) in the same dtype."""
    channels, height, width = feature.shape[1:]
    positions = sine_positions(channels, height, width, feature.device).to(feature.dtype)
    return feature.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2)


def _stack(layer: nn.Module, count: int) -> nn.ModuleList:
    """`count` copies of one layer, then each matrix drawn anew: Xavier uniform, packed projections as one (as DETR).

    What stays common to the copies are the biases of the feed-forward; attention biases are 0.
    """
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
    for name, parameter in layers.named_parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        elif "attn" in name:
            nn.init.zeros_(parameter)
    return layers


def check_width(key: str, channels: int, num_heads: int) -> None:
    """Refuse a transformer whose channels cannot be split into heads and sine positions.

    Args:
        key: the config key of `channels`.
        channels: C.
        num_heads: ``MODEL.MASK_FORMER.NHEADS``.

    Raises:
        UserError: if so.
    """
    if num_heads < 1 or channels < 1 or channels % num_heads or channels % 4:
        raise UserError(
            f"{key} {channels} must be a multiple of MODEL.MASK_FORMER.NHEADS {num_heads} and of 4 "
            "(sine and cosine of rows and columns): change one of them"
        )

"""Swin Transformer (Liu et al., ICCV 2021) as the published dense-prediction models run it.

Shapes: B batch, C channels, H×W image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer.modeling.backbones.freezing import Backbone, Part
from maskformer.modeling.backbones.swin_blocks import PatchEmbedding, SwinStage


class SwinBackbone(Backbone):
    """Four stages of shifted-window attention with maps at strides 4, 8, 16 and 32 (for patches of 4).

    Args:
        embed_dim: channels of the first stage; each later stage doubles them.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_size: side of a window.
        patch_size: side of a patch.
        mlp_ratio: hidden width of a feed-forward by its channels.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the scores; None: head dimension to the power -½.
        drop_rate: dropout on embeddings, projections and feed-forwards.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 over all blocks.
        ape: whether a learned absolute position is added to each patch.
        patch_norm: whether patches are normed.
        pretrain_image_size: side of the images the absolute positions were learned for.
        out_features: names of the maps to return (res2, res3, res4, res5); stages after the last are not built.

    Attributes:
        channels: channels of each map by name, finest first.
        strides: stride of each map by name.
        size_divisibility: what image sides should be a multiple of.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.3,
        ape: bool = False,
        patch_norm: bool = True,
        pretrain_image_size: int = 224,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    ) -> None:
        super().__init__()
        names = [f"res{i + 2}" for i in range(len(depths))]
        stages = max(names.index(name) for name in out_features) + 1
        widths = [embed_dim * 2**i for i in range(stages)]
        self.patch_embed = PatchEmbedding(patch_size, embed_dim, patch_norm)
        self.absolute_pos_embed: nn.Parameter | None = None
        if ape:
            side = pretrain_image_size // patch_size
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, side, side))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        block_options = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "dropout": drop_rate,
            "attention_dropout": attn_drop_rate,
        }
        # Over all blocks of all stages, also of those that are not built: a map does not depend on coarser ones.
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for i, width in enumerate(widths):
            drop_paths = list(itertools.islice(rates, depths[i]))
            merge = i < stages - 1
            self.layers.append(SwinStage(width, num_heads[i], window_size, drop_paths, merge, **block_options))
        self.channels = {name: widths[i] for i, name in enumerate(names) if name in out_features}
        self.strides = {name: patch_size * 2**i for i, name in enumerate(names) if name in out_features}
        self.size_divisibility = patch_size * 8
        for i, name in enumerate(names):
            if name in out_features:
                self.add_module(f"norm{i}", nn.LayerNorm(widths[i]))

    def first_stages(self, count: int) -> Part:
        """1 is patches and positions; 2 also the first stage, with its merging and its map's norm, and so on."""
        stages = range(min(count - 1, len(self.layers)))
        norms = [f"norm{i}" for i in stages if hasattr(self, f"norm{i}")]
        positions = [] if self.absolute_pos_embed is None else ["absolute_pos_embed"]
        return Part(["patch_embed", "pos_drop", *(f"layers.{i}" for i in stages), *norms], positions)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images → maps (B, C_i, ⌈H/s⌉, ⌈W/s⌉) by name, finest first."""
        x = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            positions = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic", align_corners=False)
            x = x + positions.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        features = {}
        for i, stage in enumerate(self.layers):
            assert isinstance(stage, SwinStage)
            x = stage(x)
            name = f"res{i + 2}"
            if name in self.channels:
                # The map passes a norm of its own, which the next stage does not see.
                features[name] = getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return features

"""Heads: from per-pixel embeddings, and a feature map for the transformer, to predictions.

Shapes: B batch, L decoder layers, Q queries, K classes, C embedding channels, h×w mask size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskformer.modeling.layers import MLP, make_conv
from maskformer.modeling.transformer import Transformer
from maskformer.structures import MaskPredictions, PixelPredictions


class _QueryHead(nn.Module):
    """What the two heads with queries share: a feature map in, query features and their masks out.

    Args:
        in_channels: channels of the feature map the transformer reads.
        num_queries: Q.
        hidden_dim: channels of the transformer.
        mask_dim: C, channels of the per-pixel embeddings.
        num_heads: attention heads.
        feedforward: width of the hidden layer of the transformer's feed-forward.
        enc_layers: depth of the transformer's encoder.
        dec_layers: depth of its decoder.
        dropout: of the transformer.
        pre_norm: whether the transformer's norms precede their branch.
        deep_supervision: whether training predicts from every decoder layer.
        enforce_input_projection: whether the feature map is projected even if it already has `hidden_dim` channels.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_queries: int,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        num_heads: int = 8,
        feedforward: int = 2048,
        enc_layers: int = 0,
        dec_layers: int = 6,
        dropout: float = 0.1,
        pre_norm: bool = False,
        deep_supervision: bool = True,
        enforce_input_projection: bool = False,
    ) -> None:
        super().__init__()
        project = in_channels != hidden_dim or enforce_input_projection
        self.input_projection = make_conv(in_channels, hidden_dim, 1) if project else nn.Identity()
        self.transformer = Transformer(
            channels=hidden_dim,
            num_heads=num_heads,
            feedforward=feedforward,
            enc_layers=enc_layers,
            dec_layers=dec_layers,
            dropout=dropout,
            pre_norm=pre_norm,
        )
        self.query_positions = nn.Embedding(num_queries, hidden_dim)
        self.mask_head = MLP(hidden_dim, hidden_dim, hidden_dim, mask_dim)
        self.deep_supervision = deep_supervision

    def query_features(self, feature: Tensor) -> Tensor:
        """(B, C_in, h', w') → (L, B, Q, hidden); L = 1 in evaluation or without deep supervision."""
        all_layers = self.training and self.deep_supervision
        return self.transformer(self.input_projection(feature), self.query_positions.weight, all_layers)

    def mask_logits(self, queries: Tensor, embeddings: Tensor) -> Tensor:
        """(L, B, Q, hidden) query features and (B, C, h, w) per-pixel embeddings → (L, B, Q, h, w) logits."""
        return torch.einsum("lbqc,bchw->lbqhw", self.mask_head(queries), embeddings)


class MaskClassificationHead(_QueryHead):
    """Mask classification: each query predicts one class and one binary mask (paper, section 3.4).

    Args:
        num_classes: K, without *no object*.
        **options: as of the class it extends.
    """

    def __init__(self, *, num_classes: int, hidden_dim: int = 256, **options: Any) -> None:
        super().__init__(hidden_dim=hidden_dim, **options)
        self.class_head = nn.Linear(hidden_dim, num_classes + 1)

    def forward(self, feature: Tensor, embeddings: Tensor) -> MaskPredictions:
        """(B, C_in, h', w') feature map and (B, C, h, w) per-pixel embeddings → predictions."""
        queries = self.query_features(feature)
        return MaskPredictions(self.class_head(queries), self.mask_logits(queries, embeddings))


class QueryPixelHead(_QueryHead):
    """Per-pixel classification with a transformer: query i's mask logits are the logits of class i (PerPixelBaseline+).

    Args:
        num_classes: K, also the number of queries.
        **options: as of the class it extends.
    """

    def __init__(self, *, num_classes: int, **options: Any) -> None:
        super().__init__(num_queries=num_classes, **options)

    def forward(self, feature: Tensor, embeddings: Tensor) -> PixelPredictions:
        """(B, C_in, h', w') feature map and (B, C, h, w) per-pixel embeddings → predictions."""
        return PixelPredictions(self.mask_logits(self.query_features(feature), embeddings))


class PixelHead(nn.Module):
    """Per-pixel classification: a 1×1 convolution from embeddings to class logits (PerPixelBaseline).

    Args:
        num_classes: K.
        mask_dim: C, channels of the per-pixel embeddings.
    """

    def __init__(self, *, num_classes: int, mask_dim: int = 256) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(mask_dim, num_classes, 1)
        nn.init.kaiming_normal_(self.classifier.weight, mode="fan_out", nonlinearity="relu")
        if self.classifier.bias is not None:
            nn.init.zeros_(self.classifier.bias)

    def forward(self, embeddings: Tensor) -> PixelPredictions:
        """(B, C, h, w) per-pixel embeddings → predictions with L = 1."""
        return PixelPredictions(self.classifier(embeddings)[None])

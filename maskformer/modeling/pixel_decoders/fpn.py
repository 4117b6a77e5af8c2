"""The plain pixel decoder: a feature pyramid network that ends in per-pixel embeddings (paper, section 4.2).

Shapes: B batch, C channels, h×w size of the finest feature map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from maskformer.modeling.layers import ConvNorm, make_conv


class PixelDecoderOutput(NamedTuple):
    """What a pixel decoder makes of a feature pyramid.

    Attributes:
        embeddings: (B, C, h, w) per-pixel embeddings.
        encoded: (B, C', h', w') the coarsest map after a transformer encoder, or None where there is none.
    """

    embeddings: Tensor
    encoded: Tensor | None


class FPNPixelDecoder(nn.Module):
    """Walks from the coarsest map to the finest, adding each finer map to the upsampled running one.

    Args:
        channels: channels of each feature map by name, finest first.
        conv_dim: channels of the running map.
        mask_dim: channels of the per-pixel embeddings.
        norm: norm after each convolution but the last (a name of `layers.NORMS`, "" for none).
    """

    def __init__(
        self, *, channels: Mapping[str, int], conv_dim: int = 256, mask_dim: int = 256, norm: str = "GN"
    ) -> None:
        super().__init__()
        self.in_features = list(channels)
        *finer, coarsest = channels.values()
        self.lateral = nn.ModuleList(ConvNorm(c, conv_dim, 1, norm, activation=False) for c in finer)
        inputs = [conv_dim] * len(finer) + [self._coarsest_channels(coarsest, conv_dim)]
        self.output = nn.ModuleList(ConvNorm(c, conv_dim, 3, norm, activation=True) for c in inputs)
        self.embedding = make_conv(conv_dim, mask_dim, 3)

    def forward(self, features: Mapping[str, Tensor]) -> PixelDecoderOutput:
        """Feature maps by name, each (B, C_i, h_i, w_i) → per-pixel embeddings."""
        maps = [features[name] for name in self.in_features]
        coarsest, encoded = self.encode(maps[-1])
        x = self.output[-1](coarsest)
        for i in reversed(range(len(self.lateral))):
            finer = self.lateral[i](maps[i])
            # By size, not by factor: odd maps are not twice their coarser neighbour.
            x = self.output[i](finer + F.interpolate(x, size=finer.shape[-2:], mode="nearest"))
        return PixelDecoderOutput(self.embedding(x), encoded)

    def encode(self, coarsest: Tensor) -> tuple[Tensor, Tensor | None]:
        """The coarsest map as the pyramid takes it, and as the transformer decoder may take it; here unchanged."""
        return coarsest, None

    @staticmethod
    def _coarsest_channels(channels: int, conv_dim: int) -> int:
        """Channels of what `encode` hands to the pyramid."""
        return channels

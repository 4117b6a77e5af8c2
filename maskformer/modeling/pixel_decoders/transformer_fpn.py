"""The pixel decoder of the panoptic ResNet models: a transformer encoder over the coarsest map, then the pyramid.

Shapes: B batch, C channels, h×w map size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from maskformer.modeling.layers import make_conv
from maskformer.modeling.pixel_decoders.fpn import FPNPixelDecoder
from maskformer.modeling.transformer import TransformerEncoder, map_to_sequence


class TransformerEncoderPixelDecoder(FPNPixelDecoder):
    """`FPNPixelDecoder` whose coarsest map is projected and passes a transformer encoder first.

    Args:
        channels: channels of each feature map by name, finest first.
        conv_dim: channels of the running map and of the encoder.
        mask_dim: channels of the per-pixel embeddings.
        norm: norm after each convolution but the last (a name of `layers.NORMS`, "" for none).
        enc_layers: depth of the encoder.
        num_heads: attention heads.
        feedforward: width of the hidden layer of the encoder's feed-forward.
        dropout: of the encoder.
        pre_norm: whether the encoder's norms precede their branch.
    """

    def __init__(
        self,
        *,
        channels: Mapping[str, int],
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: str = "GN",
        enc_layers: int = 6,
        num_heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(channels=channels, conv_dim=conv_dim, mask_dim=mask_dim, norm=norm)
        self.input_projection = make_conv(list(channels.values())[-1], conv_dim, 1)
        self.encoder = TransformerEncoder(enc_layers, conv_dim, num_heads, feedforward, dropout, pre_norm)

    def encode(self, coarsest: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C_in, h, w) → twice the encoded map (B, C, h, w): for the pyramid and for the transformer decoder."""
        memory, positions = map_to_sequence(self.input_projection(coarsest))
        encoded = self.encoder(memory, positions).transpose(1, 2).unflatten(2, coarsest.shape[-2:])
        return encoded, encoded

    @staticmethod
    def _coarsest_channels(channels: int, conv_dim: int) -> int:
        return conv_dim

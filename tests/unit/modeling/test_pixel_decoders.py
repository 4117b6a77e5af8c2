"""Pixel decoders equal independent implementations with the same weights, on odd sizes too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer.config import get_cfg
from maskformer.errors import UserError
from maskformer.modeling.pixel_decoders import (
    FPNPixelDecoder,
    TransformerEncoderPixelDecoder,
    build_pixel_decoder,
)
from maskformer.modeling.transformer import sine_positions
from tests.unit.modeling.counterparts import fpn_weights, randomize, relative_error, transformer_weights

TOLERANCE = 1e-4
CHANNELS = {"res2": 8, "res3": 16, "res4": 24, "res5": 32}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
SIZES = [(24, 32), (12, 16), (7, 8), (3, 4)]  # the third is not half of the second
ODD_SIZES = [(19, 30), (10, 15), (5, 8), (3, 4)]


def make_features(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    return {name: torch.randn(2, c, *size) for (name, c), size in zip(CHANNELS.items(), sizes, strict=True)}


def transformers_fpn(coarsest: int, conv_dim: int = 32) -> nn.Module:
    pytest.importorskip("transformers")
    from transformers.models.maskformer.modeling_maskformer import MaskFormerPixelDecoder

    theirs = MaskFormerPixelDecoder(
        in_features=coarsest, lateral_widths=[8, 16, 24], feature_size=conv_dim, mask_feature_size=16
    ).eval()
    randomize(theirs)
    return theirs


@pytest.mark.parametrize("sizes", [SIZES, ODD_SIZES])
def test_fpn_equals_transformers(sizes: list[tuple[int, int]]) -> None:
    theirs = transformers_fpn(coarsest=32)
    ours = FPNPixelDecoder(channels=CHANNELS, conv_dim=32, mask_dim=16)
    ours.load_state_dict(fpn_weights(theirs.state_dict(), finer=3))
    features = make_features(sizes)
    with torch.no_grad():
        output, expected = ours(features), theirs(list(features.values())).last_hidden_state
    assert output.encoded is None
    assert relative_error(output.embeddings, expected) < TOLERANCE


@pytest.mark.parametrize("sizes", [SIZES, ODD_SIZES])
def test_transformer_encoder_equals_transformers(sizes: list[tuple[int, int]]) -> None:
    pytest.importorskip("transformers")
    from transformers import DetrConfig
    from transformers.models.detr.modeling_detr import DetrEncoder

    config = DetrConfig(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        dropout=0.0,
        use_timm_backbone=False,
    )
    encoder = DetrEncoder(config).eval()
    randomize(encoder)
    pyramid = transformers_fpn(coarsest=64, conv_dim=64)
    ours = TransformerEncoderPixelDecoder(
        channels=CHANNELS, conv_dim=64, mask_dim=16, enc_layers=2, num_heads=4, feedforward=48
    ).eval()
    randomize(ours.input_projection)
    ours.encoder.load_state_dict(transformer_weights(encoder.state_dict(), decoder=False))
    ours.load_state_dict(fpn_weights(pyramid.state_dict(), finer=3), strict=False)
    features = make_features(sizes)
    with torch.no_grad():
        output = ours(features)
        projected = ours.input_projection(features["res5"])
        positions = sine_positions(64, *projected.shape[-2:]).flatten(2).transpose(1, 2)
        content = projected.flatten(2).transpose(1, 2)
        encoded = encoder(
            inputs_embeds=content, spatial_position_embeddings=positions.expand_as(content)
        ).last_hidden_state
        encoded = encoded.transpose(1, 2).reshape(projected.shape)
        expected = pyramid([features["res2"], features["res3"], features["res4"], encoded]).last_hidden_state
    assert output.encoded is not None
    assert relative_error(output.encoded, encoded) < TOLERANCE
    assert relative_error(output.embeddings, expected) < TOLERANCE


def test_fpn_by_hand() -> None:
    """Two levels written out: norms after convolutions, no activation on laterals, nearest upsampling by size."""
    ours = FPNPixelDecoder(channels={"res2": 8, "res3": 16}, conv_dim=32, mask_dim=5)
    randomize(ours)
    fine, coarse = torch.randn(2, 8, 9, 13), torch.randn(2, 16, 5, 7)

    def normed(conv_norm: nn.Module, x: Tensor, padding: int) -> Tensor:
        x = F.conv2d(x, conv_norm.conv.weight, None, padding=padding)
        groups = x.reshape(2, 32, -1)  # one channel a group: each channel of each image by itself
        variance, mean = torch.var_mean(groups, dim=-1, correction=0, keepdim=True)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        return x * conv_norm.norm.weight[:, None, None] + conv_norm.norm.bias[:, None, None]

    with torch.no_grad():
        running = normed(ours.output[1], coarse, 1).clamp(min=0)
        rows, columns = torch.arange(9) * 5 // 9, torch.arange(13) * 7 // 13
        running = normed(ours.lateral[0], fine, 0) + running[:, :, rows][:, :, :, columns]
        running = normed(ours.output[0], running, 1).clamp(min=0)
        expected = F.conv2d(running, ours.embedding.weight, ours.embedding.bias, padding=1)
        torch.testing.assert_close(ours({"res2": fine, "res3": coarse}).embeddings, expected, rtol=1e-4, atol=1e-4)


def test_without_norm_convolutions_have_biases() -> None:
    plain = FPNPixelDecoder(channels=CHANNELS, conv_dim=20, mask_dim=16, norm="")
    assert all(level.norm is None and level.conv.bias is not None for level in (*plain.lateral, *plain.output))
    assert plain(make_features(SIZES)).embeddings.shape == (2, 16, 24, 32)
    normed = FPNPixelDecoder(channels=CHANNELS, conv_dim=32, mask_dim=16)
    assert all(level.conv.bias is None for level in (*normed.lateral, *normed.output))
    assert normed.embedding.bias is not None


def test_initialisation() -> None:
    ours = TransformerEncoderPixelDecoder(channels=CHANNELS, conv_dim=128, mask_dim=64, num_heads=8, feedforward=64)
    for conv in (ours.lateral[2].conv, ours.output[0].conv, ours.embedding, ours.input_projection):
        bound = (3 / conv.weight[0].numel()) ** 0.5  # Kaiming uniform, a = 1: variance 1 / fan in
        assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
        assert conv.weight.abs().max().item() <= bound
        assert conv.bias is None or (conv.bias == 0).all()


def test_pre_norm_encoder_ends_in_a_norm_even_without_layers() -> None:
    ours = TransformerEncoderPixelDecoder(
        channels=CHANNELS, conv_dim=32, mask_dim=16, enc_layers=0, num_heads=4, pre_norm=True
    ).eval()
    features = make_features(SIZES)
    encoded = ours(features).encoded
    assert encoded is not None
    projected = ours.input_projection(features["res5"])
    torch.testing.assert_close(encoded, F.layer_norm(projected.permute(0, 2, 3, 1), (32,)).permute(0, 3, 1, 2))


def test_every_parameter_has_a_gradient_and_channels_last_gives_equal_numbers() -> None:
    ours = TransformerEncoderPixelDecoder(
        channels=CHANNELS, conv_dim=32, mask_dim=16, enc_layers=2, num_heads=4, feedforward=32
    )
    features = make_features(ODD_SIZES)
    ours(features).embeddings.square().mean().backward()
    assert [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()] == []
    ours.eval()
    plain = ours(features)
    ours.to(memory_format=torch.channels_last)
    last = ours({name: f.contiguous(memory_format=torch.channels_last) for name, f in features.items()})
    assert relative_error(last.embeddings, plain.embeddings) < 1e-5
    assert last.embeddings.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- config
def test_coco_swin_recipes_name_encoder_layers_that_the_plain_decoder_has_not() -> None:
    cfg = get_cfg(None, ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "6"])
    decoder = build_pixel_decoder(cfg, CHANNELS, STRIDES)
    assert type(decoder) is FPNPixelDecoder


def test_build_reads_the_config() -> None:
    cfg = get_cfg(
        None,
        [
            *("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder"),
            *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "3", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "64"),
            *("MODEL.SEM_SEG_HEAD.MASK_DIM", "24", "MODEL.MASK_FORMER.NHEADS", "4", "MODEL.MASK_FORMER.DROPOUT", "0.3"),
            *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", "48", "MODEL.MASK_FORMER.PRE_NORM", "True"),
            *("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res2', 'res4']"),
        ],
    )
    decoder = build_pixel_decoder(cfg, CHANNELS, STRIDES)
    assert isinstance(decoder, TransformerEncoderPixelDecoder)
    layers = decoder.encoder.layers
    assert len(layers) == 3
    assert layers[0].self_attn.num_heads == 4
    assert layers[0].linear1.out_features == 48
    assert {m.p for m in decoder.modules() if isinstance(m, nn.Dropout)} == {0.3} == {layers[0].self_attn.dropout}
    assert decoder.encoder.norm is not None
    assert decoder.in_features == ["res2", "res4"]
    assert decoder.embedding.weight.shape[:2] == (24, 64)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SEM_SEG_HEAD.PIXEL_DECODER_NAME": "FPN"}, "PIXEL_DECODER_NAME 'FPN' is unknown: choose one of BasePixel"),
        ({"SEM_SEG_HEAD.NORM": "IN"}, "MODEL.SEM_SEG_HEAD.NORM 'IN' is unknown: choose one of ''"),
        ({"SEM_SEG_HEAD.CONVS_DIM": 100}, "CONVS_DIM 100 cannot be split into the 32 groups"),
        ({"SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": -1}, "TRANSFORMER_ENC_LAYERS is -1: set it to 0 or more"),
        ({"SEM_SEG_HEAD.IN_FEATURES": ["res3", "res4"]}, "IN_FEATURES .* stride 8, but masks .* add res2"),
        (
            {"SEM_SEG_HEAD.PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder", "MASK_FORMER.NHEADS": 7},
            "MODEL.SEM_SEG_HEAD.CONVS_DIM 256 must be a multiple of MODEL.MASK_FORMER.NHEADS 7",
        ),
    ],
)
def test_build_refuses(changes: dict[str, object], sentence: str) -> None:
    cfg = get_cfg()
    for key, value in changes.items():
        section, name = key.split(".")
        cfg.MODEL[section][name] = value
    with pytest.raises(UserError, match=sentence) as caught:
        build_pixel_decoder(cfg, CHANNELS, STRIDES)
    assert "\n" not in str(caught.value)

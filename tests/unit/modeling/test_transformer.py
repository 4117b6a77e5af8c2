"""The transformer equals independent implementations with the same weights: both norms, with and without encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskformer.errors import UserError
from maskformer.modeling.transformer import (
    DecoderLayer,
    EncoderLayer,
    Transformer,
    TransformerDecoder,
    TransformerEncoder,
    check_width,
    map_to_sequence,
    sine_positions,
)
from tests.unit.modeling.counterparts import randomize, relative_error, transformer_weights

TOLERANCE = 1e-4
PARITY = Path(__file__).parents[2] / "data" / "parity"
WIDTH = {"channels": 24, "num_heads": 4, "feedforward": 40}


def plain_encoder(layers: nn.ModuleList, x: Tensor, positions: Tensor, pre_norm: bool) -> Tensor:
    """The encoder as its equations say, one line an equation."""
    for layer in layers:
        attend, feed = layer.self_attn, lambda y, m=layer: m.linear2(m.linear1(y).clamp(min=0))
        if pre_norm:
            y = layer.norm1(x)
            x = x + plain_attention(attend, y + positions, y + positions, y)
            x = x + feed(layer.norm2(x))
        else:
            x = layer.norm1(x + plain_attention(attend, x + positions, x + positions, x))
            x = layer.norm2(x + feed(x))
    return x


def plain_decoder(
    layers: nn.ModuleList, queries: Tensor, memory: Tensor, positions: Tensor, pre_norm: bool
) -> list[Tensor]:
    """The decoder likewise; output of each layer before the last norm."""
    x, keys, out = torch.zeros(memory.shape[0], *queries.shape), memory + positions, []
    for m in layers:
        if pre_norm:
            y = m.norm1(x)
            x = x + plain_attention(m.self_attn, y + queries, y + queries, y)
            x = x + plain_attention(m.cross_attn, m.norm2(x) + queries, keys, memory)
            x = x + m.linear2(m.linear1(m.norm3(x)).clamp(min=0))
        else:
            x = m.norm1(x + plain_attention(m.self_attn, x + queries, x + queries, x))
            x = m.norm2(x + plain_attention(m.cross_attn, x + queries, keys, memory))
            x = m.norm3(x + m.linear2(m.linear1(x).clamp(min=0)))
        out.append(x)
    return out


def plain_attention(weights: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Scaled dot-product attention from the packed matrices, head by head."""
    matrices = zip(weights.in_proj_weight.chunk(3), weights.in_proj_bias.chunk(3), strict=True)
    q, k, v = (x @ w.T + b for x, (w, b) in zip((queries, keys, values), matrices, strict=True))
    size = weights.head_dim
    heads = []
    for i in range(0, q.shape[-1], size):
        scores = q[..., i : i + size] @ k[..., i : i + size].transpose(1, 2) / size**0.5
        heads.append(scores.softmax(-1) @ v[..., i : i + size])
    return weights.out_proj(torch.cat(heads, -1))


# ---------------------------------------------------------------- positions
def test_positions_golden() -> None:
    golden = torch.from_numpy(np.load(PARITY / "position_encoding.npz")["out"])
    ours = sine_positions(*golden.shape[1:])
    assert relative_error(ours, golden) < 1e-5


def test_positions_need_pairs_for_rows_and_columns() -> None:
    with pytest.raises(ValueError, match="divisible by 4, not 10"):
        sine_positions(10, 3, 3)


# ---------------------------------------------------------------- encoder and decoder
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("enc_layers", [0, 2])
@pytest.mark.parametrize("size", [(3, 4), (1, 7)])
def test_transformer_equals_its_equations(pre_norm: bool, enc_layers: int, size: tuple[int, int]) -> None:
    ours = Transformer(**WIDTH, enc_layers=enc_layers, dec_layers=3, dropout=0.1, pre_norm=pre_norm).eval()
    randomize(ours)
    feature, queries = torch.randn(2, 24, *size), torch.randn(9, 24)
    with torch.no_grad():
        memory, positions = map_to_sequence(feature)
        encoded = plain_encoder(ours.encoder.layers, memory, positions, pre_norm)
        if pre_norm:
            encoded = nn.functional.layer_norm(encoded, (24,), ours.encoder.norm.weight, ours.encoder.norm.bias)
        layers = plain_decoder(ours.decoder.layers, queries, encoded, positions, pre_norm)
        expected = torch.stack([ours.decoder.norm(x) for x in layers])
        assert relative_error(ours(feature, queries, all_layers=True), expected) < TOLERANCE
        assert relative_error(ours(feature, queries, all_layers=False), expected[-1:]) < TOLERANCE


@pytest.mark.parametrize("pre_norm", [False, True])
def test_layers_equal_torch_without_positions(pre_norm: bool) -> None:
    options = {"dim_feedforward": 40, "dropout": 0.0, "batch_first": True, "norm_first": pre_norm}
    theirs_encoder = nn.TransformerEncoderLayer(24, 4, **options).train()  # its fast path differs in rounding only
    theirs_decoder = nn.TransformerDecoderLayer(24, 4, **options)
    for module in (theirs_encoder, theirs_decoder):
        randomize(module)
    encoder, decoder = EncoderLayer(24, 4, 40, 0.0, pre_norm), DecoderLayer(24, 4, 40, 0.0, pre_norm)
    encoder.load_state_dict(theirs_encoder.state_dict())
    decoder.load_state_dict(
        {k.replace("multihead_attn", "cross_attn"): v for k, v in theirs_decoder.state_dict().items()}
    )
    x, memory, none = torch.randn(2, 9, 24), torch.randn(2, 12, 24), torch.zeros(1, 1, 24)
    assert relative_error(encoder(memory, none), theirs_encoder(memory)) < TOLERANCE
    assert relative_error(decoder(x, none, memory, memory), theirs_decoder(x, memory)) < TOLERANCE


def test_decoder_equals_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers import DetrConfig, MaskFormerConfig
    from transformers.models.maskformer.modeling_maskformer import MaskFormerTransformerModule

    detr = DetrConfig(
        d_model=24, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=40, num_queries=9, dropout=0.0
    )
    theirs = MaskFormerTransformerModule(in_features=24, config=MaskFormerConfig(decoder_config=detr)).eval()
    randomize(theirs)
    ours = Transformer(**WIDTH, enc_layers=0, dec_layers=3, dropout=0.0, pre_norm=False).eval()
    ours.decoder.load_state_dict(transformer_weights(theirs.decoder.state_dict(), decoder=True))
    feature = torch.randn(2, 24, 3, 5)
    with torch.no_grad():
        expected = theirs(feature, output_hidden_states=True, return_dict=True)
        output = ours(feature, theirs.queries_embedder.weight, all_layers=True)
    assert relative_error(output[-1], expected.last_hidden_state) < TOLERANCE


# ---------------------------------------------------------------- parameters
@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_ends_in_a_norm_only_before_norm(pre_norm: bool) -> None:
    names = [n for n, _ in TransformerEncoder(0, 24, 4, 40, 0.1, pre_norm).named_parameters()]
    assert names == (["norm.weight", "norm.bias"] if pre_norm else [])


@pytest.mark.parametrize(
    "stack", [TransformerEncoder(3, 64, 4, 96, 0.1, False), TransformerDecoder(3, 64, 4, 96, 0.1, True)]
)
def test_initialisation(stack: nn.Module) -> None:
    first = stack.layers[0]
    for other in stack.layers[1:]:
        for (name, one), two in zip(first.named_parameters(), other.parameters(), strict=True):
            assert one is not two
            assert torch.equal(one, two) == (one.dim() == 1), name  # matrices are drawn layer by layer
    for name, parameter in first.named_parameters():
        if parameter.dim() > 1:
            bound = (6 / sum(parameter.shape)) ** 0.5  # Xavier uniform; 3C × C counts as one matrix
            assert bound * 0.97 < parameter.abs().max().item() <= bound, name
        elif "attn" in name:
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        else:
            assert parameter.abs().max() > 0, name  # the feed-forward keeps PyTorch's default


def test_dropout_is_everywhere_in_training_and_nowhere_in_evaluation() -> None:
    ours = Transformer(**WIDTH, enc_layers=1, dec_layers=2, dropout=0.4, pre_norm=False)
    assert {m.p for m in ours.modules() if isinstance(m, nn.Dropout)} == {0.4}
    assert {m.dropout for m in ours.modules() if isinstance(m, nn.MultiheadAttention)} == {0.4}
    feature, queries = torch.randn(1, 24, 3, 3), torch.randn(5, 24)
    assert not torch.equal(ours(feature, queries, True), ours(feature, queries, True))
    ours.eval()
    assert torch.equal(ours(feature, queries, True), ours(feature, queries, True))


def test_check_width() -> None:
    check_width("MODEL.MASK_FORMER.HIDDEN_DIM", 24, 6)
    for channels, heads in ((24, 5), (6, 3), (24, 0), (0, 1)):
        with pytest.raises(UserError, match=f"HIDDEN_DIM {channels} must be .*NHEADS {heads} .*: change one of them"):
            check_width("MODEL.MASK_FORMER.HIDDEN_DIM", channels, heads)

"""Multiply-adds: against hand counts, and against the published numbers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from maskformer import build_model, get_cfg
from maskformer.analysis import count_flops, counting_size
from maskformer.analysis.flops import FlopCounts
from maskformer.analyze import on_meta
from maskformer.modeling.backbones.swin_blocks import WindowAttention

ADE = "configs/ade20k-150"
# Paper, table 1: 10^9 multiply-adds of one image at the crop size, by fvcore.
PUBLISHED = {
    f"{ADE}/maskformer_R50_bs16_160k.yaml": 53,
    f"{ADE}/maskformer_R101_bs16_160k.yaml": 73,
    f"{ADE}/maskformer_R101c_bs16_160k.yaml": 80,
    f"{ADE}/swin/maskformer_swin_tiny_bs16_160k.yaml": 55,
    f"{ADE}/swin/maskformer_swin_small_bs16_160k.yaml": 79,
    f"{ADE}/swin/maskformer_swin_base_IN21k_384_bs16_160k_res640.yaml": 195,
    f"{ADE}/swin/maskformer_swin_large_IN21k_384_bs16_160k_res640.yaml": 375,
}


def count(config: str, overrides: tuple[str, ...] = (), device: str = "meta") -> FlopCounts:
    cfg = get_cfg(config, ["MODEL.DEVICE", "cpu", *overrides])
    model = on_meta(cfg) if device == "meta" else build_model(cfg)
    return count_flops(model, counting_size(cfg))


@pytest.mark.parametrize(("config", "published"), PUBLISHED.items())
def test_published_numbers(config: str, published: int) -> None:
    counts = count(config)
    side = 640 if "res640" in config else 512
    assert counts.size == (side, side)
    # 3 % are asked for; what is left is told in docs/analysis.md.
    assert counts.total == pytest.approx(published * 1e9, rel=0.012)


def test_six_layers_masks_are_not_counted() -> None:
    # Masks, mask head and class head of the five earlier layers would make 2.2 of 53.
    counts = count(next(iter(PUBLISHED)))
    masks = 100 * 256 * 128 * 128
    heads = 100 * (3 * 256 * 256 + 256 * 151)
    assert counts.parts["head"]["matrix products"] == masks
    assert 5 * (masks + heads) == pytest.approx(2.2e9, rel=0.01)


def test_operators_by_hand() -> None:
    """MaskFormer, ResNet-50, 512×512: what torch leaves out, and the parts outside the backbone."""
    counts = count(next(iter(PUBLISHED)))
    maps = {4: 128 * 128, 8: 64 * 64, 16: 32 * 32, 32: 16 * 16}
    decoder = counts.parts["pixel decoder"]
    lateral = 256 * (256 * maps[4] + 512 * maps[8] + 1024 * maps[16])
    output = 9 * 256 * (256 * (maps[4] + maps[8] + maps[16]) + 2048 * maps[32])
    embedding = 9 * 256 * 256 * maps[4]
    assert decoder["convolution"] == lateral + output + embedding
    # Two norms at each level but the coarsest, which has no lateral one.
    assert decoder["group norm"] == 5 * 256 * (2 * (maps[4] + maps[8] + maps[16]) + maps[32])
    assert decoder["resampling"] == 256 * (maps[4] + maps[8] + maps[16])
    head = counts.parts["head"]
    assert head["convolution"] == 2048 * 256 * maps[32]
    queries, memory, width = 100, maps[32], 256
    # Queries with keys and weights with values, in six layers of self-attention and cross-attention.
    assert head["attention"] == 6 * 2 * width * queries * (queries + memory)
    # Projections of q, k, v and the result, twice, and the feed-forward; then mask head and class head.
    layer = width * width * (4 * queries + 2 * queries + 2 * memory) + 2 * queries * width * 2048
    assert head["linear"] == 6 * layer + queries * (3 * width * width + width * 151)
    # Three norms a layer, and the last one.
    assert head["layer norm"] == 5 * queries * width * (6 * 3 + 1)
    assert counts.parts["inference"] == {
        "matrix products": queries * 150 * 512 * 512,
        "resampling": 4 * queries * 512 * 512,
    }


def test_swin_attention_by_hand() -> None:
    """Swin-T, 512×512: windows of 7 on maps of 128, 64, 32, 16, each padded to a multiple of 7."""
    counts = count(f"{ADE}/swin/maskformer_swin_tiny_bs16_160k.yaml")
    attention = linear = 0
    for depth, width, side in ((2, 96, 128), (2, 192, 64), (6, 384, 32), (2, 768, 16)):
        padded = -(-side // 7) * 7
        attention += depth * 2 * padded**2 * 49 * width
        linear += depth * (4 * padded**2 * width**2 + 8 * side**2 * width**2)
        linear += 8 * width**2 * (side // 2) ** 2 if width < 768 else 0  # merging: 4C to 2C at a quarter of the places
    backbone = counts.parts["backbone"]
    assert backbone["attention"] == attention
    assert backbone["linear"] == linear
    assert backbone["convolution"] == 3 * 96 * 4 * 4 * 128**2


@pytest.mark.parametrize("config", [next(iter(PUBLISHED)), f"{ADE}/swin/maskformer_swin_tiny_bs16_160k.yaml"])
def test_kernels_of_a_real_device_are_counted(config: str) -> None:
    """On a CPU attention is one kernel, not products: it must count the same."""
    small = ("INPUT.CROP.SIZE", "(64, 64)", "INPUT.SIZE_DIVISIBILITY", "64")
    meta, real = count(config, small), count(config, small, device="cpu")
    assert real.by_operator() == meta.by_operator()
    assert real.parts == meta.parts
    assert meta.parts["head"]["attention"] > 0


def test_batch_norm_counts_two_for_each_element() -> None:
    frozen = count("configs/quickstart/shapes_panoptic.yaml", ("MODEL.RESNETS.NORM", "FrozenBN"))
    trained = count("configs/quickstart/shapes_panoptic.yaml", ("MODEL.RESNETS.NORM", "BN"))
    assert frozen.parts == trained.parts
    height, width = frozen.size
    assert (height % 32, width % 32) == (0, 0)
    # ResNet-18: the stem at half the size; each stage four convolutions, and a shortcut in all but the first.
    channels = 64 / 4 + 4 * 64 / 16 + 5 * 128 / 64 + 5 * 256 / 256 + 5 * 512 / 1024
    assert frozen.parts["backbone"]["batch norm"] == 2 * channels * height * width


def test_batch_is_counted_and_parts_add_up() -> None:
    cfg = get_cfg("configs/quickstart/shapes_panoptic.yaml", ["MODEL.DEVICE", "cpu"])
    one, two = (count_flops(on_meta(cfg), (96, 64), batch) for batch in (1, 2))
    assert two.total == 2 * one.total
    assert sum(one.by_part().values()) == sum(one.by_operator().values()) == one.total
    assert list(one.parts) == ["backbone", "pixel decoder", "head", "inference"]


def test_the_model_is_left_as_it_was() -> None:
    cfg = get_cfg("configs/quickstart/shapes_panoptic.yaml", ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", "2"])
    model = build_model(cfg)

    def state() -> tuple[Any, ...]:
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            (model.panoptic_on, model.instance_on),
        )

    before = state()
    assert len({*before[1]}) == 2  # some are frozen
    count_flops(model, (64, 64))
    assert state() == before


def test_every_attention_of_the_models_is_known() -> None:
    """A new kind of attention would be counted as other products, which this makes known."""
    for config in (next(iter(PUBLISHED)), f"{ADE}/swin/maskformer_swin_tiny_bs16_160k.yaml"):
        network = on_meta(get_cfg(config)).network
        kinds = {type(module) for name, module in network.named_modules() if name.endswith("attn")}
        assert kinds <= {nn.MultiheadAttention, WindowAttention}

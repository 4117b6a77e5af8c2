"""Whole networks: equal to an independent implementation, of the published sizes, and well-behaved in training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from maskformer.config import get_cfg
from maskformer.errors import UserError
from maskformer.modeling.backbones import SwinBackbone
from maskformer.modeling.heads import MaskClassificationHead, PixelHead, QueryPixelHead
from maskformer.modeling.network import MaskFormerNetwork, PerPixelNetwork, build_network
from maskformer.modeling.pixel_decoders import FPNPixelDecoder
from maskformer.structures import MaskPredictions, PixelPredictions
from tests.unit.modeling.counterparts import network_weights, randomize, relative_error

TOLERANCE = 1e-4
LAYOUTS = Path(__file__).parents[2] / "data" / "checkpoint_layouts.json"

R101C = {
    "BACKBONE.NAME": "build_resnet_deeplab_backbone",
    "RESNETS.DEPTH": 101,
    "RESNETS.STEM_TYPE": "deeplab",
    "RESNETS.RES5_MULTI_GRID": [1, 2, 4],
}
SWIN_TINY = {"BACKBONE.NAME": "D2SwinTransformer", "MASK_FORMER.ENFORCE_INPUT_PROJ": True}
PER_PIXEL = {"META_ARCHITECTURE": "SemanticSegmentor", "SEM_SEG_HEAD.NAME": "PerPixelBaselineHead"}
PER_PIXEL_PLUS = {
    "META_ARCHITECTURE": "SemanticSegmentor",
    "SEM_SEG_HEAD.NAME": "PerPixelBaselinePlusHead",
    "MASK_FORMER.NUM_OBJECT_QUERIES": 150,
}
ENCODER = {
    "SEM_SEG_HEAD.PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
    "SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 6,
    "MASK_FORMER.TRANSFORMER_IN_FEATURE": "transformer_encoder",
}
COCO = {"SEM_SEG_HEAD.NUM_CLASSES": 133}
# Published: the models' own parameters; frozen batch norm is none.
PUBLISHED = {
    "ade20k_semantic_R50": ({}, 41_254_743),
    "ade20k_semantic_R101c": (R101C, 60_318_039),
    "ade20k_semantic_swin_tiny": (SWIN_TINY, 41_757_009),
    "ade20k_per_pixel_R50": (PER_PIXEL, 31_033_942),
    "ade20k_per_pixel_plus_R50": (PER_PIXEL_PLUS, 41_228_736),
    "ade20k_panoptic_R50": (ENCODER, 45_016_407),
    "coco_panoptic_R50": (ENCODER | COCO, 45_012_038),
    # Names six encoder layers but uses the plain decoder.
    "coco_panoptic_swin_tiny": (SWIN_TINY | COCO | {"SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 6}, 41_752_640),
}
# Small enough to train a step in a blink.
SMALL = {
    "RESNETS.DEPTH": 18,
    "RESNETS.NORM": "BN",
    "SEM_SEG_HEAD.NUM_CLASSES": 5,
    "SEM_SEG_HEAD.CONVS_DIM": 32,
    "SEM_SEG_HEAD.MASK_DIM": 16,
    "MASK_FORMER.HIDDEN_DIM": 32,
    "MASK_FORMER.NHEADS": 4,
    "MASK_FORMER.DIM_FEEDFORWARD": 48,
    "MASK_FORMER.DEC_LAYERS": 3,
    "MASK_FORMER.NUM_OBJECT_QUERIES": 5,
}
SMALL_SWIN = {
    "BACKBONE.NAME": "D2SwinTransformer",
    "SWIN.EMBED_DIM": 12,
    "SWIN.DEPTHS": [2, 2, 2, 2],
    "SWIN.NUM_HEADS": [1, 2, 4, 4],
}


def config(*changes: dict[str, object]) -> CfgNode:
    cfg = get_cfg()
    for change in changes:
        for key, value in change.items():
            *sections, name = key.split(".")
            node = cfg.MODEL
            for section in sections:
                node = node[section]
            assert name in node
            node[name] = value
    return cfg


def meta_network(*changes: dict[str, object]) -> nn.Module:
    with torch.device("meta"):
        return build_network(config(*changes))


def first_output(output: MaskPredictions | PixelPredictions) -> Tensor:
    return output.logits if isinstance(output, PixelPredictions) else output.mask_logits


# ---------------------------------------------------------------- against an independent implementation
@pytest.mark.parametrize("size", [(75, 118), (64, 64), (21, 33)])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_network_equals_transformers(size: tuple[int, int], deep_supervision: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerSwinConfig

    swin = {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 4], "window_size": 5}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    detr = {"d_model": 24, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 40, "num_queries": 9}
    theirs = MaskFormerForInstanceSegmentation(
        MaskFormerConfig(
            backbone_config=MaskFormerSwinConfig(**swin, out_features=stages, drop_path_rate=0.0),
            decoder_config=DetrConfig(**detr, dropout=0.0),
            fpn_feature_size=32,
            mask_feature_size=16,
            num_labels=7,
        )
    ).eval()
    randomize(theirs)
    backbone = SwinBackbone(**swin, drop_path_rate=0.0)
    ours = MaskFormerNetwork(
        backbone,
        FPNPixelDecoder(channels=backbone.channels, conv_dim=32, mask_dim=16),
        MaskClassificationHead(
            in_channels=96,
            num_classes=7,
            num_queries=9,
            hidden_dim=24,
            mask_dim=16,
            num_heads=4,
            feedforward=40,
            dec_layers=3,
            dropout=0.0,
            deep_supervision=deep_supervision,
        ),
    )
    ours.load_state_dict(network_weights(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True)
        output = ours.train()(images)  # without any dropout, so that all layers are compared
        last = ours.eval()(images)
    assert len(last.class_logits) == len(last.mask_logits) == 1
    assert len(output.class_logits) == len(output.mask_logits) == (3 if deep_supervision else 1)
    for result in (output, last):
        assert relative_error(result.class_logits[-1], expected.class_queries_logits) < TOLERANCE
        assert relative_error(result.mask_logits[-1], expected.masks_queries_logits) < TOLERANCE
    if deep_supervision:
        # Their earlier hidden states have not passed the decoder's norm; the first is the empty content.
        hidden = expected.transformer_decoder_hidden_states[1:-1]
        assert len(hidden) == 2
        for layer, state in enumerate(hidden):
            with torch.no_grad():
                queries = theirs.model.transformer_module.decoder.layernorm(state)
                embeddings = expected.pixel_decoder_last_hidden_state
                masks = torch.einsum("bqc,bchw->bqhw", theirs.mask_embedder(queries), embeddings)
            assert relative_error(output.class_logits[layer], theirs.class_predictor(queries)) < TOLERANCE
            assert relative_error(output.mask_logits[layer], masks) < TOLERANCE


# ---------------------------------------------------------------- published sizes
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    changes, count = PUBLISHED[name]
    assert sum(p.numel() for p in meta_network(changes).parameters()) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_those_of_published_files(name: str) -> None:
    layouts = json.loads(LAYOUTS.read_text())
    index = str(layouts["files"].index(name))
    # These follow from the config, so they are neither parameters nor in our files.
    derived = ("criterion.empty_weight", "relative_position_index")
    published = Counter(
        shape
        for tensor, shapes in layouts["tensors"].items()
        for shape, files in shapes.items()
        if index in files and not tensor.endswith(derived)
    )
    ours = Counter("x".join(map(str, t.shape)) for t in meta_network(PUBLISHED[name][0]).state_dict().values())
    assert ours == published


# ---------------------------------------------------------------- behaviour
def network_is_pre_norm(changes: dict[str, object]) -> bool:
    return bool(changes.get("MASK_FORMER.PRE_NORM", False))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"MASK_FORMER.PRE_NORM": True, "MASK_FORMER.ENC_LAYERS": 2},
        {"MASK_FORMER.DEEP_SUPERVISION": False},
        ENCODER | {"MASK_FORMER.PRE_NORM": True},
        ENCODER | {"MASK_FORMER.TRANSFORMER_IN_FEATURE": "res4"},
        SMALL_SWIN | {"SWIN.APE": True},
        PER_PIXEL,
        PER_PIXEL_PLUS | {"MASK_FORMER.NUM_OBJECT_QUERIES": 5},
    ],
)
def test_every_parameter_has_a_gradient(changes: dict[str, object]) -> None:
    network = build_network(config(SMALL, changes))
    # Random weights, because at initialisation some gradients are exactly zero (queries with equal content).
    randomize(network)
    output = network(torch.randn(2, 3, 64, 96))
    sum(part.square().mean() for part in output).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    # Pre-norm, the first decoder layer norms the zero content, which no weight can change.
    blind = "head.transformer.decoder.layers.0.norm1.weight" if network_is_pre_norm(changes) else None
    assert [n for n, p in network.named_parameters() if not p.grad.any() and n != blind] == []


def test_shapes_and_layers() -> None:
    network = build_network(config(SMALL, {"SEM_SEG_HEAD.NUM_CLASSES": 7}))
    images = torch.randn(2, 3, 75, 118)
    output = network(images)
    assert isinstance(network, MaskFormerNetwork)
    assert isinstance(output, MaskPredictions)
    assert output.class_logits.shape == (3, 2, 5, 8)
    assert output.mask_logits.shape == (3, 2, 5, 19, 30)
    output = network.eval()(images)
    assert output.class_logits.shape == (1, 2, 5, 8)
    assert output.mask_logits.shape == (1, 2, 5, 19, 30)
    shallow = build_network(config(SMALL, {"MASK_FORMER.DEEP_SUPERVISION": False}))
    assert len(shallow.train()(images).mask_logits) == 1


@pytest.mark.parametrize(("changes", "layers"), [(PER_PIXEL, 1), (PER_PIXEL_PLUS, 3)])
def test_per_pixel_shapes_and_layers(changes: dict[str, object], layers: int) -> None:
    network = build_network(config(SMALL, changes, {"MASK_FORMER.NUM_OBJECT_QUERIES": 5}))
    images = torch.randn(2, 3, 64, 96)
    output = network(images)
    assert isinstance(network, PerPixelNetwork)
    assert isinstance(output, PixelPredictions)
    assert output.logits.shape == (layers, 2, 5, 16, 24)
    assert network.eval()(images).logits.shape == (1, 2, 5, 16, 24)


def test_masks_are_inner_products_with_embeddings() -> None:
    head = MaskClassificationHead(in_channels=8, num_classes=3, num_queries=4, hidden_dim=16, mask_dim=6, num_heads=2)
    head.eval()
    feature, embeddings = torch.randn(2, 8, 3, 3), torch.randn(2, 6, 5, 7)
    output = head(feature, embeddings)
    masks = head.mask_head(head.query_features(feature))
    expected = (masks[0, 1, 2][:, None, None] * embeddings[1]).sum(0)
    torch.testing.assert_close(output.mask_logits[0, 1, 2], expected)


@pytest.mark.parametrize(("channels", "enforce", "projects"), [(32, False, False), (32, True, True), (8, False, True)])
def test_input_projection(channels: int, enforce: bool, projects: bool) -> None:
    head = QueryPixelHead(num_classes=3, in_channels=channels, hidden_dim=32, enforce_input_projection=enforce)
    assert isinstance(head.input_projection, nn.Conv2d) is projects
    assert any(name.startswith("input_projection") for name in head.state_dict()) is projects


def test_initialisation_of_heads() -> None:
    head = MaskClassificationHead(in_channels=64, num_classes=50, num_queries=200, hidden_dim=128, mask_dim=16)
    assert head.query_positions.weight.std().item() == pytest.approx(1, rel=0.02)
    assert head.input_projection.weight.abs().max().item() == pytest.approx((3 / 64) ** 0.5, rel=0.02)
    assert (head.input_projection.bias == 0).all()
    for linear in (head.class_head, head.mask_head.layers[0]):  # PyTorch's default: within 1/√fan_in
        assert linear.weight.abs().max().item() == pytest.approx(128**-0.5, rel=0.02)
        assert linear.bias.any()
    pixel = PixelHead(num_classes=100, mask_dim=64)
    assert pixel.classifier.weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.05)
    assert (pixel.classifier.bias == 0).all()


@pytest.mark.parametrize("changes", [ENCODER, SMALL_SWIN])
def test_evaluation_is_deterministic_and_channels_last_gives_equal_numbers(changes: dict[str, object]) -> None:
    network = build_network(config(SMALL, changes)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        one, two = network(images), network(images)
        network.to(memory_format=torch.channels_last)
        last = network(images.contiguous(memory_format=torch.channels_last))
    for first, second, other in zip(one, two, last, strict=True):
        assert torch.equal(first, second)
        assert relative_error(other, first) < 1e-5


@pytest.mark.parametrize("changes", [ENCODER, SMALL_SWIN, PER_PIXEL])
def test_smallest_images(changes: dict[str, object]) -> None:
    # Two channels a group: a group of one number has no variance.
    network = build_network(config(SMALL, {"SEM_SEG_HEAD.CONVS_DIM": 64}, changes)).eval()
    for height, width in ((1, 1), (5, 70)):
        output = first_output(network(torch.randn(1, 3, height, width)))
        assert output.shape[-2:] == (-(-height // 4), -(-width // 4))
        assert output.isfinite().all()


@pytest.mark.parametrize("changes", [ENCODER, SMALL_SWIN])
def test_network_exports(changes: dict[str, object]) -> None:
    network = build_network(config(SMALL, changes)).eval()
    images = torch.randn(1, 3, 75, 118)
    exported = torch.export.export(network, (images,)).module()
    with torch.no_grad():
        for ours, theirs in zip(network(images), exported(images), strict=True):
            assert relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize("changes", [ENCODER, SMALL_SWIN])
def test_network_compiles_for_all_sizes(changes: dict[str, object]) -> None:
    # Two stages, because tracing symbolic sizes through all four takes half a minute.
    source = "transformer_encoder" if changes is ENCODER else "res3"
    shallow = {
        "SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3"],
        "MASK_FORMER.TRANSFORMER_IN_FEATURE": source,
        "MASK_FORMER.DEC_LAYERS": 1,
        "SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    }
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    network = build_network(config(SMALL, changes, shallow)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((181, 202), (224, 192), (160, 259), (192, 352)):
            images = torch.randn(1, 3, *size)
            for ours, theirs in zip(network(images), compiled(images), strict=True):
                assert relative_error(theirs, ours) < 1e-5
    # One graph, or two: on CPU the algorithm of a convolution depends on whether its map is small.
    assert len(graphs) <= 2


@pytest.mark.parametrize("changes", [ENCODER, SMALL_SWIN])
def test_reduced_precision_stays_reduced_and_close(changes: dict[str, object]) -> None:
    network = build_network(config(SMALL, {"RESNETS.NORM": "FrozenBN"}, changes)).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = network(images)
    with torch.no_grad():
        full = network(images)
    for ours, theirs in zip(low, full, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours.float(), theirs) < 0.1


# ---------------------------------------------------------------- config
def test_build_reads_every_key_of_the_transformer() -> None:
    changes = {
        "MASK_FORMER.ENC_LAYERS": 2,
        "MASK_FORMER.DEC_LAYERS": 4,
        "MASK_FORMER.DROPOUT": 0.3,
        "MASK_FORMER.PRE_NORM": True,
        "MASK_FORMER.DEEP_SUPERVISION": False,
        "MASK_FORMER.ENFORCE_INPUT_PROJ": True,
        "MASK_FORMER.TRANSFORMER_IN_FEATURE": "res3",
        "MASK_FORMER.NUM_OBJECT_QUERIES": 11,
    }
    network = build_network(config(SMALL, changes))
    head = network.head
    assert len(head.transformer.encoder.layers) == 2
    assert len(head.transformer.decoder.layers) == 4
    assert head.transformer.encoder.norm is not None
    assert {m.p for m in head.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert head.input_projection.weight.shape == (32, 128, 1, 1)
    assert head.transformer.decoder.layers[0].linear1.out_features == 48
    assert head.transformer.decoder.layers[0].cross_attn.num_heads == 4
    assert head.query_positions.weight.shape == (11, 32)
    assert head.mask_head.layers[2].out_features == 16
    assert head.class_head.out_features == 6
    assert not head.deep_supervision
    assert network.transformer_in_feature == "res3"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"META_ARCHITECTURE": "MaskRCNN"}, "MODEL.META_ARCHITECTURE 'MaskRCNN' is unknown: choose one of MaskFormer"),
        ({"SEM_SEG_HEAD.NAME": "Head"}, "SEM_SEG_HEAD.NAME 'Head' does not fit .*'MaskFormer': choose MaskFormerHead"),
        ({"META_ARCHITECTURE": "SemanticSegmentor"}, "choose PerPixelBaselineHead or PerPixelBaselinePlusHead"),
        ({"SEM_SEG_HEAD.NUM_CLASSES": 0}, "NUM_CLASSES is 0: set it to 1 or more"),
        ({"MASK_FORMER.HIDDEN_DIM": 250}, "HIDDEN_DIM 250 must be a multiple of MODEL.MASK_FORMER.NHEADS 8"),
        ({"MASK_FORMER.DEC_LAYERS": 0}, "MODEL.MASK_FORMER.DEC_LAYERS is 0: set it to 1 or more"),
        ({"MASK_FORMER.ENC_LAYERS": -1}, "MODEL.MASK_FORMER.ENC_LAYERS is -1: set it to 0 or more"),
        ({"MASK_FORMER.NUM_OBJECT_QUERIES": 0}, "NUM_OBJECT_QUERIES is 0: set it to 1 or more"),
        ({"MASK_FORMER.DROPOUT": 1.0}, "MODEL.MASK_FORMER.DROPOUT is 1.0: set it to at least 0 and less than 1"),
        (
            PER_PIXEL_PLUS | {"MASK_FORMER.NUM_OBJECT_QUERIES": 100},
            "NUM_OBJECT_QUERIES is 100, .*set it to MODEL.SEM_SEG_HEAD.NUM_CLASSES, 150",
        ),
        (
            {"MASK_FORMER.TRANSFORMER_IN_FEATURE": "transformer_encoder"},
            "'transformer_encoder' needs MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME 'TransformerEncoderPixelDecoder'",
        ),
        ({"SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttn"}, "PIXEL_DECODER_NAME 'MSDeformAttn' is unknown"),
    ],
)
def test_build_refuses(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        meta_network(changes)
    assert "\n" not in str(caught.value)

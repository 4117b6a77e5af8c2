"""Models to transformers and back: the same numbers in both, and one sentence for what theirs cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer.build import build_model
from maskformer.checkpoint import checkpoint_metadata, load_weights
from maskformer.checkpoint.huggingface import huggingface_state_dict, join_projections, our_names
from maskformer.config import get_cfg
from maskformer.convert import main
from maskformer.data.catalog import get_metadata
from maskformer.errors import UserError
from maskformer.integrations.huggingface import config_from_huggingface, export_huggingface, metadata_from_huggingface
from maskformer.modeling.inference import semantic_scores
from maskformer.predictor import Predictor

transformers = pytest.importorskip("transformers")

STAGES = ["stage1", "stage2", "stage3", "stage4"]
CLASSES = 7
SMALL_DETR = {"d_model": 64, "decoder_layers": 2, "decoder_ffn_dim": 48, "num_queries": 9, "decoder_attention_heads": 4}


def make_theirs(backbone: Any, **decoder: Any) -> Any:
    """A random `MaskFormerForInstanceSegmentation` with every parameter, statistic and bias away from its start."""
    config = transformers.MaskFormerConfig(
        backbone_config=backbone,
        decoder_config=transformers.DetrConfig(**decoder),
        num_labels=CLASSES,
        fpn_feature_size=decoder.get("d_model", 256),
        mask_feature_size=decoder.get("d_model", 256),
    )
    torch.manual_seed(0)
    model = transformers.MaskFormerForInstanceSegmentation(config).eval()
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or "empty_weight" in name:
                continue
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.3 * noise(tensor).abs())
            elif tensor.dim() == 1:
                tensor.add_(0.1 * noise(tensor))
            elif name.endswith("queries_embedder.weight"):
                tensor.copy_(noise(tensor))
            else:
                tensor.add_(0.2 * tensor.std() * noise(tensor))
    return model


BACKBONES: dict[str, Callable[[], Any]] = {
    "ResNet-50": lambda: transformers.ResNetConfig(out_features=STAGES),
    "Swin-T": lambda: transformers.SwinConfig(image_size=224, window_size=7, out_features=STAGES),
}


@pytest.fixture(scope="module", params=list(BACKBONES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A whole model of theirs, ours filled from the folder that it saved, and the folder."""
    folder = tmp_path_factory.mktemp("saved")
    theirs = make_theirs(BACKBONES[request.param]())
    theirs.save_pretrained(folder)
    cfg = config_from_huggingface(folder, ["MODEL.DEVICE", "cpu"])
    ours = build_model(cfg, metadata_from_huggingface(folder)).eval()
    report = load_weights(ours, folder, strict=True)
    assert report.family == "Hugging Face MaskFormer"
    assert (report.missing, report.unexpected, report.reshaped) == ([], [], {})
    return theirs, ours, folder


def compare(ours: Any, theirs: Any, size: tuple[int, int], tolerance: float = 1e-4) -> tuple[Any, Any]:
    """Class and mask logits of one normalised tensor, of ours and of theirs, which must be equal."""
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine = ours.network(images)
        other = theirs(pixel_values=images)
    for logits, wanted in (
        (mine.class_logits[-1], other.class_queries_logits),
        (mine.mask_logits[-1], other.masks_queries_logits),
    ):
        assert logits.shape == wanted.shape
        assert float(wanted.std()) > 1e-3
        assert float((logits - wanted).abs().max()) < tolerance
    return mine, other


def spread(theirs: Any, images: Tensor, sharper: float) -> None:
    """Changes weights so that queries differ: those of a random transformer are alike, and one class wins everywhere.

    Args:
        theirs: the model.
        images: for which class logits shall vary by 2 and mask logits by 1 from query to query.
        sharper: factor on attention logits, so that queries look at different places.
    """
    weights, kept = dict(theirs.named_parameters()), {}
    hook = theirs.mask_embedder.register_forward_hook(lambda module, given, made: kept.update(embedding=made[0]))
    with torch.no_grad():
        for name, tensor in weights.items():
            if "transformer_module" in name and name.endswith("q_proj.weight"):
                tensor.mul_(sharper)
        outputs = theirs(pixel_values=images)
        hook.remove()
        class_logits, mask_logits = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
        common = {"class_predictor": class_logits.mean(0), "mask_embedder.2.0": kept["embedding"].mean(0)}
        class_logits, mask_logits = class_logits - class_logits.mean(0), mask_logits - mask_logits.mean(0)
        factors = {"class_predictor": 2 / class_logits.std(), "mask_embedder.2.0": 1 / mask_logits.std()}
        for name, factor in factors.items():
            weights[f"{name}.weight"].mul_(factor)
            weights[f"{name}.bias"].sub_(common[name]).mul_(factor)
        shift, masks = torch.zeros(CLASSES + 1), mask_logits * factors["mask_embedder.2.0"]
        for _ in range(20):  # until each class has about the same score over all pixels
            scores = semantic_scores(class_logits * factors["class_predictor"] + shift, masks).mean(dim=(1, 2))
            shift[:-1] -= scores.log() - scores.log().mean()
        weights["class_predictor.bias"].add_(shift)


@pytest.mark.parametrize("size", [(384, 512), (333, 217)], ids=str)
def test_logits_equal_those_of_transformers(pair: tuple[Any, Any, Path], size: tuple[int, int]) -> None:
    theirs, ours, _ = pair
    compare(ours, theirs, size)


@pytest.mark.parametrize("size", [(384, 512), (333, 217)], ids=str)
@pytest.mark.parametrize(("name", "sharper"), [("ResNet-50", 12), ("Swin-T", 50)])
def test_label_maps_equal_those_of_transformers(
    tmp_path: Path, name: str, sharper: float, size: tuple[int, int]
) -> None:
    """Each with its own outputs and its own code, theirs unchanged, at both sizes at which masks can be summed."""
    theirs = make_theirs(BACKBONES[name]())
    spread(theirs, torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)), sharper)
    theirs.save_pretrained(tmp_path)
    ours = build_model(config_from_huggingface(tmp_path, ["MODEL.DEVICE", "cpu"])).eval()
    load_weights(ours, tmp_path, strict=True)
    # Sharper attention makes rounding errors larger, from layer to layer.
    mine, other = compare(ours, theirs, size, tolerance=5e-4)
    label_maps = transformers.MaskFormerImageProcessor().post_process_semantic_segmentation

    def enlarged(maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    class_logits, mask_logits = mine.class_logits[-1], mine.mask_logits[-1]
    # What theirs does: it sums masks at a quarter of the size.
    summed_small = enlarged(semantic_scores(class_logits[0], mask_logits[0])[None])[0]
    compare_label_maps(summed_small, label_maps(other, target_sizes=[size])[0])
    # What the paper does; theirs does it too, given masks of full size.
    full = type(other)(
        class_queries_logits=other.class_queries_logits, masks_queries_logits=enlarged(other.masks_queries_logits)
    )
    compare_label_maps(semantic_scores(class_logits[0], enlarged(mask_logits)[0]), label_maps(full)[0])


def compare_label_maps(scores: Tensor, theirs: Tensor) -> None:
    """Our scores (K, H, W), their labels (H, W): the same winner wherever two classes do not tie to rounding."""
    best, ours = scores.max(dim=0)
    assert ours.shape == theirs.shape
    counts = theirs.flatten().bincount(minlength=CLASSES)
    assert float(counts.min()) > 0.02 * theirs.numel(), "some class is nearly nowhere"
    chosen_there = scores.gather(0, theirs[None])[0]
    assert float((best - chosen_there).max()) < 1e-4 * float(scores.max())
    # At most 15 of 196608 pixels where this was written.
    assert float((ours != theirs).float().mean()) < 2e-4


def test_converted_back_it_loads_there(pair: tuple[Any, Any, Path], tmp_path: Path, capsys: Any) -> None:
    theirs, ours, folder = pair
    assert main(["--weights", str(folder), "--to", "huggingface", "--output", str(tmp_path / "back")]) == 0
    assert "of 23 tensors filled" in capsys.readouterr().out
    loaded, info = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    for name, tensor in theirs.state_dict().items():
        if name.startswith("model.pixel_level_module.encoder.model.layernorm."):
            continue  # nothing reads it
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.id2label == {i: f"LABEL_{i}" for i in range(CLASSES)}
    compare(ours, loaded.eval(), (96, 131))


# ------------------------------------------------------------------ small models
def small_theirs(kind: str) -> Any:
    backbone = {
        "resnet": lambda: transformers.ResNetConfig(
            depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", out_features=STAGES
        ),
        "swin": lambda: transformers.SwinConfig(
            embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=5, out_features=STAGES
        ),
    }[kind]()
    return make_theirs(backbone, **SMALL_DETR)


@pytest.mark.parametrize("kind", ["resnet", "swin"])
@pytest.mark.parametrize("form", ["bin", "shards", "without prefix"])
def test_every_form_of_a_saved_model_is_read(tmp_path: Path, kind: str, form: str) -> None:
    theirs = small_theirs(kind)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB" if form == "shards" else "1GB")
    weights = tmp_path / "model.safetensors"
    strict = True
    if form == "shards":
        assert (tmp_path / "model.safetensors.index.json").is_file()
        assert not weights.exists()
    elif form == "bin":
        torch.save(safetensors.torch.load_file(weights), tmp_path / "pytorch_model.bin")
        weights.unlink()
    else:  # MaskFormerModel, which has no heads
        strict = False
        state = safetensors.torch.load_file(weights)
        state = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
        safetensors.torch.save_file(state, weights)
    ours = build_model(config_from_huggingface(tmp_path, ["MODEL.DEVICE", "cpu"])).eval()
    report = load_weights(ours, tmp_path, strict=strict, min_fit=0.8)
    if strict:
        compare(ours, theirs, (75, 101))
    else:
        assert {name.split(".")[2] for name in report.missing} == {"class_head", "mask_head"}
        assert report.unexpected == []


def test_names_in_memory_are_read_as_well() -> None:
    """Newer versions spell some names otherwise in memory than in files."""
    theirs = small_theirs("resnet").state_dict()
    names = our_names(join_projections(theirs))
    unknown = {name for name, ours in names.items() if not ours.startswith("network.")}
    assert all(name.endswith("num_batches_tracked") or name.startswith("criterion.") for name in unknown)
    assert names["model.transformer_module.decoder.layers.1.mlp.fc1.bias"].endswith("layers.1.linear1.bias")


def test_levels_are_counted_from_the_other_end() -> None:
    fpn = "model.pixel_level_module.decoder.fpn."
    names = our_names(
        [f"{fpn}stem.0.weight", *(f"{fpn}layers.{i}.{k}.1.bias" for i in range(3) for k in ("proj", "block"))]
    )
    assert names[f"{fpn}stem.0.weight"] == "network.pixel_decoder.output.3.conv.weight"
    assert names[f"{fpn}layers.0.proj.1.bias"] == "network.pixel_decoder.lateral.2.norm.bias"
    assert names[f"{fpn}layers.2.block.1.bias"] == "network.pixel_decoder.output.0.norm.bias"


def test_projections_are_stacked_in_the_order_query_key_value() -> None:
    parts = {f"a.{name}.weight": torch.full((2, 2), float(i)) for i, name in enumerate(("query", "key", "value"))}
    joined = join_projections({"a.key.weight": parts["a.key.weight"], **parts, "b.query.bias": torch.ones(1)})
    assert joined["a.{query,key,value}.weight"].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]
    assert list(joined) == ["a.{query,key,value}.weight", "b.query.bias"]


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    small_theirs("swin").save_pretrained(tmp_path)
    cfg = get_cfg("configs/ade20k-150/maskformer_R50_bs16_160k.yaml", ["MODEL.DEVICE", "cpu"])
    with pytest.raises(UserError, match="another backbone"):
        load_weights(build_model(cfg), tmp_path)


def test_parts_of_another_type_are_refused_before_they_are_joined(tmp_path: Path) -> None:
    small_theirs("resnet").save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "model.transformer_module.decoder.layers.0.self_attn.k_proj.weight"
    state[name] = state[name].to(torch.int8)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    model = build_model(config_from_huggingface(tmp_path, ["MODEL.DEVICE", "cpu"]))
    with pytest.raises(UserError, match=rf"{name} is int8, strided, where weights are dense"):
        load_weights(model, tmp_path)


def test_without_the_refusal_what_fits_is_taken(tmp_path: Path) -> None:
    small_theirs("swin").save_pretrained(tmp_path)
    settings = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 5]
    model = build_model(config_from_huggingface(tmp_path, settings))
    with pytest.raises(UserError, match="NUM_OBJECT_QUERIES"):
        load_weights(model, tmp_path)
    report = load_weights(model, tmp_path, min_fit=0)
    assert set(report.reshaped) == {
        f"network.head.{name}" for name in ("query_positions.weight", "class_head.weight", "class_head.bias")
    }
    assert "initialised anew, numbers of queries differ: network.head.query_positions.weight" in report.summary()
    assert "initialised anew, classes differ: network.head.class_head.weight" in report.summary()


# ------------------------------------------------------------------ folders that we write
ADE = "configs/ade20k-150/"
R50 = ADE + "maskformer_R50_bs16_160k.yaml"
SMALL = (
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "DATASETS.TRAIN", ("shapes_panoptic_train",)),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", 64, "MODEL.MASK_FORMER.DEC_LAYERS", 2, "DATASETS.TEST", ()),
)


def small_ours(*overrides: Any) -> tuple[Any, nn.Module]:
    cfg = get_cfg(R50, ["MODEL.DEVICE", "cpu", *SMALL, *overrides])
    return cfg, build_model(cfg)


def test_a_folder_of_ours_is_complete(tmp_path: Path) -> None:
    cfg, model = small_ours()
    metadata = get_metadata("shapes_panoptic_train")
    written = export_huggingface(model, cfg, metadata, tmp_path / "hub", license_name="mit")
    assert {path.name for path in written} == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "README.md",
    }
    card = (tmp_path / "hub/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "**Training data**: shapes_panoptic_train" in card
    assert "CC BY-NC 4.0" in card
    assert max(map(len, card.splitlines())) <= 120
    loaded, info = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
        tmp_path / "hub", output_loading_info=True
    )
    assert not any(info.values()), info
    assert list(loaded.config.id2label.values()) == metadata.classes
    compare_small = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        wanted = model.eval().network(compare_small).mask_logits[-1]
        assert float((loaded.eval()(compare_small).masks_queries_logits - wanted).abs().max()) < 1e-4
    # And back: the classes, which are things, and a prediction without the data set.
    assert checkpoint_metadata(tmp_path / "hub") == metadata
    again = Predictor(config_from_huggingface(tmp_path / "hub"), device="cpu")
    assert again.metadata.things == metadata.things
    assert again.cfg.MODEL.WEIGHTS == str(tmp_path / "hub")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_images_go_through_the_same_numbers_there(tmp_path: Path) -> None:
    cfg, model = small_ours("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96)
    export_huggingface(model, cfg, get_metadata("shapes_panoptic_train"), tmp_path)
    processor = transformers.MaskFormerImageProcessor.from_pretrained(tmp_path)
    picture = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8).numpy()
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN), torch.tensor(cfg.MODEL.PIXEL_STD)
    wanted = ((torch.from_numpy(picture).float() - mean) / std).permute(2, 0, 1)[None]
    assert torch.allclose(pixels, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (ADE + "per_pixel_baseline_R50_bs16_160k.yaml", (), r"no per-pixel heads \(MODEL\.SEM_SEG_HEAD\.NAME"),
        (ADE + "per_pixel_baseline_plus_R50_bs16_160k.yaml", (), r"no per-pixel heads"),
        (
            "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml",
            (),
            r"no transformer encoder in its pixel decoder \(MODEL\.SEM_SEG_HEAD\.PIXEL_DECODER_NAME",
        ),
        (ADE + "maskformer_R101c_bs16_160k.yaml", (), r"no deep stem in its ResNet \(MODEL\.RESNETS\.STEM_TYPE"),
        (R50, ("MODEL.MASK_FORMER.ENC_LAYERS", 1), r"no transformer encoder \(MODEL\.MASK_FORMER\.ENC_LAYERS 1\)"),
        (R50, ("MODEL.MASK_FORMER.PRE_NORM", True), r"MODEL\.MASK_FORMER\.PRE_NORM"),
        (
            R50,
            ("MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", True, "MODEL.MASK_FORMER.HIDDEN_DIM", 2048),
            r"no input projection that changes no width \(MODEL\.MASK_FORMER\.ENFORCE_INPUT_PROJ True\)",
        ),
        (R50, ("MODEL.SEM_SEG_HEAD.NORM", "BN"), r"MODEL\.SEM_SEG_HEAD\.NORM 'BN'"),
        (R50, ("MODEL.RESNETS.RES5_DILATION", 2), r"no dilation in its ResNet"),
        (R50, ("INPUT.FORMAT", "BGR"), r"INPUT\.FORMAT is 'BGR'"),
        (
            R50,
            ("MODEL.BACKBONE.NAME", "timm", "MODEL.TIMM.NAME", "resnet10t"),
            r"no such backbone \(MODEL\.BACKBONE\.NAME 'timm'\)",
        ),
        (ADE + "swin/maskformer_swin_tiny_bs16_160k.yaml", ("MODEL.SWIN.APE", True), r"MODEL\.SWIN\.APE"),
    ],
)
def test_what_theirs_cannot_be_is_one_sentence(
    tmp_path: Path, config: str, overrides: tuple[Any, ...], message: str
) -> None:
    cfg = get_cfg(config, ["MODEL.DEVICE", "cpu", *overrides])
    with pytest.raises(UserError, match=message) as caught:
        export_huggingface(nn.Module(), cfg, get_metadata("shapes_panoptic_train"), tmp_path / "hub")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hub").exists()


def test_names_without_a_place_are_refused() -> None:
    with pytest.raises(UserError, match=r"has no place for network\.head\.classifier\.weight"):
        huggingface_state_dict({"network.head.classifier.weight": torch.zeros(1)})

"""Filling a model: every family of files, reports, and refusals that say why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from maskformer.checkpoint import export_published, load_weights, published_state_dict, save_checkpoint
from maskformer.errors import UserError

from .conftest import PER_PIXEL, SWIN
from .files import DEEP, equal, file_of, randomised, save

Make = Callable[..., nn.Module]


def test_own_checkpoints_are_read(tmp_path: Path, small_model: Make) -> None:
    source, model = randomised(small_model()), small_model()
    report = load_weights(model, save_checkpoint(tmp_path, 9, model=source), strict=True)
    assert report.family == "maskformer"
    assert equal(model, source)


def test_backbone_only_resnet_of_detectron2(tmp_path: Path, small_model: Make) -> None:
    source, model = randomised(small_model()), small_model()
    before = copy.deepcopy(model)
    state = {
        name.removeprefix("backbone."): t for name, t in published_state_dict(source).items() if "backbone." in name
    }
    state["stem.fc.weight"] = torch.zeros(10, 512)
    state["stem.conv1.norm.num_batches_tracked"] = torch.tensor(0)
    path = save(tmp_path / "R-18.pkl", state, matching_heuristics=True, __author__="torchvision")
    report = load_weights(model, path)
    assert report.family == "Detectron2 ResNet"
    assert (report.missing, report.unexpected) == ([], [])
    assert equal(model, source, "network.backbone.")
    assert equal(model, before, "network.head.")
    assert equal(model, before, "network.pixel_decoder.")
    assert report.parts["head"][0] == 0
    assert "head: 0 of " in report.summary()
    assert "stays as initialised" in report.summary()
    with pytest.raises(UserError, match="the file has nothing for the pixel decoder, head"):
        load_weights(model, path, strict=True)


def test_deep_stem_of_detectron2(tmp_path: Path, small_model: Make) -> None:
    source, model = randomised(small_model(**DEEP)), small_model(**DEEP)
    state = {
        name.removeprefix("backbone."): t for name, t in published_state_dict(source).items() if "backbone." in name
    }
    assert {"stem.conv1.weight", "stem.conv2.weight", "stem.conv3.norm.bias"} <= state.keys()
    load_weights(model, save(tmp_path / "R-103.pkl", state))
    assert equal(model, source, "network.backbone.")


def test_torchvision_resnet(tmp_path: Path, small_model: Make) -> None:
    source, model = randomised(small_model()), small_model()
    start = "network.backbone.body."
    state = {name.removeprefix(start): t for name, t in source.state_dict().items() if name.startswith(start)}
    torch.save({**state, "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}, tmp_path / "resnet.pth")
    report = load_weights(model, tmp_path / "resnet.pth")
    assert (report.family, report.unexpected, report.missing) == ("torchvision ResNet", [], [])
    assert equal(model, source, "network.backbone.")


def test_original_swin(tmp_path: Path, small_model: Make) -> None:
    source, model = randomised(small_model(SWIN)), small_model(SWIN)
    before = copy.deepcopy(model)
    state = {
        name.removeprefix("backbone."): t for name, t in published_state_dict(source).items() if "backbone." in name
    }
    state = {
        name: tensor for name, tensor in state.items() if not name.startswith(("norm0", "norm1", "norm2", "norm3"))
    }
    extra = {
        "norm.weight": torch.ones(96),
        "head.bias": torch.ones(9),
        "layers.0.blocks.1.attn_mask": torch.ones(4, 9, 9),
    }
    torch.save({"model": {**state, **extra}}, tmp_path / "swin.pth")
    report = load_weights(model, tmp_path / "swin.pth")
    assert report.family == "original Swin"
    assert report.unexpected == []
    assert report.missing == [f"network.backbone.norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    assert equal(model, source, "network.backbone.layers.")
    assert equal(model, before, "network.backbone.norm")
    with pytest.raises(UserError, match=r"does not fill this model completely.* lacks network\.backbone\.norm0"):
        load_weights(model, tmp_path / "swin.pth", strict=True)


def test_names_matched_by_their_ends(tmp_path: Path, small_model: Make) -> None:
    """Detectron2's flag also covers files of other parts; without the flag such names are not guessed at."""
    source, model = randomised(small_model()), small_model()
    start = "sem_seg_head.pixel_decoder."
    state = {name.removeprefix(start): t for name, t in published_state_dict(source).items() if name.startswith(start)}
    report = load_weights(model, save(tmp_path / "a.pkl", state, matching_heuristics=True))
    assert len(report.loaded) == len(state)
    assert equal(model, source, "network.pixel_decoder.")
    with pytest.raises(UserError, match="are of no known family"):
        load_weights(model, save(tmp_path / "b.pkl", state))


def test_another_number_of_classes_keeps_exactly_the_class_layer(tmp_path: Path, small_model: Make) -> None:
    source, model = small_model(), small_model(MODEL__SEM_SEG_HEAD__NUM_CLASSES=3)
    before = copy.deepcopy(model)
    path = file_of(source, tmp_path / "model.pkl")
    report = load_weights(model, path)
    layer = "network.head.class_head."
    assert report.reshaped == {f"{layer}weight": ((6, 32), (4, 32)), f"{layer}bias": ((6,), (4,))}
    assert (report.missing, report.unexpected) == ([], [])
    assert equal(model, before, layer)
    for name, tensor in model.state_dict().items():
        assert name.startswith(layer) or torch.equal(tensor, source.state_dict()[name]), name
    assert (
        "initialised anew, classes differ: network.head.class_head.weight (4, 32) (file: (6, 32))" in report.summary()
    )
    with pytest.raises(UserError, match=r"number of classes differs in network\.head\.class_head\.weight"):
        load_weights(model, path, strict=True)


@pytest.mark.parametrize(
    ("settings", "reshaped"),
    [
        ({"config": PER_PIXEL}, ["classifier.weight", "classifier.bias"]),
        (
            {"config": PER_PIXEL, "MODEL__SEM_SEG_HEAD__NAME": "PerPixelBaselinePlusHead"},
            ["query_positions.weight"],
        ),
        (
            {"MODEL__MASK_FORMER__MATCHER": "fixed"},
            ["query_positions.weight", "class_head.weight", "class_head.bias"],
        ),
    ],
    ids=["per-pixel", "per-pixel+", "fixed"],
)
def test_another_number_of_classes_elsewhere(
    tmp_path: Path, small_model: Make, settings: dict[str, Any], reshaped: list[str]
) -> None:
    def of(classes: int) -> nn.Module:
        counts = {"MODEL__SEM_SEG_HEAD__NUM_CLASSES": classes, "MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": classes}
        return small_model(**settings, **counts)

    report = load_weights(of(3), file_of(of(5), tmp_path / "model.pkl"))
    assert sorted(report.reshaped) == sorted(f"network.head.{name}" for name in reshaped)
    assert report.missing == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": 9}, r"\(7, 32\) but the model's is \(9, 32\).*NUM_OBJECT_QUERIES$"),
        ({"MODEL__MASK_FORMER__HIDDEN_DIM": 64}, r"MODEL\.MASK_FORMER\.HIDDEN_DIM$"),
        ({"MODEL__MASK_FORMER__DIM_FEEDFORWARD": 64}, r"MODEL\.MASK_FORMER\.DIM_FEEDFORWARD$"),
        ({"MODEL__SEM_SEG_HEAD__MASK_DIM": 64}, r"MODEL\.SEM_SEG_HEAD\.MASK_DIM$"),
        ({"MODEL__SEM_SEG_HEAD__CONVS_DIM": 64}, r"MODEL\.SEM_SEG_HEAD\.CONVS_DIM$"),
        ({"MODEL__RESNETS__DEPTH": 34}, r"another backbone.*MODEL\.RESNETS\.DEPTH"),
        ({"MODEL__RESNETS__DEPTH": 50}, r"MODEL\.RESNETS\.DEPTH"),
        (DEEP, r"MODEL\.RESNETS\.STEM_TYPE"),
        ({"MODEL__MASK_FORMER__DEC_LAYERS": 1}, r"another head.*the model lacks.*MODEL\.MASK_FORMER\.DEC_LAYERS"),
        ({"MODEL__MASK_FORMER__DEC_LAYERS": 3}, r"another head.*the file lacks.*MODEL\.MASK_FORMER\.DEC_LAYERS"),
        ({"config": PER_PIXEL}, r"another head.*MODEL\.SEM_SEG_HEAD\.NAME"),
        ({"config": SWIN}, r"another backbone.*MODEL\.BACKBONE\.NAME"),
        ({"MODEL__SEM_SEG_HEAD__NORM": ""}, r"another pixel decoder.*MODEL\.SEM_SEG_HEAD"),
        (
            {
                "MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
                "MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS": 1,
                "MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "transformer_encoder",
            },
            r"PIXEL_DECODER_NAME",
        ),
    ],
    ids=str,
)
def test_files_of_other_models_are_refused_and_nothing_is_copied(
    tmp_path: Path, small_model: Make, settings: dict[str, Any], message: str
) -> None:
    path = file_of(small_model(), tmp_path / "model.pkl")
    model = small_model(**settings)
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert equal(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL__SWIN__NUM_HEADS": (2, 2, 2, 4)}, r"MODEL\.SWIN\.NUM_HEADS$"),
        ({"MODEL__SWIN__EMBED_DIM": 16}, r"MODEL\.SWIN\.EMBED_DIM$"),
        ({"MODEL__SWIN__DEPTHS": (2, 2, 6, 2)}, r"another backbone.*MODEL\.SWIN\.DEPTHS"),
    ],
    ids=str,
)
def test_files_of_other_swins_are_refused(
    tmp_path: Path, small_model: Make, settings: dict[str, Any], message: str
) -> None:
    path = file_of(small_model(SWIN), tmp_path / "model.pkl")
    with pytest.raises(UserError, match=message):
        load_weights(small_model(SWIN, **settings), path)


def test_stages_that_nothing_reads_may_be_in_the_file(tmp_path: Path, small_model: Make) -> None:
    source = randomised(small_model())
    state = {
        name.removeprefix("backbone."): t for name, t in published_state_dict(source).items() if "backbone." in name
    }
    shallow = {
        "MODEL__SEM_SEG_HEAD__IN_FEATURES": ("res2", "res3"),
        "MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "res3",
    }
    model = small_model(**shallow)
    report = load_weights(model, save(tmp_path / "R-18.pkl", state))
    assert all(name.startswith(("res4", "res5")) for name in report.unexpected)
    assert report.parts["backbone"][0] == report.parts["backbone"][1]
    assert "in the file but not in the model" in report.summary()


def test_the_refusal_of_a_bad_fit_can_be_switched_off(tmp_path: Path, small_model: Make) -> None:
    source = randomised(small_model())
    path = export_published(source, tmp_path / "model.pkl")
    deeper = small_model(MODEL__MASK_FORMER__DEC_LAYERS=3)
    with pytest.raises(UserError, match=r"lower MODEL\.WEIGHTS_MIN_FIT"):
        load_weights(deeper, path)
    report = load_weights(deeper, path, min_fit=0.5)
    assert all(".decoder.layers.2." in name for name in report.missing)
    assert len(report.missing) == 18
    assert equal(source, deeper)

    # Shapes that differ are no question of how many fit, unless all are welcome.
    wider = small_model(MODEL__SEM_SEG_HEAD__CONVS_DIM=64)
    before = copy.deepcopy(wider)
    with pytest.raises(UserError, match=r"MODEL\.SEM_SEG_HEAD\.CONVS_DIM$"):
        load_weights(wider, path, min_fit=0.1)
    assert equal(wider, before)
    report = load_weights(wider, path, min_fit=0)
    assert report.reshaped["network.pixel_decoder.embedding.weight"] == ((32, 32, 3, 3), (32, 64, 3, 3))
    assert "initialised anew, shapes differ: network.pixel_decoder.embedding.weight" in report.summary()
    assert report.parts["pixel decoder"][0] < report.parts["pixel decoder"][1]
    assert equal(wider, source, "network.head.")
    assert torch.equal(
        wider.state_dict()["network.pixel_decoder.embedding.weight"],
        before.state_dict()["network.pixel_decoder.embedding.weight"],
    )
    with pytest.raises(UserError, match=r"MODEL\.SEM_SEG_HEAD\.CONVS_DIM"):
        load_weights(wider, path, strict=True, min_fit=0)


def test_a_file_of_something_else_is_refused(tmp_path: Path, small_model: Make) -> None:
    path = save(tmp_path / "a.pkl", {"backbone.bottom_up.res2.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"holds nothing that fits this model, only names such as backbone\.bottom_up"):
        load_weights(small_model(), path)


def test_a_name_twice_is_refused(tmp_path: Path, small_model: Make) -> None:
    state = published_state_dict(small_model())
    state["sem_seg_head.layer_1.weight"] = state["sem_seg_head.pixel_decoder.layer_1.weight"]
    with pytest.raises(UserError, match=r"network\.pixel_decoder\.output\.0\.conv\.weight twice, as"):
        load_weights(small_model(), save(tmp_path / "a.pkl", state))


def test_a_few_missing_names_are_reported(tmp_path: Path, small_model: Make) -> None:
    state = published_state_dict(small_model())
    del state["sem_seg_head.predictor.class_embed.bias"]
    state["sem_seg_head.predictor.extra"] = torch.zeros(1)
    report = load_weights(small_model(), save(tmp_path / "a.pkl", state))
    assert report.missing == ["network.head.class_head.bias"]
    assert report.unexpected == ["sem_seg_head.predictor.extra"]
    assert "not in the file, stay as initialised: 1 (network.head.class_head.bias)" in report.summary()


def test_values_that_are_not_finite_are_reported(tmp_path: Path, small_model: Make) -> None:
    state = published_state_dict(small_model())
    state["sem_seg_head.predictor.class_embed.bias"][0] = torch.nan
    report = load_weights(small_model(), save(tmp_path / "a.pkl", state))
    assert report.not_finite == ["network.head.class_head.bias"]
    assert "WARNING" in report.summary()
    with pytest.raises(UserError, match=r"values are not finite in network\.head\.class_head\.bias"):
        load_weights(small_model(), tmp_path / "a.pkl", strict=True)


def test_half_precision_files_fill_float32_models(tmp_path: Path, small_model: Make) -> None:
    state = {name: tensor.half() for name, tensor in published_state_dict(small_model()).items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    model = small_model()
    load_weights(model, tmp_path / "a.safetensors", strict=True)
    assert all(tensor.dtype == torch.float32 for tensor in model.parameters())


def test_a_backbone_that_begins_otherwise_is_refused(tmp_path: Path, small_model: Make) -> None:
    """Of 100 tensors only the stem's are missing, but features of another stem mean something else."""
    state = {
        name.removeprefix("backbone."): t
        for name, t in published_state_dict(small_model()).items()
        if "backbone." in name
    }
    state["stem.conv1.0.weight"] = state.pop("stem.conv1.weight")
    path = save(tmp_path / "R-18.pkl", state)
    with pytest.raises(UserError, match=r"lacks the first convolution, network\.backbone\.body\.conv1\.weight: check"):
        load_weights(small_model(), path)
    assert load_weights(small_model(), path, min_fit=0).missing == ["network.backbone.body.conv1.weight"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", ["int8", "bool", "complex64", "sparse", "meta"])
def test_only_dense_real_numbers_are_weights(tmp_path: Path, small_model: Make, form: str, strict: bool) -> None:
    name = "sem_seg_head.predictor.class_embed.weight"
    state = published_state_dict(small_model())
    if form == "sparse":
        state[name] = state[name].to_sparse()
    else:
        state[name] = state[name].to("meta") if form == "meta" else state[name].to(getattr(torch, form))
    torch.save(state, tmp_path / "a.pth")
    model = small_model()
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match=rf"a\.pth: {name} is .*, where weights are dense floating-point numbers"):
        load_weights(model, tmp_path / "a.pth", strict=strict)
    assert equal(model, before)


def test_strict_loading_advises_nothing_that_it_does_not_read(tmp_path: Path, small_model: Make) -> None:
    path = export_published(small_model(), tmp_path / "model.pkl")
    with pytest.raises(UserError, match=r"or name weights that were trained with this config$") as caught:
        load_weights(small_model(MODEL__MASK_FORMER__DEC_LAYERS=3), path, strict=True)
    assert "WEIGHTS_MIN_FIT" not in str(caught.value)

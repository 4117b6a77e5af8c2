"""What transformers' config files say, in our words: read, refused with file, key and value, and never overlooked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskformer.build import build_model
from maskformer.checkpoint import checkpoint_metadata
from maskformer.config import get_cfg
from maskformer.data.catalog import get_metadata
from maskformer.errors import UserError
from maskformer.integrations.huggingface import config_from_huggingface, export_huggingface, metadata_from_huggingface
from maskformer.predictor import Predictor

transformers = pytest.importorskip("transformers")


def write_config(folder: Path, **changes: Any) -> Path:
    content = {
        "model_type": "maskformer",
        "backbone_config": {"model_type": "swin"},
        "decoder_config": {"model_type": "detr"},
        "id2label": {"0": "sky", "1": "sea"},
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_what_a_config_leaves_out_has_their_defaults(tmp_path: Path) -> None:
    cfg = config_from_huggingface(write_config(tmp_path), ["SEED", 3])
    defaults = transformers.SwinConfig()
    assert cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer"
    assert list(cfg.MODEL.SWIN.DEPTHS) == list(defaults.depths)
    assert (cfg.MODEL.SWIN.WINDOW_SIZE, cfg.MODEL.SWIN.EMBED_DIM) == (defaults.window_size, defaults.embed_dim)
    assert (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.SEED) == (2, 3)
    assert metadata_from_huggingface(tmp_path).classes == ["sky", "sea"]
    assert checkpoint_metadata(tmp_path) is None


def test_image_settings_are_read_in_both_spellings(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": 512, "max_size": 2048, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
    )
    cfg = config_from_huggingface(tmp_path)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (512, 2048)
    assert (list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)) == ([127.5] * 3, [63.75] * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mask2former"}, "describes a 'mask2former', not a maskformer"),
        ({"backbone_config": None}, "has no backbone_config"),
        ({"backbone_config": {"model_type": "convnext"}}, "only resnet and swin backbones"),
        ({"backbone_config": {"model_type": "resnet", "depths": [1, 1, 1, 1]}}, "ResNet of other depths"),
        ({"decoder_config": {"model_type": "bart"}}, "decoder_config.model_type is 'bart' but only 'detr' can be read"),
        ({"decoder_config": {"activation_function": "gelu"}}, "decoder_config.activation_function is 'gelu' but only"),
        *(
            ({"backbone_config": {"model_type": kind, key: value}}, rf"backbone_config\.{key} is .* but only")
            for kind, key, value in (
                ("resnet", "hidden_act", "gelu"),
                ("resnet", "downsample_in_bottleneck", True),
                ("resnet", "downsample_in_first_stage", True),
                ("resnet", "num_channels", 4),
                ("resnet", "out_features", ["stage2", "stage3", "stage4"]),
                ("swin", "hidden_act", "relu"),
                ("swin", "layer_norm_eps", 1e-6),
                ("swin", "num_channels", 1),
                ("swin", "use_absolute_embeddings", True),
            )
        ),
        ({"id2label": {"1": "sky"}}, "do not run from 0"),
        ({"id2label": {"sky": "0"}}, "damaged id2label"),
    ],
)
def test_configs_that_ours_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_from_huggingface(write_config(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)


def test_sources_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is no folder with a config\.json"):
        config_from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        config_from_huggingface(tmp_path)


def test_only_a_number_of_classes(tmp_path: Path) -> None:
    """Files of transformers leave out names that nobody gave."""
    cfg = config_from_huggingface(write_config(tmp_path, id2label=None, num_labels=5))
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 5
    assert metadata_from_huggingface(tmp_path).classes == [f"LABEL_{i}" for i in range(5)]
    with pytest.raises(UserError, match=r"config\.json: num_labels is 'five'"):
        config_from_huggingface(write_config(tmp_path, id2label=None, num_labels="five"))


def test_many_classes_leave_room_for_the_ignore_label(tmp_path: Path) -> None:
    cfg = config_from_huggingface(write_config(tmp_path, id2label={str(i): f"{i}" for i in range(847)}))
    assert (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE) == (847, 847)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder_config": {"d_model": "wide"}},
            r"decoder_config\.d_model: MODEL\.MASK_FORMER\.HIDDEN_DIM must be int",
        ),
        (
            {"decoder_config": {"num_queries": 0}},
            r"decoder_config\.num_queries: MODEL\.MASK_FORMER\.NUM_OBJECT_QUERIES",
        ),
        ({"backbone_config": {"model_type": "swin", "depths": None}}, r"backbone_config\.depths: MODEL\.SWIN\.DEPTHS"),
        ({"mask_weight": "heavy"}, r"mask_weight: MODEL\.MASK_FORMER\.MASK_WEIGHT must be float"),
        ({"maskformer": {"config": [1]}}, r"maskformer\.config is \[1\] where keys and values belong"),
        ({"maskformer": {"config": {"MODEL.DEVICE": "cpu"}}}, r"has the key 'MODEL\.DEVICE', which is none of those"),
    ],
)
def test_wrong_values_are_named_with_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_from_huggingface(write_config(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}")
    assert "command line" not in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ what images go through
def write_preprocessor(folder: Path, **content: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return write_config(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 1.0, 2.0]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [100.0, 110.0, 120.0], "image_std": [50.0, 60.0, 70.0]},
        {"do_rescale": False, "do_normalize": False},
    ],
    ids=str,
)
def test_pixels_become_the_numbers_that_theirs_become(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Against their processor, which does not resize here."""
    cfg = config_from_huggingface(write_preprocessor(tmp_path, do_resize=False, **changes))
    assert cfg.INPUT.MIN_SIZE_TEST == 0
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    processor = transformers.MaskFormerImageProcessor(do_resize=False, **changes)
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    mean, std = np.array(cfg.MODEL.PIXEL_MEAN), np.array(cfg.MODEL.PIXEL_STD)
    ours = torch.from_numpy(((picture - mean) / std).transpose(2, 0, 1))
    assert torch.allclose(ours.float(), theirs.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image_mean": 0.5}, r"image_mean is 0\.5 where three numbers belong"),
        ({"image_mean": "abc"}, r"image_mean is 'abc' where three numbers belong"),
        ({"image_mean": ["a"]}, r"image_mean is \['a'\] where three"),
        ({"image_mean": None}, r"image_mean is None where three numbers belong"),
        ({"image_std": [0.1, None, 0.1]}, r"image_std is .* where three numbers belong"),
        ({"image_std": [0.1, 0, 0.1]}, r"image_std: MODEL\.PIXEL_STD is .*change it"),
        ({"image_mean": [float("nan")] * 3}, r"image_mean is \[nan"),
        ({"rescale_factor": 0}, r"rescale_factor is 0 where a number above 0 belongs"),
        ({"do_normalize": "no"}, r"do_normalize is 'no' where true or false belongs"),
        ({"resample": 3}, r"resample is 3 but only 2 can be read"),
        ({"size": {"height": 512, "width": 512}}, r"size is .* but images are resized by their shorter side"),
        ({"size": "large"}, r"size: INPUT\.MIN_SIZE_TEST must be int"),
        ({"size": {"shortest_edge": None}}, r"size: INPUT\.MIN_SIZE_TEST must be int"),
    ],
    ids=str,
)
def test_damaged_image_settings_are_one_sentence(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_from_huggingface(write_preprocessor(tmp_path, **content))
    assert str(caught.value).startswith(f"{tmp_path / 'preprocessor_config.json'}")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ how results are made
SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5),
    *("DATASETS.TRAIN", ("shapes_panoptic_train",), "DATASETS.TEST", ()),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", 64, "MODEL.MASK_FORMER.DEC_LAYERS", 2),
)
TEST = "MODEL.MASK_FORMER.TEST."


def test_a_panoptic_model_gives_the_same_segments_from_its_folder(tmp_path: Path) -> None:
    settings = {
        f"{TEST}PANOPTIC_ON": True,
        f"{TEST}SEMANTIC_ON": False,
        f"{TEST}OBJECT_MASK_THRESHOLD": 0.2,
        f"{TEST}OVERLAP_THRESHOLD": 0.3,
        f"{TEST}SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": True,
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 0,
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 65,
        "INPUT.MIN_SIZE_TEST": 0,
        "MODEL.PIXEL_MEAN": [120.1234, 110.0, 100.0],
    }
    overrides = [*SMALL, *(part for pair in settings.items() for part in pair)]
    cfg = get_cfg("configs/ade20k-150/maskformer_R50_bs16_160k.yaml", overrides)
    torch.manual_seed(0)
    model, metadata = build_model(cfg).eval(), get_metadata("shapes_panoptic_train")
    with torch.no_grad():  # queries that differ in class and mask
        model.network.head.class_head.weight.normal_(0, 1)
        model.network.head.query_positions.weight.normal_(0, 10)
    export_huggingface(model, cfg, metadata, tmp_path)
    predictor = Predictor(config_from_huggingface(tmp_path), device="cpu")
    for key, value in settings.items():
        node: Any = predictor.cfg
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    prediction = predictor(picture)
    assert prediction.tasks == ["panoptic"]
    sample = {"image": torch.from_numpy(picture.transpose(2, 0, 1).copy()), "height": 70, "width": 90}
    with torch.inference_mode():
        ids, segments = model.infer([sample])[0]["panoptic_seg"]
    assert torch.equal(prediction["panoptic_seg"][0], ids)
    assert prediction["panoptic_seg"][1] == segments
    assert segments


def test_folders_of_others_get_the_published_thresholds(tmp_path: Path) -> None:
    """With 0 and 0, our defaults, all queries would be segments."""
    names = ("OBJECT_MASK_THRESHOLD", "OVERLAP_THRESHOLD")
    test = config_from_huggingface(write_config(tmp_path), [f"{TEST}PANOPTIC_ON", True]).MODEL.MASK_FORMER.TEST
    assert [test[name] for name in names] == [0.8, 0.8]
    test = config_from_huggingface(tmp_path, [f"{TEST}OVERLAP_THRESHOLD", 0.1]).MODEL.MASK_FORMER.TEST
    assert [test[name] for name in names] == [0.8, 0.1]

"""``maskformer convert``: from each kind of file to each, with what it says, and its refusals."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskformer import cli
from maskformer.build import build_model
from maskformer.checkpoint import checkpoint_metadata, export_published, load_checkpoint, save_checkpoint
from maskformer.checkpoint.huggingface import huggingface_state_dict
from maskformer.config import get_cfg
from maskformer.data.catalog import get_metadata
from maskformer.errors import UserError
from maskformer.predictor import Predictor

R50 = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"
SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", "64", "MODEL.MASK_FORMER.DEC_LAYERS", "2", "MODEL.WEIGHTS", ""),
    *("DATASETS.TRAIN", "('shapes_panoptic_train',)", "DATASETS.TEST", "()"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint of a small model."""
    model = build_model(get_cfg(R50, SMALL))
    folder = tmp_path_factory.mktemp("run")
    return save_checkpoint(folder, 7, model=model, metadata=get_metadata("shapes_panoptic_train"))


def convert(source: Path, target: str, output: Path, *options: str, config: bool = True) -> int:
    named = ["--config-file", R50] if config else []
    overrides = ["--opts", *SMALL] if config else []
    arguments = ["--weights", str(source), *named, "--to", target, "--output", str(output), *options, *overrides]
    return cli.main(["convert", *arguments])


def test_round_trip_through_every_layout(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(checkpoint, "huggingface", tmp_path / "hub", "--license", "mit") == 0
    assert convert(tmp_path / "hub", "published", tmp_path / "a.pkl", config=False) == 0
    assert convert(tmp_path / "a.pkl", "published", tmp_path / "b.safetensors") == 0
    assert convert(tmp_path / "b.safetensors", "maskformer", tmp_path / "c.pth") == 0
    said = capsys.readouterr().out
    for family in ("maskformer", "Hugging Face MaskFormer", "published MaskFormer"):
        assert f" ({family})\n" in said
    assert f"wrote {tmp_path}/hub/model.safetensors (" in said
    assert f"wrote {tmp_path}/c.pth (" in said
    before, after = (torch.load(path, weights_only=True)["model"] for path in (checkpoint, tmp_path / "c.pth"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoint_metadata(tmp_path / "c.pth") == get_metadata("shapes_panoptic_train")
    with (tmp_path / "a.pkl").open("rb") as file:
        content = pickle.load(file)
    own = before["network.backbone.body.conv1.weight"].numpy()
    assert np.array_equal(content["model"]["backbone.stem.conv1.weight"], own)


def test_a_model_file_of_ours_predicts_without_data_set_or_folder(checkpoint: Path, tmp_path: Path) -> None:
    assert convert(checkpoint, "huggingface", tmp_path / "hub") == 0
    assert convert(tmp_path / "hub", "maskformer", tmp_path / "model.pth", config=False) == 0
    shutil.rmtree(tmp_path / "hub")
    predictor = Predictor(tmp_path / "model.yaml", device="cpu", overrides=["INPUT.MIN_SIZE_TEST", "64"])
    assert predictor.metadata == get_metadata("shapes_panoptic_train")
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    labels = predictor(image).sem_seg_labels
    assert labels is not None
    assert labels.shape == (48, 64)
    with pytest.raises(UserError, match="holds weights but no state of a run"):
        load_checkpoint(tmp_path / "model.pth")
    assert convert(checkpoint, "huggingface", tmp_path / "hub") == 0
    (tmp_path / "model.pth").unlink()
    assert convert(tmp_path / "hub", "maskformer", tmp_path / "model.pth", config=False) == 2, "a config would be lost"


def test_classes_of_foreign_models_keep_their_names(checkpoint: Path, tmp_path: Path) -> None:
    """transformers' own folders have names of classes and nothing else of ours."""
    assert convert(checkpoint, "huggingface", tmp_path / "hub") == 0
    path = tmp_path / "hub/config.json"
    config = json.loads(path.read_text())
    del config["maskformer"]
    path.write_text(json.dumps(config))
    assert convert(tmp_path / "hub", "maskformer", tmp_path / "model.pth", config=False) == 0
    metadata = checkpoint_metadata(tmp_path / "model.pth")
    assert metadata is not None
    assert metadata.classes == get_metadata("shapes_panoptic_train").classes
    assert not any(metadata.things)


@pytest.mark.parametrize(
    ("target", "name", "there", "message"),
    [
        ("published", "model.onnx", "", r"must end in \.pkl or \.pth or \.safetensors for --to published"),
        ("maskformer", "model.pkl", "", r"must end in \.pth for --to maskformer"),
        ("published", "model.pkl", "file", r"model\.pkl exists: name another file, or add --overwrite"),
        ("maskformer", "model.pth", "folder", r"is a folder but --to maskformer writes a file"),
        ("huggingface", "hub", "file", r"is a file but --to huggingface writes a folder"),
        ("huggingface", "hub", "full folder", r"is not empty: name another folder, or add --overwrite"),
    ],
)
def test_what_is_there_stays(
    checkpoint: Path, tmp_path: Path, capsys: Any, target: str, name: str, there: str, message: str
) -> None:
    output = tmp_path / name
    if there == "file":
        output.write_text("precious")
    elif there:
        output.mkdir()
        (output / "file").write_text("precious")
    assert convert(checkpoint, target, output) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: --output ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)
    kept = output if there == "file" else output / "file"
    assert not there or kept.read_text() == "precious"
    assert there or not output.exists()


def test_overwrite_replaces(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_text("old")
    assert convert(checkpoint, "published", tmp_path / "model.pkl", "--overwrite") == 0
    assert (tmp_path / "model.pkl").stat().st_size > 1000


def test_what_cannot_be_converted_is_one_sentence(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    assert convert(checkpoint, "huggingface", tmp_path / "hub", config=False) == 2
    assert "does not say what model it is of: add --config-file" in capsys.readouterr().err
    backbone = {
        key: tensor
        for key, tensor in load_checkpoint(checkpoint)["model"].items()
        if key.startswith("network.backbone.")
    }
    torch.save(backbone, tmp_path / "backbone.pth")
    assert convert(tmp_path / "backbone.pth", "published", tmp_path / "a.pkl") == 2
    assert "does not fill this model completely" in capsys.readouterr().err
    assert not (tmp_path / "a.pkl").exists()


@pytest.mark.parametrize("target", ["published", "huggingface"])
def test_an_impossible_output_is_found_before_anything_is_loaded(tmp_path: Path, capsys: Any, target: str) -> None:
    (tmp_path / "file").write_text("precious")
    assert convert(tmp_path / "absent.pkl", target, tmp_path / "file/below/model.pth") == 2
    said = capsys.readouterr().err
    assert re.search(r"--output \S+ cannot be written in \S+/file \(it is no folder\): name another place", said)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_absent_weights_are_named_by_the_option(tmp_path: Path, capsys: Any) -> None:
    assert convert(tmp_path / "nothing.pkl", "published", tmp_path / "deep/model.pth") == 2
    said = capsys.readouterr().err
    assert said == f"error: The weight file {tmp_path}/nothing.pkl does not exist: correct --weights\n"
    assert not (tmp_path / "deep").exists()


def test_a_model_of_the_hub_is_read_at_one_commit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever pushes meanwhile cannot give config and weights of different states."""
    import huggingface_hub

    assert convert(checkpoint, "huggingface", tmp_path / "hub") == 0
    commit, asked = "5" * 40, []
    folder = tmp_path / "cache/snapshots" / commit
    shutil.copytree(tmp_path / "hub", folder)

    def download(repo_id: str, filename: str, revision: str | None = None) -> str:
        asked.append((repo_id, revision))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert (
        cli.main(["convert", "--weights", "hf://a/b", "--to", "maskformer", "--output", str(tmp_path / "model.pth")])
        == 0
    )
    assert asked[0] == ("a/b", None)
    assert set(asked[1:]) == {("a/b", commit)}
    kept = torch.load(tmp_path / "model.pth", weights_only=True)["config"]
    assert f"WEIGHTS: hf://a/b@{commit}" in kept


def test_the_script_of_tools_is_the_same_command() -> None:
    text = (Path(__file__).parents[2] / "tools/convert_weights.py").read_text()
    assert "from maskformer.convert import main" in text


def test_published_and_hugging_face_names_hold_the_same_numbers(tmp_path: Path) -> None:
    """One value followed through both layouts, by names written down here."""
    model = build_model(get_cfg(R50, SMALL))
    export_published(model, tmp_path / "a.pkl")
    with (tmp_path / "a.pkl").open("rb") as file:
        published = pickle.load(file)["model"]
    theirs = huggingface_state_dict(model.state_dict())
    packed = published["sem_seg_head.predictor.transformer.decoder.layers.1.multihead_attn.in_proj_weight"]
    for i, part in enumerate("qkv"):
        name = f"model.transformer_module.decoder.layers.1.encoder_attn.{part}_proj.weight"
        assert np.array_equal(theirs[name].numpy(), packed[64 * i : 64 * (i + 1)])
    for one, other in {
        "sem_seg_head.pixel_decoder.adapter_1.weight": "model.pixel_level_module.decoder.fpn.layers.2.proj.0.weight",
        "sem_seg_head.pixel_decoder.layer_4.norm.bias": "model.pixel_level_module.decoder.fpn.stem.1.bias",
        "sem_seg_head.predictor.mask_embed.layers.2.bias": "mask_embedder.2.0.bias",
        "backbone.res3.0.shortcut.norm.running_var": (
            "model.pixel_level_module.encoder.encoder.stages.1.layers.0.shortcut.normalization.running_var"
        ),
    }.items():
        assert np.array_equal(published[one], theirs[other].numpy()), one

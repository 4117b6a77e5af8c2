"""Images in, results out; and the demo command around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maskformer
from maskformer import demo
from maskformer.build import build_model
from maskformer.checkpoint import checkpoint_metadata, export_published, save_checkpoint
from maskformer.config import get_cfg
from maskformer.data.catalog import get_dataset, get_metadata
from maskformer.data.recipes import build_recipe
from maskformer.errors import UserError
from maskformer.predictor import Prediction, Predictor

CONFIG = "configs/quickstart/shapes_panoptic.yaml"
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "0.0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint with random weights and the metadata of its data set, under other names."""
    cfg = get_cfg(CONFIG, SMALL)
    torch.manual_seed(0)
    model = build_model(cfg)
    metadata = get_metadata("shapes_panoptic_train")
    return save_checkpoint(tmp_path_factory.mktemp("run"), 7, model=model, metadata=metadata)


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor(CONFIG, checkpoint, overrides=SMALL)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)


def test_results_at_the_size_of_the_image(predictor: Predictor, image: np.ndarray) -> None:
    result = predictor(image)
    assert isinstance(result, Prediction)
    assert result.tasks == ["panoptic", "semantic"]
    assert result["sem_seg_labels"].shape == (90, 120)
    assert result.sem_seg_labels is result["sem_seg_labels"]
    ids, segments = result["panoptic_seg"]
    assert ids.shape == (90, 120)
    assert {s["id"] for s in segments} == set(ids.unique().tolist()) - {0}
    assert result.instances is None
    assert result.metadata.classes == get_metadata("shapes_panoptic_train").classes
    for task in ("auto", "panoptic", "semantic"):
        picture = result.overlay(task)
        assert picture.shape[1] == 120 * 6
        assert picture.dtype == np.uint8
    with pytest.raises(UserError, match="no instance result to draw, only panoptic, semantic"):
        result.overlay("instance")


def test_arrays_paths_and_lists_give_the_same(predictor: Predictor, image: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(image).save(tmp_path / "a.png")
    results = predictor([image, tmp_path / "a.png", str(tmp_path / "a.png")])
    for result in results:
        assert (result["sem_seg_labels"] == predictor(image)["sem_seg_labels"]).all()


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_images_are_prepared_as_in_testing(checkpoint: Path, image_format: str) -> None:
    overrides = [*SMALL, "INPUT.FORMAT", image_format, "INPUT.MIN_SIZE_TEST", "96"]
    predictor = Predictor(CONFIG, checkpoint, overrides=overrides)
    dataset = get_dataset("shapes_panoptic_val")
    record = dataset.records[3]
    sample = build_recipe(predictor.cfg, dataset.metadata, training=False)(record, np.random.default_rng(0))
    assert sample["image"].shape == (3, 96, 96)
    expected = predictor.model.infer([sample], semantic="labels")[0]
    result = predictor(record["file_name"])
    assert (result["sem_seg_labels"] == expected["sem_seg_labels"]).all()
    assert (result["panoptic_seg"][0] == expected["panoptic_seg"][0]).all()


def test_a_config_object_is_not_changed(checkpoint: Path, image: np.ndarray) -> None:
    cfg = get_cfg(CONFIG, SMALL)
    cfg.freeze()
    predictor = maskformer.Predictor(cfg, checkpoint, device="cpu")
    assert predictor.model.device.type == "cpu"
    assert not predictor.model.training
    assert cfg == get_cfg(CONFIG, SMALL)


def test_class_names_come_from_the_checkpoint_if_the_data_set_is_not_there(checkpoint: Path) -> None:
    overrides = [*SMALL, "DATASETS.TRAIN", "('folder:/nowhere/at/all:train',)"]
    metadata = Predictor(CONFIG, checkpoint, overrides=overrides).metadata
    assert metadata == checkpoint_metadata(checkpoint)
    assert metadata.classes == get_metadata("shapes_panoptic_train").classes
    assert metadata.things == [False, False, True, True, True]


def test_class_names_of_files_that_have_none(checkpoint: Path, tmp_path: Path, caplog: Any) -> None:
    bare = tmp_path / "weights.pkl"
    export_published(Predictor(CONFIG, checkpoint, overrides=SMALL).model, bare)
    assert checkpoint_metadata(bare) is None
    assert Predictor(CONFIG, bare, overrides=SMALL).metadata.classes[2] == "disc"
    nowhere = [*SMALL, "DATASETS.TRAIN", "('folder:/nowhere/at/all:train',)"]
    with pytest.raises(UserError, match="does not say which classes are things"):
        Predictor(CONFIG, bare, overrides=nowhere)
    semantic = [*nowhere, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False"]
    # The model itself needs no data set then, but its config's is looked up for thing-ness.
    predictor = Predictor(CONFIG, bare, overrides=semantic)
    assert predictor.metadata.classes[4] == "class 4"
    assert "classes are only numbered" in caplog.text


def test_weights_that_do_not_fill_the_model_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs weights"):
        Predictor(CONFIG, overrides=SMALL)
    model = Predictor(CONFIG, checkpoint, overrides=SMALL).model
    backbone = {n: t for n, t in model.state_dict().items() if n.startswith("network.backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="does not fill this model completely"):
        Predictor(CONFIG, tmp_path / "backbone.pth", overrides=SMALL)


def test_more_classes_than_the_default_ignore_label(tmp_path: Path, image: np.ndarray) -> None:
    """Refused in a file and on the command line; a config changed by a program, as any with few classes, works."""
    with pytest.raises(UserError, match=r"IGNORE_VALUE is 255 but labels 0 to 299 are classes"):
        get_cfg(CONFIG, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "300"])
    cfg = get_cfg(CONFIG, [*SMALL, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False"])
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 300
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "bare.pth")
    predictor = Predictor(cfg, tmp_path / "bare.pth")
    assert (predictor.metadata.num_classes, predictor.metadata.ignore_label) == (300, 300)
    assert predictor(image).overlay("semantic").dtype == np.uint8


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_what_is_no_image_is_refused(predictor: Predictor, wrong: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"an image must be a path or an \(H, W, 3\) uint8 RGB array"):
        predictor(wrong)


# ---------------------------------------------------------------- demo
def run_demo(checkpoint: Path, output: Path, *arguments: object, task: str = "auto") -> int:
    words = [
        "--config-file",
        CONFIG,
        "--weights",
        checkpoint,
        "--output",
        output,
        "--task",
        task,
        "--input",
        *arguments,
    ]
    return demo.main([str(word) for word in [*words, "--opts", *SMALL]])


@pytest.fixture
def folder(tmp_path: Path, image: np.ndarray) -> Path:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    Image.fromarray(image).save(images / "a.png")
    Image.fromarray(image).save(images / "a.jpg")
    Image.fromarray(image[:50]).convert("L").save(images / "sub" / "grey.png")
    (images / "notes.txt").write_text("no image")
    return images


def test_demo(checkpoint: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_demo(checkpoint, tmp_path / "out", folder) == 0
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    names = ("a", "a.png", "sub/grey")  # two images with the stem "a"
    assert written == sorted(f"{name}_{task}.png" for name in names for task in ("panoptic", "semantic"))
    with Image.open(tmp_path / "out" / "a_panoptic.png") as picture:
        assert picture.width == 120 * 6
    output = capsys.readouterr().out
    assert "3/3" in output
    assert "3 of 3 images" in output


def test_demo_task(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    assert run_demo(checkpoint, tmp_path / "out", folder / "a.jpg", task="instance") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_instance.png"]


def test_demo_does_the_other_images_when_one_is_broken(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    missing = folder / "missing.png"
    assert run_demo(checkpoint, tmp_path / "out", folder, missing, task="semantic") == 2
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    captured = capsys.readouterr()
    errors = captured.err.strip().splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)
    assert "broken.jpg" in errors[0]
    assert "missing.png" in errors[1]
    assert "3 of 5 images" in captured.out


@pytest.mark.parametrize(("inside", "words"), [(".", "is the folder of the images"), ("none", "has no image in it")])
def test_demo_refuses_folders_it_cannot_use(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: Any, inside: str, words: str
) -> None:
    (folder / "none").mkdir()
    assert run_demo(checkpoint, folder, folder / inside) == 2
    assert words in capsys.readouterr().err


def test_demo_leaves_its_own_pictures_out(folder: Path) -> None:
    (folder / "out").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "out" / "a_semantic.png")
    jobs = demo.find_images([folder], folder / "out")
    assert [job.image.name for job in jobs] == ["a.jpg", "a.png", "grey.png"]


def test_demo_unknown_weights_is_one_sentence(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_demo(tmp_path / "no.pth", tmp_path / "out", folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1

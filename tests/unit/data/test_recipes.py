from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from maskformer.data import get_dataset, get_metadata
from maskformer.data.recipes import (
    MirrorCropResize,
    ResizeCropMirror,
    TestRecipe,
    TrainingRecipe,
    build_recipe,
    recipe_task,
)
from maskformer.data.transforms import Crop, CropRule, Geometry, Mirror, Resize, ResizeRule
from maskformer.errors import UserError

Make = Callable[..., Any]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def steps(geometry: Geometry) -> list[str]:
    return [type(step).__name__ for step in geometry.steps]


# ------------------------------------------------------------------ plans
def test_plan_of_mask_former_recipes() -> None:
    plan = ResizeCropMirror(ResizeRule((50,), 1000), CropRule("absolute", (30, 40)))
    generator = rng()
    geometries = [plan(generator, (100, 200), lambda g: np.ones(2)) for _ in range(4000)]
    assert {tuple(steps(g)) for g in geometries} == {("Resize", "Crop"), ("Resize", "Crop", "Mirror")}
    assert {g.size for g in geometries} == {(30, 40)}
    assert {g.steps[0] for g in geometries} == {Resize(50, 100)}
    assert np.mean([len(g.steps) == 3 for g in geometries]) == pytest.approx(0.5, abs=0.04)
    assert {steps(ResizeCropMirror(plan.resize, None)(generator, (100, 200), None))[0] for _ in range(9)} == {"Resize"}  # type: ignore[arg-type]


def test_plan_of_detr_recipe() -> None:
    plan = MirrorCropResize(ResizeRule((50, 60), 80), CropRule("absolute_range", (384, 600)))
    generator = rng()
    geometries = [plan(generator, (500, 2000), lambda g: np.ones(2)) for _ in range(4000)]
    kinds = {tuple(steps(g)) for g in geometries}
    long = ("Resize", "Crop", "Resize")
    assert kinds == {("Resize",), ("Mirror", "Resize"), long, ("Mirror", *long)}
    for kind in kinds:
        assert np.mean([tuple(steps(g)) == kind for g in geometries]) == pytest.approx(0.25, abs=0.035)
    # The small resize has no limit on the longer side; the last one has.
    small = [g.steps[-3] for g in geometries if len(g.steps) >= 3]
    assert {(s.height, s.width) for s in small if isinstance(s, Resize)} == {(400, 1600), (500, 2000), (600, 2400)}
    assert max(max(g.size) for g in geometries) == 80
    for geometry in geometries:
        if len(geometry.steps) >= 3:
            crop = geometry.steps[-2]
            assert isinstance(crop, Crop)
            assert crop.height >= 384
            assert crop.width <= 600
    without = [MirrorCropResize(plan.resize, None)(generator, (50, 60), lambda g: np.ones(2)) for _ in range(200)]
    assert {tuple(steps(g)) for g in without} == {("Resize",), ("Mirror", "Resize")}


def test_crop_counts_classes_of_what_it_would_show() -> None:
    seen: list[Geometry] = []

    def count(geometry: Geometry) -> np.ndarray:
        seen.append(geometry)
        return np.array([1, 1])

    plan = ResizeCropMirror(ResizeRule((50,), 1000), CropRule("absolute", (10, 10), 0.75))
    geometry = plan(rng(), (100, 100), count)
    assert [steps(g) for g in seen] == [["Resize", "Crop"]]
    assert geometry.steps[:2] == seen[0].steps


# ------------------------------------------------------------------ training samples
@pytest.fixture
def blocks(tmp_path: Path) -> dict[str, Any]:
    """A record of 60 × 80 in blocks of 20, whose colour is 20 × its label; label 11 is ignored."""
    labels = np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20))).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "mask.png")
    Image.fromarray((labels * 20)[..., None].repeat(3, 2)).save(tmp_path / "image.png")
    return {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "mask.png"),
        "image_id": "blocks",
        "height": 60,
        "width": 80,
    }


def recipe(metadata: Any, **fields: Any) -> TrainingRecipe:
    defaults = {
        "task": "semantic",
        "image_format": "RGB",
        "plan": ResizeCropMirror(ResizeRule((90,), 1000), CropRule("absolute", (64, 70))),
        "colors": False,
        "canvas": 80,
        "keep_empty": False,
    }
    return TrainingRecipe(metadata=metadata, **(defaults | fields))


def test_training_sample(blocks: dict[str, Any], make_metadata: Make) -> None:
    sample = recipe(make_metadata(11, ignore_label=11))(blocks, rng(1))
    image, segments = sample["image"], sample["segments"]
    assert image.shape == (3, 80, 80)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert segments.size == (80, 80)
    assert (sample["height"], sample["width"], sample["image_id"]) == (60, 80, "blocks")
    # Canvas: grey 128 and unsupervised.
    assert (image[:, 64:] == 128).all()
    assert (image[:, :, 70:] == 128).all()
    assert (segments.ids[0, 64:] == -1).all()
    assert (segments.ids[0, :, 70:] == -1).all()
    # Ascending, all present, ignored left out.
    assert segments.labels.tolist() == sorted(segments.labels.tolist())
    assert (segments.areas() > 0).all()
    assert 11 not in segments.labels
    # Image and labels moved alike.
    labels, shown = segments.label_map(11)[:64, :70], image[0, :64, :70]
    assert (shown == labels * 20).float().mean() > 0.8  # all but blurred borders


def test_mirrored_half_of_the_time(blocks: dict[str, Any], make_metadata: Make) -> None:
    make = recipe(make_metadata(11, ignore_label=11), plan=ResizeCropMirror(ResizeRule((60,), 1000), None), canvas=-1)
    generator = rng()
    firsts = np.array([int(make(blocks, generator)["image"][0, 30, 5]) for _ in range(400)])
    assert set(firsts) == {80, 140}  # labels 4 and 7: the ends of the middle row
    assert (firsts == 80).mean() == pytest.approx(0.5, abs=0.1)


def test_one_seed_one_sample(blocks: dict[str, Any], make_metadata: Make) -> None:
    make = recipe(make_metadata(11, ignore_label=11), colors=True)
    first, second, other = make(blocks, rng(4)), make(blocks, rng(4)), make(blocks, rng(5))
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["segments"].ids, second["segments"].ids)
    assert not torch.equal(first["image"], other["image"])


def test_crop_avoids_one_class(blocks: dict[str, Any], make_metadata: Make) -> None:
    generator = rng()
    plan = ResizeCropMirror(ResizeRule((60,), 1000), CropRule("absolute", (16, 16), 0.9))
    careful = recipe(make_metadata(11, ignore_label=11), plan=plan, canvas=-1)
    careless = recipe(
        make_metadata(11, ignore_label=11),
        plan=ResizeCropMirror(ResizeRule((60,), 1000), CropRule("absolute", (16, 16))),
        canvas=-1,
    )

    def bad(make: TrainingRecipe) -> float:
        areas = [make(blocks, generator)["segments"].areas() for _ in range(200)]
        return float(np.mean([len(a) < 2 or a.max() >= 0.9 * a.sum() for a in areas]))

    assert bad(careless) > 0.15
    assert bad(careful) < 0.03


def test_semantic_never_keeps_empty_segments(blocks: dict[str, Any], make_metadata: Make) -> None:
    sample = recipe(make_metadata(11, ignore_label=11), keep_empty=True)(blocks, rng(2))
    assert (sample["segments"].areas() > 0).all()


def test_panoptic_order_and_empty_segments() -> None:
    record = get_dataset("shapes_panoptic_val").records[3]
    metadata = get_metadata("shapes_panoptic_val")
    plan = ResizeCropMirror(ResizeRule((128,), 1000), CropRule("absolute", (40, 40)))
    dropped = recipe(metadata, task="panoptic", plan=plan, canvas=-1)(record, rng(2))["segments"]
    kept = recipe(metadata, task="panoptic", plan=plan, canvas=-1, keep_empty=True)(record, rng(2))["segments"]
    assert kept.labels.tolist() == [s["category_id"] for s in record["segments_info"]]
    assert len(dropped) < len(kept)
    assert torch.equal(kept.drop_empty().ids, dropped.ids)
    assert torch.equal(kept.drop_empty().labels, dropped.labels)


def test_instances_go_through_the_same_geometry() -> None:
    panoptic, instance = (get_dataset(f"shapes_{task}_val").records[8] for task in ("panoptic", "instance"))
    plan = ResizeCropMirror(ResizeRule((100,), 1000), CropRule("absolute", (90, 80)))
    all_segments = recipe(get_metadata("shapes_panoptic_val"), task="panoptic", plan=plan, canvas=100)(panoptic, rng(1))
    things = recipe(get_metadata("shapes_instance_val"), task="instance", plan=plan, canvas=100)(instance, rng(1))
    segments = all_segments["segments"]
    assert torch.equal(things["segments"].masks(), segments.masks()[segments.labels > 1])
    assert torch.equal(things["segments"].labels, segments.labels[segments.labels > 1] - 2)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_turned_picture_whose_annotation_is_not(make_metadata: Make, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (80, 60)).save(tmp_path / "photo.jpg", exif=exif)
    # As if the picture were not turned by 90 degrees, or as if it were.
    size = (80, 60) if orientation == 6 else (60, 80)
    Image.new("L", size).save(tmp_path / "labels.png")
    record = {"file_name": str(tmp_path / "photo.jpg"), "sem_seg_file_name": str(tmp_path / "labels.png")}
    for more in ({}, {"width": size[0], "height": size[1]}):
        with pytest.raises(UserError) as error:
            recipe(make_metadata())(record | more, rng())
        assert "\n" not in str(error.value)
        told = "carries an EXIF orientation" in str(error.value) and "remove the orientation" in str(error.value)
        assert told is (orientation == 6)


def test_sizes_that_differ(blocks: dict[str, Any], make_metadata: Make, tmp_path: Path) -> None:
    make = recipe(make_metadata(11, ignore_label=11))
    with pytest.raises(UserError, match=r"image.png' is 80x60 .* its recorded size is 81x60"):
        make(blocks | {"width": 81}, rng())
    Image.fromarray(np.zeros((60, 79), np.uint8)).save(tmp_path / "other.png")
    wrong = blocks | {"sem_seg_file_name": str(tmp_path / "other.png")}
    with pytest.raises(UserError, match=r"sem_seg_file_name '.*other.png' is 79x60 .* is 80x60"):
        make(wrong, rng())
    with pytest.raises(UserError, match=r"other.png' is 79x60"):
        TestRecipe(make.metadata, "RGB", 60, 1000)(wrong)


# ------------------------------------------------------------------ test samples
def test_test_sample_has_truth_at_the_original_size(blocks: dict[str, Any], make_metadata: Make) -> None:
    sample = TestRecipe(make_metadata(11, ignore_label=11), "BGR", 30, 35)(blocks)
    assert sample["image"].shape == (3, 26, 35)  # 26.25 x 35
    assert (sample["height"], sample["width"]) == (60, 80)
    assert sample["sem_seg"].dtype == torch.int32
    assert np.array_equal(sample["sem_seg"].numpy(), np.asarray(Image.open(blocks["sem_seg_file_name"])))
    assert "pan_seg" not in sample
    expected = np.asarray(Image.open(blocks["file_name"]).resize((35, 26), Image.Resampling.BILINEAR))
    assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), expected)


def test_test_sample_of_panoptic_and_instances() -> None:
    for name in ("shapes_panoptic_val", "shapes_instance_val"):
        sample = TestRecipe(get_metadata(name), "RGB", 0, 1000)(get_dataset(name).records[4])
        assert sample["image"].shape == (3, 128, 128)
        if "panoptic" in name:
            ids, segments = sample["pan_seg"]
            assert ids.dtype == torch.int32
            assert [s["area"] for s in segments] == [int((ids == s["id"]).sum()) for s in segments]
            assert sample["sem_seg"].shape == (128, 128)
        else:
            assert {"id", "category_id", "iscrowd", "area", "bbox", "segmentation"} <= set(sample["annotations"][0])


# ------------------------------------------------------------------ from the config
def test_recipe_follows_the_config(make_cfg: Make) -> None:
    cfg = make_cfg(
        INPUT__DATASET_MAPPER_NAME="mask_former_panoptic",
        INPUT__CROP__ENABLED=True,
        INPUT__CROP__TYPE="absolute",
        INPUT__CROP__SIZE=[64, 96],
        INPUT__CROP__SINGLE_CATEGORY_MAX_AREA=0.8,
        INPUT__MIN_SIZE_TRAIN=(20, 30),
        INPUT__MIN_SIZE_TRAIN_SAMPLING="range",
        INPUT__MAX_SIZE_TRAIN=77,
        INPUT__SIZE_DIVISIBILITY=96,
        INPUT__COLOR_AUG_SSD=True,
        INPUT__FORMAT="BGR",
        INPUT__KEEP_EMPTY_SEGMENTS=True,
        INPUT__MIN_SIZE_TEST=33,
        INPUT__MAX_SIZE_TEST=44,
    )
    metadata = get_metadata("shapes_panoptic_train")
    resize, crop = ResizeRule((20, 30), 77, "range"), CropRule("absolute", (64, 96), 0.8)
    assert build_recipe(cfg, metadata, training=True) == TrainingRecipe(
        "panoptic", metadata, "BGR", ResizeCropMirror(resize, crop), True, 96, True
    )
    assert build_recipe(cfg, metadata, training=False) == TestRecipe(metadata, "BGR", 33, 44)
    cfg.INPUT.DATASET_MAPPER_NAME = "detr_panoptic"  # neither colours nor canvas
    assert build_recipe(cfg, metadata, training=True) == TrainingRecipe(
        "panoptic", metadata, "BGR", MirrorCropResize(resize, crop), False, -1, True
    )
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    assert recipe_task(cfg) == "instance"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DATASET_MAPPER_NAME": "mask_former_semantics"}, "did you mean 'mask_former_semantic'"),
        ({"FORMAT": "HSV"}, "INPUT.FORMAT is 'HSV'"),
        ({"MIN_SIZE_TRAIN_SAMPLING": "range", "MIN_SIZE_TRAIN": (1, 2, 3)}, "needs two sizes"),
        ({"MIN_SIZE_TRAIN_SAMPLING": "range", "MIN_SIZE_TRAIN": (5, 2)}, "the lower first"),
        ({"CROP__TYPE": "relative", "CROP__SIZE": [512, 512]}, "two fractions"),
        ({"CROP__TYPE": "absolute", "CROP__SIZE": [0.9, 0.9]}, "two numbers of pixels"),
        ({"CROP__TYPE": "absolute_range", "CROP__SIZE": [9, 8]}, "the smaller number first"),
        ({"CROP__TYPE": "absolute", "CROP__SIZE": [64, 65], "SIZE_DIVISIBILITY": 64}, "would not fit the canvas"),
    ],
)
def test_bad_values(make_cfg: Make, changes: dict[str, Any], message: str) -> None:
    cfg = make_cfg(INPUT__CROP__ENABLED=True, **{f"INPUT__{key}": value for key, value in changes.items()})
    with pytest.raises(UserError, match=message):
        build_recipe(cfg, get_metadata("shapes_semantic_train"), training=True)


def test_a_canvas_of_the_longest_side_holds_every_crop(make_cfg: Make) -> None:
    settings = {"CROP__TYPE": "absolute", "CROP__SIZE": [96, 96], "MAX_SIZE_TRAIN": 64, "SIZE_DIVISIBILITY": 64}
    cfg = make_cfg(INPUT__CROP__ENABLED=True, **{f"INPUT__{key}": value for key, value in settings.items()})
    assert build_recipe(cfg, get_metadata("shapes_semantic_train"), training=True).canvas == 64


def test_mirror_is_a_step_of_its_own() -> None:
    image = rng().integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.array_equal(Geometry((4, 5)).then(Mirror()).apply_to_image(image), cv2.flip(image, 1))

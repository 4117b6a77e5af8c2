from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer.data import build_test_loader, build_train_loader, catalog, get_metadata
from maskformer.data.dataset import Dataset
from maskformer.data.workers import PackedRecords
from maskformer.errors import UserError

Make = Callable[..., Any]
Batches = list[list[dict[str, Any]]]


def same(first: Batches, second: Batches) -> bool:
    return all(
        a["file_name"] == b["file_name"]
        and torch.equal(a["image"], b["image"])
        and torch.equal(a["segments"].ids, b["segments"].ids)
        and torch.equal(a["segments"].labels, b["segments"].labels)
        for batch, other in zip(first, second, strict=True)
        for a, b in zip(batch, other, strict=True)
    )


def take(cfg: Any, count: int, **arguments: Any) -> Batches:
    loader = build_train_loader(cfg, **arguments)
    batches = list(islice(loader, count))
    loader.close()
    return batches


AUGMENTED = {
    "INPUT__COLOR_AUG_SSD": True,
    "INPUT__MIN_SIZE_TRAIN": (24, 30, 40),
    "INPUT__CROP__ENABLED": True,
    "INPUT__CROP__TYPE": "absolute",
    "INPUT__CROP__SIZE": [20, 20],
    "INPUT__SIZE_DIVISIBILITY": 20,
}


# ------------------------------------------------------------------ training
def test_same_pixels_whatever_the_workers(make_cfg: Make) -> None:
    expected = take(make_cfg(**AUGMENTED), 5)
    for workers, ahead in ((1, 1), (2, 3)):
        cfg = make_cfg(**AUGMENTED, DATALOADER__NUM_WORKERS=workers, DATALOADER__PREFETCH_FACTOR=ahead)
        assert same(take(cfg, 5), expected)
    assert not same(take(make_cfg(**AUGMENTED, SEED=8), 5), expected)


def test_a_negative_seed_is_zero(make_cfg: Make) -> None:
    assert same(take(make_cfg(SEED=-1), 2), take(make_cfg(SEED=0), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume(make_cfg: Make, make_folder: Make, workers: int) -> None:
    folder = make_folder([(20, 30), (30, 20), (20, 20), (20, 31), (22, 30)])
    cfg = make_cfg(
        **{**AUGMENTED, "DATASETS__TRAIN": (f"folder:{folder}:train",)},
        DATALOADER__NUM_WORKERS=workers,
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=3,
    )
    loader = build_train_loader(cfg)
    before = list(islice(loader, 7))
    position = loader.position
    assert position == 14  # the batches handed out, not those prepared ahead
    after = list(islice(loader, 6))
    loader.close()
    resumed = build_train_loader(cfg, start_position=position)
    assert resumed.position == position
    assert same(list(islice(resumed, 6)), after)
    assert resumed.position == loader.position
    resumed.close()
    for batch in before + after:
        assert len({s["width"] > s["height"] for s in batch}) == 1


def test_global_random_state_is_left_alone(make_cfg: Make) -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())  # type: ignore[index,union-attr]
    take(make_cfg(**AUGMENTED), 2)
    take(make_cfg(**AUGMENTED, DATALOADER__NUM_WORKERS=1), 2)
    next(iter(build_test_loader(make_cfg(), "shapes_semantic_val")))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize("factors", [{}, {"SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "REPEAT_THRESHOLD": 0.9}])
def test_ranks_together_see_the_global_batch(make_cfg: Make, make_folder: Make, factors: dict[str, Any]) -> None:
    folder = make_folder([(20, 30), (30, 20), (2, 1), (1, 2), (22, 30)])  # few pixels hold few classes
    cfg = make_cfg(
        **{**AUGMENTED, "INPUT__CROP__ENABLED": False, "INPUT__SIZE_DIVISIBILITY": -1},
        **{f"DATALOADER__{key}": value for key, value in factors.items()},
        DATASETS__TRAIN=(f"folder:{folder}:train",),
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=3,
        SOLVER__IMS_PER_BATCH=4,
        OUTPUT_DIR=str(folder / "output"),
    )
    assert (build_train_loader(cfg).epoch_length > 5) == bool(factors)
    whole = take(cfg, 6)
    for start, size in ((0, 2), (2, 4), (3, 1), (5, 2)):  # a run goes on with other numbers of processes
        shares = [take(cfg, 6 - start, start_position=4 * start, rank=rank, world_size=size) for rank in range(size)]
        dealt = [
            [sample for samples in zip(*parts, strict=True) for sample in samples]
            for parts in zip(*shares, strict=True)
        ]
        assert same(dealt, whole[start:])


def test_a_batch_that_cannot_be_split_is_refused_before_data_are_read(make_cfg: Make) -> None:
    with pytest.raises(UserError, match="over 3 processes: use 1 or 2 processes"):
        build_train_loader(make_cfg(DATASETS__TRAIN=("folder:/nowhere:train",)), rank=1, world_size=3)


def test_grouping_can_be_switched_off(make_cfg: Make, make_folder: Make) -> None:
    folder = make_folder([(20, 30), (30, 20)] * 4)
    cfg = make_cfg(
        DATASETS__TRAIN=(f"folder:{folder}:train",),
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=3,
        DATALOADER__ASPECT_RATIO_GROUPING=False,
    )
    assert any(len({s["width"] > s["height"] for s in batch}) == 2 for batch in take(cfg, 20))


def test_several_data_sets(make_cfg: Make, make_folder: Make) -> None:
    first, second = make_folder([(20, 30)] * 3, name="a"), make_folder([(20, 30)] * 5, name="b")
    names = (f"folder:{first}:train", f"folder:{second}:train")
    cfg = make_cfg(DATASETS__TRAIN=names, MODEL__SEM_SEG_HEAD__NUM_CLASSES=3)
    files = {s["file_name"] for batch in take(cfg, 4) for s in batch}
    assert len(files) == 8
    other = make_folder([(20, 30)], name="c", yaml="classes: [c0, c1, other]\n")
    cfg.DATASETS.TRAIN = (names[0], f"folder:{other}:train")
    with pytest.raises(UserError, match=r"different names for class 2 \('c2' and 'other'\)"):
        build_train_loader(cfg)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["truncated", "label"])
def test_error_in_a_worker_is_one_sentence(make_cfg: Make, make_folder: Make, workers: int, fault: str) -> None:
    folder: Path = make_folder([(64, 64)] * 2)
    if fault == "truncated":
        path = folder / "images" / "train" / "001.png"
        path.write_bytes(path.read_bytes()[:500])
    else:
        path = folder / "masks" / "train" / "001.png"
        Image.fromarray(np.full((64, 64), 3, np.uint8)).save(path)
    cfg = make_cfg(
        DATASETS__TRAIN=(f"folder:{folder}:train",),
        DATASETS__TEST=(f"folder:{folder}:train",),
        DATALOADER__NUM_WORKERS=workers,
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=3,
    )
    for loader in (build_train_loader(cfg), build_test_loader(cfg, cfg.DATASETS.TEST[0])):
        with pytest.raises(UserError) as error:
            list(islice(loader, 4))
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        assert "Traceback" not in str(error.value)
    if fault == "label":
        assert "3 classes" in str(error.value)
        assert "'labels:'" in str(error.value)


@pytest.fixture
def toy_panoptic(make_metadata: Make) -> Any:
    """Registers a panoptic data set of the given segments (per image) for one test."""
    added: list[str] = []

    def register(name: str, per_image: list[list[dict[str, Any]]]) -> str:
        metadata = make_metadata(5, name=name, truth=("pan_seg",), evaluators=("panoptic_seg",))
        records = [
            {
                "file_name": f"shapes://val/image/{i:06d}.png",
                "pan_seg_file_name": f"shapes://val/panoptic/{i:06d}.png",
                "segments_info": segments,
                "image_id": i,
                "height": 128,
                "width": 128,
            }
            for i, segments in enumerate(per_image)
        ]
        catalog.register_dataset(name, lambda _: Dataset(metadata, lambda: records))
        added.append(name)
        return name

    yield register
    for name in added:
        del catalog._BUILDERS[name]


def test_images_without_segments_are_left_out(make_cfg: Make, toy_panoptic: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    full = [dict(s) for s in catalog.get_dataset("shapes_panoptic_val").records[2]["segments_info"]]
    crowd = [{"id": 1, "category_id": 0, "iscrowd": 1}]
    name = toy_panoptic("toy_panoptic", [[], crowd, full])
    cfg = make_cfg(DATASETS__TRAIN=(name,), INPUT__DATASET_MAPPER_NAME="mask_former_panoptic")
    assert {s["image_id"] for batch in take(cfg, 4) for s in batch} == {2}
    assert "left out 2 images without segments" in caplog.text
    cfg.DATASETS.TRAIN = (toy_panoptic("toy_empty", [[], crowd]),)
    with pytest.raises(UserError, match="none of the 2 images of data set 'toy_empty' has a segment"):
        build_train_loader(cfg)


def test_no_data_set_named(make_cfg: Make) -> None:
    with pytest.raises(UserError, match=r"DATASETS.TRAIN is empty"):
        build_train_loader(make_cfg(DATASETS__TRAIN=()))


def test_data_that_the_model_was_not_built_for(make_cfg: Make) -> None:
    with pytest.raises(UserError, match="have 11 and 5 classes"):
        build_train_loader(make_cfg(), get_metadata("camvid_sem_seg_train"))
    with pytest.raises(UserError, match=r"NUM_CLASSES is 150 but data set 'shapes_semantic_train' has 5 classes"):
        build_train_loader(make_cfg(MODEL__SEM_SEG_HEAD__NUM_CLASSES=150))


# ------------------------------------------------------------------ testing
def ids(batches: Any) -> list[list[str]]:
    return [[sample["image_id"] for sample in batch] for batch in batches]


SIZES = [(20, 30), (20, 30), (20, 30), (30, 20), (20, 30), (20, 20), (20, 20), (20, 20), (20, 20), (20, 20)]


@pytest.mark.parametrize(("batch", "expected"), [(1, [1] * 10), (2, [2, 1, 1, 1, 2, 2, 1]), (4, [3, 1, 1, 4, 1])])
def test_batches_are_those_of_one_process_each_once(
    make_cfg: Make, make_folder: Make, batch: int, expected: list[int]
) -> None:
    folder = make_folder(SIZES, split="val")
    cfg = make_cfg(TEST__IMS_PER_BATCH=batch, MODEL__SEM_SEG_HEAD__NUM_CLASSES=3)
    name = f"folder:{folder}:val"
    whole = list(build_test_loader(cfg, name))
    assert list(map(len, whole)) == expected
    assert [image_id for b in ids(whole) for image_id in b] == [f"{i:03d}" for i in range(10)]
    assert all(len({(s["height"], s["width"]) for s in b}) == 1 for b in whole)
    for world_size in (1, 2, 3, 4, 12):
        loaders = [build_test_loader(cfg, name, rank=rank, world_size=world_size) for rank in range(world_size)]
        shares = [ids(loader) for loader in loaders]
        assert [*chain(*shares)] == ids(whole)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert list(map(len, loaders)) == list(map(len, shares))
        for loader, share in zip(loaders, shares, strict=True):
            assert [f"{i:03d}" for i in loader.indices] == [*chain(*share)]
            assert len(loader.dataset.records) == 10


def test_worker_processes_read_a_share_again_and_again_and_an_empty_one(make_cfg: Make, make_folder: Make) -> None:
    folder = make_folder([(20, 20)] * 3, split="val")
    cfg = make_cfg(TEST__IMS_PER_BATCH=2, MODEL__SEM_SEG_HEAD__NUM_CLASSES=3, DATALOADER__NUM_WORKERS=2)
    shares = []
    for rank in range(4):
        loader = build_test_loader(cfg, f"folder:{folder}:val", rank=rank, world_size=4)
        shares.append(ids(loader))
        assert ids(loader) == shares[-1]
        assert len(loader) == len(shares[-1])
    assert shares == [[], [["000", "001"]], [], [["002"]]]
    assert list(loader.indices) == [2]
    assert list(build_test_loader(cfg, f"folder:{folder}:val", rank=0, world_size=4).indices) == []


def test_nothing_to_test_on(make_cfg: Make, make_metadata: Make) -> None:
    empty = Dataset(make_metadata(5, name="empty"), list)
    for rank in range(2):
        with pytest.raises(UserError, match="data set 'empty' is empty"):
            build_test_loader(make_cfg(), empty, rank=rank, world_size=2)


# ------------------------------------------------------------------ memory
def test_packed_records() -> None:
    records = [{"a": i, "b": [i] * i} for i in range(5)]
    packed = PackedRecords(records)
    assert list(packed) == records
    assert packed[-1] == records[-1]
    assert len(packed) == 5
    with pytest.raises(IndexError):
        packed[5]


@pytest.mark.parametrize("name", ["shapes_semantic_train", "folder"])
def test_what_workers_get_can_be_pickled(make_cfg: Make, make_folder: Make, name: str) -> None:
    """As it is where worker processes are spawned instead of forked (macOS, Windows, Python 3.14)."""
    if name == "folder":
        name = f"folder:{make_folder([(20, 30)], classes=5)}:train"
    loader = build_train_loader(make_cfg(**AUGMENTED, DATASETS__TRAIN=(name,)))._loader
    source = pickle.loads(pickle.dumps(loader.dataset))
    pickle.dumps((loader.collate_fn, loader.worker_init_fn))
    assert torch.equal(source[0, 3]["image"], loader.dataset[0, 3]["image"])

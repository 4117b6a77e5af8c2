from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer import distributed
from maskformer.config import get_cfg
from maskformer.data import build_train_loader, labels, progress
from maskformer.data.class_presence import CACHE, build_class_presence
from maskformer.data.dataset import Dataset
from maskformer.data.repeat_factors import build_repeat_factors, repeat_factors
from maskformer.errors import UserError

Make = Callable[..., Any]
REPEATING = {"DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 3}


# ------------------------------------------------------------------ the formula
def test_factors_by_hand() -> None:
    # Class 0 is in all 4 images, class 1 in two, class 2 in one; class 3 in none, and image 3 holds class 0 alone.
    pairs = np.array([(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (1, 2)])
    assert repeat_factors(pairs, 4, 1.0) == pytest.approx([2**0.5, 2, 1, 1])
    assert repeat_factors(pairs, 4, 0.36) == pytest.approx([1, 1.2, 1, 1])
    assert repeat_factors(pairs, 4, 0.25).tolist() == [1, 1, 1, 1]
    assert repeat_factors(pairs, 5, 0.8) == pytest.approx([2**0.5, 2, 1, 1, 1])  # one more, without any class
    assert repeat_factors(np.zeros((0, 2), np.int32), 3, 1.0).tolist() == [1, 1, 1]


def test_factors_follow_the_paper_word_for_word() -> None:
    rng = np.random.default_rng(0)
    holds = rng.random((200, 30)) < rng.random(30) ** 4
    share = holds.mean(0)
    expected = [max([1.0, *(max(1, (0.2 / share[c]) ** 0.5) for c in np.flatnonzero(row))]) for row in holds]
    assert repeat_factors(np.argwhere(holds), 200, 0.2) == pytest.approx(expected)
    assert max(expected) > 2


# ------------------------------------------------------------------ which classes an image holds
def held(cfg: Any, *datasets: Dataset) -> list[list[list[int]]]:
    """The classes of each image of each data set."""
    pairs = build_class_presence(cfg, datasets, [dataset.records for dataset in datasets])
    assert all(part.dtype == np.int32 for part in pairs)
    return [
        [part[part[:, 0] == i, 1].tolist() for i in range(len(d.records))]
        for part, d in zip(pairs, datasets, strict=True)
    ]


def label_set(folder: Path, metadata: Any, maps: list[Any]) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i, labels_ in enumerate(maps):
        path = folder / f"{i}.png"
        Image.fromarray(np.array([labels_], np.uint8)).save(path)
        os.utime(path, ns=(10**18, 10**18))
        records.append({"file_name": f"{i}.jpg", "sem_seg_file_name": str(path)})
    return Dataset(metadata, lambda: records)


@pytest.fixture
def reads(monkeypatch: Any) -> list[str]:
    """Names of the label files that this process has read."""
    read, names = labels.semantic_planes, []

    def note(record: Any, metadata: Any) -> Any:
        names.append(Path(record["sem_seg_file_name"]).name)
        return read(record, metadata)

    monkeypatch.setattr(labels, "semantic_planes", note)
    return names


@pytest.mark.parametrize("field", ["segments_info", "annotations"])
def test_records_that_list_their_segments(
    make_cfg: Make, make_metadata: Make, tmp_path: Path, reads: list[str], field: str
) -> None:
    listed = [[(2, 0), (0, 0), (2, 0)], [(1, 1)], [], [(1, 1), (3, 0)]]  # (class, crowd)
    records = [
        {"file_name": "a.jpg", "sem_seg_file_name": "b", field: [{"category_id": c, "iscrowd": w} for c, w in segments]}
        for segments in listed
    ]
    cfg = make_cfg(OUTPUT_DIR=str(tmp_path / "output"))
    assert held(cfg, Dataset(make_metadata(4), lambda: records)) == [[[0, 2], [], [], [3]]]
    assert reads == []
    assert not (tmp_path / "output").exists()
    records[1][field] = [{"category_id": 4}]
    with pytest.raises(UserError, match=r"'a.jpg' has category_id 4, but data set 'toy' has 4 classes \(0..3\): "):
        held(cfg, Dataset(make_metadata(4), lambda: records))


@pytest.mark.parametrize("workers", [0, 2])
def test_label_files_are_read_as_the_recipes_read_them(
    make_cfg: Make, make_metadata: Make, tmp_path: Path, workers: int
) -> None:
    cfg = make_cfg(DATALOADER__NUM_WORKERS=workers, OUTPUT_DIR=str(tmp_path / "output"))
    plain = label_set(tmp_path / "plain", make_metadata(3), [[0, 2, 255], [255, 255, 255], [1, 1, 1]])
    pairs = ((7, 2), (9, 0), (11, 0), (0, 255))
    mapped = label_set(tmp_path / "mapped", make_metadata(3, name="mapped", raw_labels=pairs), [[7, 0], [9, 11]] * 40)
    assert held(cfg, plain, mapped) == [[[0, 2], [], [1]], [[2], [0]] * 40]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["damaged", "missing", "unknown label"])
def test_a_broken_label_file_is_one_sentence(
    make_cfg: Make, make_metadata: Make, tmp_path: Path, workers: int, fault: str
) -> None:
    cfg = make_cfg(DATALOADER__NUM_WORKERS=workers, OUTPUT_DIR=str(tmp_path / "output"))
    data = label_set(tmp_path / "set", make_metadata(3), [[0], [1], [2 if fault != "unknown label" else 3]])
    path = tmp_path / "set" / "2.png"
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:40])
    if fault == "missing":
        path.unlink()
    with pytest.raises(UserError) as error:
        held(cfg, data)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "output" / CACHE).exists()


# ------------------------------------------------------------------ what is kept
def test_label_files_are_read_once(make_cfg: Make, make_metadata: Make, tmp_path: Path, reads: list[str]) -> None:
    cfg = make_cfg(OUTPUT_DIR=str(tmp_path / "run" / "output"))
    maps = [[0, 2, 255], [1, 1, 255], [255, 255, 255]]
    one, two = (label_set(tmp_path / name, make_metadata(3, name=name), maps) for name in ("one", "two"))
    first = held(cfg, one, two)
    assert len(reads) == 6
    assert held(cfg, one, two) == first == [[[0, 2], [1], []]] * 2
    assert held(cfg, two) == first[1:]
    assert len(reads) == 6
    assert [path.name for path in (tmp_path / "run" / "output").iterdir()] == [CACHE]
    Image.fromarray(np.array([[2, 1, 1]], np.uint8)).save(tmp_path / "two" / "1.png")
    assert held(cfg, one, two) == [first[0], [[0, 2], [1, 2], []]]
    assert reads[6:] == ["0.png", "1.png", "2.png"]  # of the data set that has changed


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"classes": 4},
        {"raw_labels": ((0, 0), (2, 2), (255, 255))},
        {"raw_labels": ((0, 0), (2, 2), (255, 254)), "ignore_label": 254},
    ],
)
def test_what_changes_the_meaning_of_labels_is_noticed(
    make_cfg: Make, make_metadata: Make, tmp_path: Path, reads: list[str], change: dict[str, Any]
) -> None:
    cfg = make_cfg(OUTPUT_DIR=str(tmp_path / "output"))
    for metadata in (make_metadata(3), make_metadata(**{"classes": 3, **change})):
        assert held(cfg, label_set(tmp_path / "set", metadata, [[0, 2, 255]])) == [[[0, 2]]]
    assert len(reads) == 2
    held(cfg, label_set(tmp_path / "set", make_metadata(3), [[0, 2, 255]] * 2))
    assert len(reads) == 4


@pytest.mark.parametrize("damage", ["cut", "no archive", "empty", "flipped", "index", "class", "negative", "shape"])
def test_damaged_notes_are_not_believed(
    make_cfg: Make, make_metadata: Make, tmp_path: Path, reads: list[str], caplog: Any, damage: str
) -> None:
    cfg = make_cfg(OUTPUT_DIR=str(tmp_path / "output"))
    data = label_set(tmp_path / "set", make_metadata(3), [[0, 2], [1, 1]])
    expected, path = held(cfg, data), tmp_path / "output" / CACHE
    content = path.read_bytes()
    with np.load(path) as arrays:
        ((key, pairs),) = arrays.items()
    wrong = {
        "index": pairs + np.array([2, 0]),
        "class": pairs + np.array([0, 1]),
        "negative": -1 - pairs,
        "shape": pairs.ravel(),
    }
    if damage in wrong:
        np.savez(path, **{key: wrong[damage].astype(np.int32)})
    else:
        middle = len(content) // 2
        flipped = content[:90] + bytes(255 - byte for byte in content[90:middle]) + content[middle:]
        path.write_bytes({"cut": content[:-9], "no archive": b"abc" * 99, "empty": b"", "flipped": flipped}[damage])
    caplog.clear()
    assert held(cfg, data) == expected
    assert len(reads) == 4
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert CACHE in warning
    assert "so the label files are read again" in warning
    assert held(cfg, data) == expected  # mended
    assert len(reads) == 4


def test_notes_that_cannot_be_written_are_no_error(
    make_cfg: Make, make_metadata: Make, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "file").touch()
    data = label_set(tmp_path / "set", make_metadata(3), [[0, 2], [1, 1]])
    assert held(make_cfg(OUTPUT_DIR=str(tmp_path / "file")), data) == [[[0, 2], [1]]]
    assert "cannot be written" in caplog.text


def test_time_left_is_said(make_cfg: Make, make_metadata: Make, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    held(make_cfg(OUTPUT_DIR=str(tmp_path)), label_set(tmp_path / "set", make_metadata(3), [[0]] * 40))
    assert "toy: reading label files: 32/40 ETA=0:00:00" in caplog.text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    caplog.clear()
    held(make_cfg(OUTPUT_DIR=str(tmp_path)), label_set(tmp_path / "set", make_metadata(3), [[0]] * 41))
    assert "ETA" not in caplog.text


# ------------------------------------------------------------------ the loader
@pytest.fixture
def rare_folder(make_folder: Make) -> Path:
    """Nine images with classes 0 and 1; class 2 in the first one only."""
    folder: Path = make_folder([(8, 9)] * 9)
    for i in range(9):
        pixels = np.arange(72, dtype=np.uint8).reshape(8, 9) % (3 if i == 0 else 2)
        Image.fromarray(pixels).save(folder / "masks" / "train" / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("grouping", [False, True])
def test_an_image_with_a_rare_class_comes_more_often(
    make_cfg: Make, rare_folder: Path, tmp_path: Path, caplog: Any, grouping: bool
) -> None:
    caplog.set_level("INFO")
    cfg = make_cfg(
        **REPEATING,
        DATASETS__TRAIN=(f"folder:{rare_folder}:train",),
        DATALOADER__REPEAT_THRESHOLD=1.0,
        DATALOADER__ASPECT_RATIO_GROUPING=grouping,
        OUTPUT_DIR=str(tmp_path / "output"),
    )
    loader = build_train_loader(cfg)
    assert loader.epoch_length == 11  # 8 + sqrt(1 / (1 / 9))
    says = "threshold 1: 1 of 9 images are repeated, mean factor 1.222, 11 images per epoch"
    assert caplog.messages[-1] == f"Repeat-factor sampling with {says}"
    batches = list(islice(loader, 22))  # four epochs
    uses = Counter(sample["image_id"] for batch in batches for sample in batch)
    assert uses == {"000": 12, **{f"{i:03d}": 4 for i in range(1, 9)}}
    repeated = [s["image"] for batch in batches for s in batch if s["image_id"] == "000"]
    assert any(not repeated[0].equal(other) for other in repeated[1:])  # augmented anew each time
    resumed = build_train_loader(cfg, start_position=14)
    assert [s["image_id"] for s in next(resumed)] == [s["image_id"] for s in batches[7]]
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "TrainingSampler", 0.0
    assert build_train_loader(cfg).epoch_length == 9


def test_frequencies_are_those_of_all_data_sets_together(make_cfg: Make, make_metadata: Make, tmp_path: Path) -> None:
    cfg = make_cfg(**REPEATING, DATALOADER__REPEAT_THRESHOLD=1.0, OUTPUT_DIR=str(tmp_path))
    first = label_set(tmp_path / "a", make_metadata(3, name="a"), [[0, 2]])
    second = label_set(tmp_path / "b", make_metadata(3, name="b"), [[0, 0], [0, 1], [0, 0]])
    datasets = [first, second]
    factors = build_repeat_factors(cfg, datasets, [dataset.records for dataset in datasets])
    assert factors == pytest.approx(np.array([2, 1, 2, 1]))


def test_only_the_main_process_reads(
    make_cfg: Make, rare_folder: Path, tmp_path: Path, reads: list[str], monkeypatch: Any
) -> None:
    cfg = make_cfg(
        **REPEATING,
        DATASETS__TRAIN=(f"folder:{rare_folder}:train",),
        DATALOADER__REPEAT_THRESHOLD=1.0,
        OUTPUT_DIR=str(tmp_path / "output"),
    )
    sent: list[Any] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast", lambda value: sent.append(value) or value)
    main = build_train_loader(cfg, rank=0, world_size=2)
    assert len(sent) == 1
    assert len(reads) == 9
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast", lambda _: sent[0])
    other = build_train_loader(cfg, rank=1, world_size=2)
    assert len(reads) == 9
    assert other.epoch_length == main.epoch_length == 11
    next(main), next(other)


def test_images_that_are_drawn_on_the_fly_are_not_repeated(make_cfg: Make) -> None:
    with pytest.raises(UserError, match="'shapes_semantic_train' are drawn on the fly"):
        build_train_loader(make_cfg(DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler"))


# ------------------------------------------------------------------ the config
def test_sampler_and_threshold_go_together() -> None:
    sampler, threshold = "DATALOADER.SAMPLER_TRAIN", "DATALOADER.REPEAT_THRESHOLD"
    get_cfg(None, [sampler, "RepeatFactorTrainingSampler", threshold, 0.001])
    with pytest.raises(UserError) as error:
        get_cfg(None, [threshold, 0.001])
    assert str(error.value) == (
        f"command line: {threshold} is 0.001 but has no effect with {sampler} TrainingSampler: "
        f"set it to 0, or {sampler} to RepeatFactorTrainingSampler"
    )
    with pytest.raises(UserError) as error:
        get_cfg(None, [sampler, "RepeatFactorTrainingSampler"])
    assert str(error.value) == (
        f"command line: {sampler} is 'RepeatFactorTrainingSampler' but with {threshold} 0 nothing would be repeated: "
        "set it, such as to 0.001"
    )

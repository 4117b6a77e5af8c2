"""Cityscapes: label ids to train ids."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskformer.data import get_dataset
from maskformer.data.preparation import cityscapes
from maskformer.errors import UserError

Save, Read = Callable[..., Path], Callable[[Path], Any]


@pytest.fixture
def write(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def lay_out(ids: Any, city: str = "aachen", stem: str = "aachen_000000_000019") -> Path:
        own = tmp_path / "cityscapes"
        ids = np.array(ids)
        save(np.zeros((*ids.shape, 3)), own / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png")
        save(ids, own / "gtFine" / "val" / city / f"{stem}_gtFine_labelIds.png")
        return own / "gtFine" / "val" / city / f"{stem}_gtFine_labelTrainIds.png"

    return lay_out


def test_train_ids(write: Callable[..., Path], tmp_path: Path, read: Read) -> None:
    # Every id: void ones, road 7, sidewalk 8, building 11 … bicycle 33; 255 is -1, the license plate.
    target = write([[*range(34), 255]])
    cityscapes.prepare(tmp_path, ["val"], workers=1)
    trained = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12}
    trained |= {26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert read(target) == [[trained.get(i, 255) for i in [*range(34), 255]]]


def test_cities_are_kept_apart(write: Callable[..., Path], tmp_path: Path) -> None:
    write([[7]], "lindau", "picture")
    write([[8, 8]], "aachen", "picture")
    cityscapes.prepare(tmp_path, ["val"], workers=1)
    records = get_dataset("cityscapes_fine_sem_seg_val").records
    assert [(record["image_id"], record["width"]) for record in records] == [
        ("aachen/picture", 2),
        ("lindau/picture", 1),
    ]
    for record in records:
        assert Path(record["file_name"]).parent.name == Path(record["sem_seg_file_name"]).parent.name


def test_label_ids_in_the_place_of_train_ids_are_made_again(
    write: Callable[..., Path], tmp_path: Path, save: Save, read: Read
) -> None:
    target = save([[7, 8, 0]], write([[7, 8, 0]]))
    cityscapes.prepare(tmp_path, ["val"], workers=1)
    assert read(target) == [[0, 1, 255]]


def test_what_cannot_be_used(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gtFine/val' does not exist: .*gtFine_trainvaltest.zip"):
        cityscapes.prepare(tmp_path, ["val"], workers=1)
    target = write([[7, 34]])
    with pytest.raises(UserError, match=r"_labelIds.png' hold 34, which is no id of Cityscapes"):
        cityscapes.prepare(tmp_path, ["val"], workers=1)
    target.with_name(target.name.replace("TrainIds", "Ids")).unlink()
    with pytest.raises(UserError, match=r"has no <city>/\*_gtFine_labelIds.png"):
        cityscapes.prepare(tmp_path, ["val"], workers=1)


def test_an_image_without_train_ids_says_what_to_run(write: Callable[..., Path], tmp_path: Path) -> None:
    write([[7]])
    with pytest.raises(UserError, match=r"datasets/prepare_cityscapes_sem_seg.py"):
        get_dataset("cityscapes_fine_sem_seg_val").records  # noqa: B018


@pytest.mark.skipif(not os.environ.get("MASKFORMER_TEST_DATA"), reason="MASKFORMER_TEST_DATA names no folder")
def test_real_label_maps(tmp_path: Path, read: Read) -> None:
    """Against train ids that were made by others."""
    source = Path(os.environ["MASKFORMER_TEST_DATA"]) / "layouts" / "cityscapes" / "gtFine"
    expected = {}
    for path in source.rglob("*_gtFine_labelIds.png"):
        copy = tmp_path / "cityscapes" / "gtFine" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        train_ids = path.name.replace("labelIds", "labelTrainIds")
        expected[copy.with_name(train_ids)] = path.with_name(train_ids)
    assert len(expected) == 5
    cityscapes.prepare(tmp_path, ["train", "val"], workers=1)
    for made, theirs in expected.items():
        share = np.mean(np.array(read(made)) != np.array(read(theirs)))
        # The label maps of the small picture were each shrunk on their own, so they differ along a few borders.
        assert share == 0 if "aachen" in made.name else share < 0.003

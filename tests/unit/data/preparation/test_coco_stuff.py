"""COCO-Stuff-10k: MATLAB matrices and image lists."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from maskformer.data import get_dataset
from maskformer.data.labels import read_semantic
from maskformer.data.preparation import coco_stuff
from maskformer.errors import UserError

Save, Read = Callable[..., Path], Callable[[Path], Any]
S = [[1, 2, 3], [172, 82, 1]]


@pytest.fixture
def write(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Lays pictures out as downloaded; returns the folder of the data set."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def lay_out(matrix: Any, *names: str, field: str = "S", dtype: Any = np.float64) -> Path:
        own = tmp_path / "coco" / "coco_stuff_10k"
        for folder in ("annotations", "imageLists"):
            (own / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            save(np.zeros((2, 3, 3)), own / "images" / f"{name}.jpg")
            with h5py.File(own / "annotations" / f"{name}.mat", "w", userblock_size=512) as file:
                file[field] = np.array(matrix, dtype).T  # as MATLAB stores it
        (own / "imageLists" / "test.txt").write_text("\n".join(names) + "\n")
        return own

    return lay_out


@pytest.mark.parametrize("dtype", [np.float64, np.uint16])
def test_labels(write: Callable[..., Path], tmp_path: Path, read: Read, dtype: Any) -> None:
    own = write(S, "a", "b", dtype=dtype)
    coco_stuff.prepare(tmp_path, ["test"], workers=1)
    assert read(own / "annotations_detectron2" / "test" / "a.png") == [[255, 0, 1], [170, 80, 255]]
    assert sorted(path.name for path in (own / "images_detectron2" / "test").iterdir()) == ["a.jpg", "b.jpg"]
    dataset = get_dataset("coco_2017_test_stuff_10k_sem_seg")
    assert read_semantic(dataset.records[0], dataset.metadata).tolist() == [[255, 0, 1], [170, 80, 255]]
    # 170 is the last stuff class, 80 the first: prediction files name them as COCO does.
    assert (dataset.metadata.dataset_ids[170], dataset.metadata.dataset_ids[80]) == (182, 92)
    assert (dataset.metadata.things[79], dataset.metadata.things[80]) == (True, False)


@pytest.mark.parametrize(("value", "said"), [(0, "holds 0"), (173, "holds 173")])
def test_other_values_are_refused(write: Callable[..., Path], tmp_path: Path, value: int, said: str) -> None:
    own = write([[1, 2, 3], [4, value, 5]], "a")
    with pytest.raises(UserError, match=rf"a.mat' {said}, but COCO-Stuff v1.0 holds 1..172"):
        coco_stuff.prepare(tmp_path, ["test"], workers=1)
    assert not (own / "annotations_detectron2").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"matrix": S, "field": "T"}, "has no 'S' that is a matrix of whole numbers"),
        ({"matrix": [[1.5, 2, 3], [1, 1, 1]]}, "a matrix of whole numbers"),
        ({"matrix": [[np.nan, 2, 3], [1, 1, 1]]}, "a matrix of whole numbers"),
        ({"matrix": [[np.inf, 2, 3], [1, 1, 1]]}, "a matrix of whole numbers"),
        ({"matrix": S, "dtype": np.complex128}, "a matrix of whole numbers"),
        ({"matrix": S, "dtype": "S1"}, "a matrix of whole numbers"),
        ({"matrix": [1, 2, 3]}, "a matrix of whole numbers"),
        ({"matrix": [[1, 2], [3, 4]]}, "is 2x2 pixels"),
        ({"matrix": [[1e300, 2, 3], [1, 1, 1]]}, "holds 1"),
        ({"matrix": [[2**64 - 1, 2, 3], [1, 1, 1]], "dtype": np.uint64}, "holds 18446744073709551615"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_matrices_that_cannot_be_used(
    write: Callable[..., Path], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    write(options.pop("matrix"), "a", **options)
    with pytest.raises(UserError) as error:
        coco_stuff.prepare(tmp_path, ["test"], workers=1)
    assert words in str(error.value)
    assert "a.mat" in str(error.value)


@pytest.mark.parametrize("kind", ["soft", "external", "outside", "virtual", "group", "absurd"])
def test_what_is_no_matrix_inside_of_the_file(write: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Links to elsewhere are not followed, and nothing is read that is not of the image's size."""
    own = write(S, "a", "b")
    values = np.array(S, np.uint8).T.copy()
    (tmp_path / "raw").write_bytes(values.tobytes())
    with h5py.File(own / "annotations" / "b.mat", "w") as file:
        if kind == "soft":
            file["T"], file["S"] = values, h5py.SoftLink("/T")
        elif kind == "external":
            file["S"] = h5py.ExternalLink(str(own / "annotations" / "a.mat"), "/S")
        elif kind == "outside":
            file.create_dataset("S", (3, 2), "u1", external=[(str(tmp_path / "raw"), 0, 6)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3, 2), "f8")
            layout[:] = h5py.VirtualSource(str(own / "annotations" / "a.mat"), "S", (3, 2))
            file.create_virtual_dataset("S", layout)
        elif kind == "group":
            file.create_group("S")
        else:
            file.create_dataset("S", (2**20, 2**30), "f8", chunks=(16, 16))
    words = "is 1048576x1073741824 pixels" if kind == "absurd" else "has no 'S' that is a matrix"
    with pytest.raises(UserError, match=rf"b.mat' {words}.*; 1 pictures of"):
        coco_stuff.prepare(tmp_path, ["test"], workers=1)


def test_lists_may_begin_with_a_mark_of_their_encoding(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write(S, "a")
    (own / "imageLists" / "test.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    coco_stuff.prepare(tmp_path, ["test"], workers=1)
    assert [path.name for path in (own / "annotations_detectron2" / "test").iterdir()] == ["a.png"]


def test_other_files_in_the_place_of_ours_are_made_again(
    write: Callable[..., Path], tmp_path: Path, save: Save, read: Read, caplog: Any
) -> None:
    own = write(S, "a", "b", "c")
    save([[0, 1, 2], [171, 81, 0]], own / "annotations_detectron2" / "test" / "a.png")  # one too many
    (own / "images_detectron2" / "test").mkdir(parents=True)
    for name in "abc":
        (own / "images_detectron2" / "test" / f"{name}.jpg").write_bytes((own / "images" / "a.jpg").read_bytes())
    save(np.ones((2, 3, 3)) * 200, own / "images" / "b.jpg")
    caplog.set_level("INFO")
    coco_stuff.prepare(tmp_path, ["test"], workers=1)
    assert read(own / "annotations_detectron2" / "test" / "a.png") == [[255, 0, 1], [170, 80, 255]]
    same = (own / "images_detectron2" / "test" / "b.jpg").read_bytes() == (own / "images" / "b.jpg").read_bytes()
    assert same
    assert sum("1 pictures of coco_2017_test_stuff_10k_sem_seg were there" in line for line in caplog.messages) == 1
    assert "(3 made, 0 kept)" in caplog.text


def test_damaged_and_missing_files_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write(S, "a", "b", "c")
    (own / "annotations" / "b.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(UserError, match=r"b.mat' cannot be read \(.*; 2 pictures of"):
        coco_stuff.prepare(tmp_path, ["test"], workers=1)
    (own / "annotations" / "b.mat").unlink()
    with pytest.raises(UserError, match=r"b.mat' does not exist: .*nightrome"):
        coco_stuff.prepare(tmp_path, ["test"], workers=1)
    (own / "images" / "c.jpg").unlink()
    (own / "imageLists" / "test.txt").write_text("c\n")
    with pytest.raises(UserError, match=r"c.jpg' does not exist"):
        coco_stuff.prepare(tmp_path, ["test"], workers=1)


@pytest.mark.parametrize(
    ("text", "words"), [("", "is empty"), ("a\na\n", "twice"), ("../a\n", "by a path"), (None, "does not exist")]
)
def test_lists_that_cannot_be_used(write: Callable[..., Path], tmp_path: Path, text: str | None, words: str) -> None:
    own = write(S, "a")
    path = own / "imageLists" / "test.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=words):
        coco_stuff.prepare(tmp_path, ["test"], workers=1)


def test_without_h5py(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert coco_stuff.main([]) == 2
    assert capsys.readouterr().err.endswith("needs h5py, which is not installed: pip install h5py\n")

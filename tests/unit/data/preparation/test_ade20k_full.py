"""ADE20K-Full: the index, the class indices of its PNGs, and shrinking, compared with what was worked out by hand."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer.data import get_dataset
from maskformer.data.labels import read_semantic
from maskformer.data.preparation import ade20k_full
from maskformer.data.preparation.ade20k_full import split_of, target_size
from maskformer.errors import UserError
from maskformer.pickles import dump_pickle

Save, Read = Callable[..., Path], Callable[[Path], Any]

FOLDER = "ADE20K_2021_17_01/images/ADE/validation/urban/street"
# Class index (R // 10) * 256 + G: wall 2978 = 11 * 256 + 162, sky 2420 = 9 * 256 + 116, sidewalk 2377 = 9 * 256 + 73.
WALL, SKY, SIDEWALK, NOTHING = (110, 162), (90, 116), (90, 73), (0, 0)
UNUSED = (0, 1)  # class index 1 is none of the 847


@pytest.fixture
def write(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Lays pictures out as downloaded, each with the same labels; returns the folder of the data set."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def lay_out(pixels: Any, *names: str, **more: Any) -> Path:
        pixels = np.array(pixels)
        for name in names:
            image = np.random.default_rng(0).integers(0, 256, (*pixels.shape[:2], 3))
            save(image, tmp_path / FOLDER / f"{name}.jpg")
            save(pixels, tmp_path / FOLDER / f"{name}_seg.png")
        index = {"folder": [FOLDER] * len(names), "filename": [f"{name}.jpg" for name in names], **more}
        path = tmp_path / "ADE20K_2021_17_01" / "index_ade20k.pkl"
        path.write_bytes(pickle.dumps(index, protocol=2))
        return path.parent

    return lay_out


def coded(rows: list[list[tuple[int, int]]], instance: int = 0) -> list[list[tuple[int, int, int]]]:
    # The part of R below ten, and B, say something else.
    return [[(red + instance % 10, green, instance) for red, green in row] for row in rows]


def test_class_indices(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write(coded([[WALL, SKY, NOTHING], [SIDEWALK, UNUSED, WALL]], instance=7), "ADE_val_00000001")
    ade20k_full.prepare(tmp_path, ["val"], workers=1)
    path = own / "annotations_detectron2" / "validation" / "ADE_val_00000001.tif"
    with Image.open(path) as image:
        assert image.mode == "I;16"
        assert np.asarray(image).tolist() == [[0, 2, 65535], [8, 65535, 0]]
    copy = own / "images_detectron2" / "validation" / "ADE_val_00000001.jpg"
    assert copy.read_bytes() == (tmp_path / FOLDER / "ADE_val_00000001.jpg").read_bytes()
    (record,) = get_dataset("ade20k_full_sem_seg_val").records
    labels = read_semantic(record, get_dataset("ade20k_full_sem_seg_val").metadata)
    assert labels.tolist() == [[0, 2, 65535], [8, 65535, 0]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 683), (512, 683)),
        ((513, 600), (512, 599)),  # 600 * 512 / 513 = 598.8
        ((1536, 2048), (512, 683)),  # 682.67
        ((2048, 1024), (1024, 512)),
        ((400, 5000), (400, 5000)),
    ],
)
def test_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target_size(*size) == expected


def test_large_pictures_are_shrunk(write: Callable[..., Path], tmp_path: Path, caplog: Any) -> None:
    pixels = np.zeros((1024, 1100, 3), np.uint8)
    pixels[:, :550] = (*WALL, 0)
    pixels[:, 550:] = (*SKY, 0)
    pixels[1::2, :2] = (*SIDEWALK, 0)  # of two rows equally near to the middle between them the lower one is taken
    own = write(pixels, "ADE_val_00000001")
    ade20k_full.prepare(tmp_path, ["val"], workers=1)
    with Image.open(own / "annotations_detectron2" / "validation" / "ADE_val_00000001.tif") as image:
        labels = np.asarray(image)
    assert labels.shape == (512, 550)
    assert np.unique(labels[:, 0]).tolist() == [8]
    assert np.unique(labels[:, 1:275]).tolist() == [0]
    assert np.unique(labels[:, 275:]).tolist() == [2]
    with Image.open(own / "images_detectron2" / "validation" / "ADE_val_00000001.jpg") as image:
        assert image.size == (550, 512)
        # Noise that is averaged over neighbours loses most of its spread (73.9); picked pixels would keep it.
        assert np.asarray(image).std() < 50
    caplog.set_level("INFO")
    ade20k_full.prepare(tmp_path, ["val"], workers=1)
    assert "(0 made, 1 kept)" in caplog.text


@pytest.mark.parametrize(
    ("folder", "name", "split"),
    [
        ("a/images/ADE/training/x", "ADE_train_00000001.jpg", "train"),
        ("a/images/ADE/training/x", "ADE_val_00000001.jpg", "val"),
        ("a/images/ADE/training/x", "ADE_frame_00000001.jpg", "train"),
        ("a/images/ADE/validation/x", "ADE_frame_00000001.jpg", "val"),
    ],
)
def test_splits(folder: str, name: str, split: str) -> None:
    assert split_of(folder, name) == split


def test_a_picture_of_no_split() -> None:
    with pytest.raises(UserError, match=r"other/ADE_test_1.jpg, which belongs to neither"):
        split_of("other", "ADE_test_1.jpg")


@pytest.mark.parametrize(("mode", "taken"), [("P", True), ("L", False), ("RGBA", False)])
def test_annotations_without_colours_are_refused(
    write: Callable[..., Path], tmp_path: Path, mode: str, taken: bool
) -> None:
    own = write(coded([[WALL, SKY, WALL]]), "ADE_val_1")
    path = tmp_path / FOLDER / "ADE_val_1_seg.png"
    with Image.open(path) as image:
        # Of the colours of these two classes a palette keeps all.
        image.quantize(2, dither=Image.Dither.NONE).save(path) if mode == "P" else image.convert(mode).save(path)
    if taken:
        ade20k_full.prepare(tmp_path, ["val"], workers=1)
        with Image.open(own / "annotations_detectron2" / "validation" / "ADE_val_1.tif") as image:
            assert np.asarray(image).tolist() == [[0, 2, 0]]
        return
    with pytest.raises(UserError, match=rf"ADE_val_1_seg.png' has mode {mode}, but ADE20K's \*_seg.png are RGB"):
        ade20k_full.prepare(tmp_path, ["val"], workers=1)


@pytest.mark.parametrize("side", [4, 600])
def test_other_files_in_the_place_of_ours_are_made_again(
    write: Callable[..., Path], tmp_path: Path, save: Save, side: int
) -> None:
    own = write(np.full((side, side, 3), (*SKY, 0)), "ADE_val_1")
    small = min(side, 512)
    target = own / "annotations_detectron2" / "validation" / "ADE_val_1.tif"
    image = save(np.zeros((small, small, 3)), own / "images_detectron2" / "validation" / "ADE_val_1.jpg")
    for labels in (np.full((small, small), 3, np.uint16), np.full((small, small), 2, np.uint8)):
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(target)
        ade20k_full.prepare(tmp_path, ["val"], workers=1)
        with Image.open(target) as made:
            assert (made.mode, np.unique(np.asarray(made)).tolist()) == ("I;16", [2])
    with Image.open(image) as made:
        assert np.asarray(made).any()


# ------------------------------------------------------------------ the index
class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/maskformer_index_was_executed"),))


def test_the_index_may_hold_arrays_and_its_code_is_never_run(write: Callable[..., Path], tmp_path: Path) -> None:
    presence = np.zeros((3, 4))
    own = write([[(*WALL, 0)]], "ADE_val_1", objectPresence=presence, counts=[np.float64(1)], names={"wall": 1})
    assert ade20k_full.read_index(own / "index_ade20k.pkl") == [(FOLDER, "ADE_val_1.jpg")]
    for protocol in (0, 2, 4):
        hostile = {"folder": ["a"], "filename": ["ADE_val_1.jpg"], "objectPresence": Hostile()}
        (own / "index_ade20k.pkl").write_bytes(pickle.dumps(hostile, protocol=protocol))
        with pytest.raises(UserError, match=r"index_ade20k.pkl' asks for .*: do not trust it"):
            ade20k_full.prepare(tmp_path, ["val"], workers=1)
    assert not Path("/tmp/maskformer_index_was_executed").exists()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
@pytest.mark.parametrize("dtype", [object, "U40"])
def test_the_index_may_hold_arrays_of_text(protocol: int, dtype: Any, tmp_path: Path) -> None:
    own = tmp_path / "ADE20K_2021_17_01"
    own.mkdir()
    names = np.array(["ADE_val_1.jpg", "ADE_train_22.jpg"], dtype)
    index = {"folder": np.array(["a", "b"], dtype), "filename": names, "objects": np.array([["x", 1]], object)}
    (own / "index_ade20k.pkl").write_bytes(pickle.dumps(index, protocol=protocol))
    assert ade20k_full.read_index(own / "index_ade20k.pkl") == [("a", "ADE_val_1.jpg"), ("b", "ADE_train_22.jpg")]
    # What an array of objects holds is read by the same rules.
    index["filename"] = np.array(["ADE_val_1.jpg", Hostile()], object)
    (own / "index_ade20k.pkl").write_bytes(pickle.dumps(index, protocol=protocol))
    with pytest.raises(UserError, match="do not trust it"):
        ade20k_full.read_index(own / "index_ade20k.pkl")
    assert not Path("/tmp/maskformer_index_was_executed").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_index_may_hold_harmless_values_of_other_types(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "index_ade20k.pkl"
    others = {
        "text": np.str_("a"),
        "numbers": [np.bool_(True), np.int64(3), np.float64(2.5), np.complex64(1j), 2j],
        "arrays": [np.array(v) for v in ([True], [b"ab"], [1j], ["2021-01-17"])] + [np.zeros(2, "M8[s]")],
        "empty": [np.array(""), np.array(b"")],
        "plain": [range(3), bytearray(b"a"), slice(1, 2), {1, 2}, frozenset(), b"\xff", None, ("x", 1.5)],
    }
    index = {"folder": list(np.array(["a", "b"])), "filename": list(np.array(["1.jpg", "22.jpg"])), **others}
    path.write_bytes(pickle.dumps(index, protocol=protocol))
    assert ade20k_full.read_index(path) == [("a", "1.jpg"), ("b", "22.jpg")]
    for names in (range(1), [range(1)], [np.int64(1)], np.array([b"1.jpg"]), np.zeros(1, complex)):
        path.write_bytes(pickle.dumps({"folder": ["a"], "filename": names}, protocol=protocol))
        with pytest.raises(UserError, match="has no list 'filename' of names"):
            ade20k_full.read_index(path)


@pytest.mark.parametrize(
    ("value", "trusted"),
    [
        (np.zeros(1, [("a", "f4")]), True),
        (np.zeros(1, "V3"), True),
        (np.rec.array([1.0]), False),
        (Path("a"), False),
        (print, False),
    ],
    ids=["records", "raw bytes", "array class", "path", "function"],
)
def test_only_what_could_be_code_is_not_to_be_trusted(value: Any, trusted: bool, tmp_path: Path) -> None:
    path = tmp_path / "index_ade20k.pkl"
    path.write_bytes(pickle.dumps({"folder": ["a"], "filename": ["1.jpg"], "more": value}))
    with pytest.raises(UserError, match=r"asks for .*: (do not .*)?unpack the official download again$") as error:
        ade20k_full.read_index(path)
    assert ("do not trust it" not in str(error.value)) is trusted


def test_folders_of_the_index_may_be_written_as_windows_does(write: Callable[..., Path], tmp_path: Path) -> None:
    own = write([[(*WALL, 0)]], "ADE_val_1")
    for folder in (FOLDER.replace("/", "\\"), f"./{FOLDER}/"):
        (own / "index_ade20k.pkl").write_bytes(listing(folder, "ADE_val_1.jpg"))
        (item,) = ade20k_full.pictures(tmp_path, ["val"])["val"]
        assert item.image == tmp_path / FOLDER / "ADE_val_1.jpg"
        assert item.raw.is_file()


def listing(folder: str, name: str) -> bytes:
    return dump_pickle({"folder": [folder], "filename": [name]})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04 no pickle", "is damaged"),
        (dump_pickle([1, 2]), "has no list 'folder'"),
        (dump_pickle({"folder": ["a"]}), "has no list 'filename'"),
        (dump_pickle({"folder": ["a"], "filename": [1]}), "has no list 'filename'"),
        (dump_pickle({"folder": ["a"], "filename": np.zeros(1)}), "has no list 'filename'"),
        (dump_pickle({"folder": ["a", "b"], "filename": ["x"]}), "lists 2 folders and 1 file names"),
        (dump_pickle({"folder": [], "filename": []}), "lists 0 folders"),
        (listing("../../etc", "a_val_1.jpg"), "outside of the data set"),
        (listing("/etc", "a_val_1.jpg"), "outside of the data set"),
        (listing("C:/ADE20K_2021_17_01", "a_val_1.jpg"), "outside of the data set"),
        (listing("\\\\server\\ADE20K_2021_17_01", "a_val_1.jpg"), "outside of the data set"),
        (listing("ADE20K_2021_17_01\\..\\..", "a_val_1.jpg"), "outside of the data set"),
        (listing(FOLDER, "../a_val_1.jpg"), "outside of the data set"),
        (listing(FOLDER, "..\\a_val_1.jpg"), "outside of the data set"),
        (listing(FOLDER, "c:a_val_1.jpg"), "outside of the data set"),
        (listing(FOLDER, "a_val_\0.jpg"), "outside of the data set"),
        (listing(FOLDER, ""), "lists the picture '' in "),
        (listing(FOLDER, ".."), "lists the picture '..' in "),
        (listing("images/ADE/validation", "a_val_1.jpg"), "official index's folders begin with 'ADE20K_2021_17_01/'"),
        (dump_pickle({"folder": [FOLDER, FOLDER + "/b"], "filename": ["a_val_1.jpg"] * 2}), "two pictures of the name"),
        (listing(FOLDER, "a_train_1.jpg"), "no picture of val"),
    ],
)
def test_indices_that_cannot_be_used(content: bytes, words: str, tmp_path: Path) -> None:
    own = tmp_path / "ADE20K_2021_17_01"
    own.mkdir()
    (own / "index_ade20k.pkl").write_bytes(content)
    with pytest.raises(UserError) as error:
        ade20k_full.prepare(tmp_path, ["val"], workers=1)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_missing(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ADE20K_2021_17_01' does not exist: ask for the full data set at https"):
        ade20k_full.prepare(tmp_path, ["val"], workers=1)
    own = write([[(*WALL, 0)]], "ADE_val_1", "ADE_val_2")
    (tmp_path / FOLDER / "ADE_val_2_seg.png").unlink()
    with pytest.raises(UserError, match=r"ADE_val_2_seg.png' does not exist: .*; 1 pictures of .* are finished"):
        ade20k_full.prepare(tmp_path, ["val"], workers=1)
    (own / "index_ade20k.pkl").unlink()
    with pytest.raises(UserError, match=r"index_ade20k.pkl' does not exist: ask"):
        ade20k_full.prepare(tmp_path, ["val"], workers=1)

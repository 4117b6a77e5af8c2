"""Weight files: recognised by content, refused with a reason, written atomically."""

from __future__ import annotations

import argparse
import io
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from maskformer.checkpoint import read_state_dict, remote
from maskformer.checkpoint.files import atomic_write, read_weight_file, recognise
from maskformer.errors import UserError

STATE = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.tensor([1.5, -2.0])}


def save(path: Path, kind: str, state: dict[str, Any] | None = None) -> Path:
    state = STATE if state is None else state
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}}))
    elif kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "torch legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"model": state}, path)
    return path


KINDS = ("pickle", "torch", "torch legacy", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_formats_are_recognised_by_content(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "weights.bin", kind)
    assert recognise(path) == kind
    tensors = read_state_dict(path)
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95, -1])
def test_cut_files_are_refused(tmp_path: Path, kind: str, part: float) -> None:
    path = save(tmp_path / "weights.pkl", kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)] if part > 0 else data[:-1])
    with pytest.raises(UserError, match=r"weights\.pkl .*(download|copy)") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_byte_in_a_zip_directory_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", "torch")
    data = bytearray(path.read_bytes())
    data[-30:] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(UserError, match="download or copy it again"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS"),
        (b"\x00\x01\x02 nothing known", "no weight file"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({}), "holds no tensors"),
        (pickle.dumps({"model": {"w": "text"}}), "the entry w is a str"),
        (pickle.dumps({"model": {3: np.ones(1)}}), "names a tensor 3"),
        (pickle.dumps({"model": {"\x1b[2J\n": np.ones(1)}}), r"names a tensor '\\x1b\[2J\\n'"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_state_dict(tmp_path / "model.pkl")
    with pytest.raises(UserError, match="is a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(UserError, match=r"No weight file is named"):
        read_state_dict("")
    with pytest.raises(UserError, match="cannot be read"):
        recognise(tmp_path / "model.pkl")


def test_foreign_torch_files_are_refused_by_what_they_ask_for(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(UserError, match=r"asks for argparse\.Namespace, but weights need only tensors"):
        read_state_dict(path)


def test_names_of_data_parallel_training_lose_their_prefix(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", "torch", {f"module.{name}": tensor for name, tensor in STATE.items()})
    assert read_weight_file(path).tensors.keys() == STATE.keys()


def test_state_dict_without_model_key(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth").keys() == STATE.keys()
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "b.pth")
    assert read_state_dict(tmp_path / "b.pth").keys() == STATE.keys()


def test_atomic_write_keeps_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic_write(path) as file:
        file.write(b"first")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            assert path.read_bytes() == b"first"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"first"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_writing_where_one_cannot_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"), atomic_write(tmp_path / "file" / "below"):
        pass
    with pytest.raises(UserError, match="No space left"), atomic_write(tmp_path / "other"):
        raise OSError(28, "No space left on device")


class Response(io.BytesIO):
    def __init__(self, data: bytes, length: int) -> None:
        super().__init__(data)
        self.headers = {"Content-Length": str(length)}


def test_addresses_are_downloaded_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    data = save(tmp_path / "source", "pickle").read_bytes()
    asked: list[str] = []

    def open_address(request: Any, timeout: float) -> Response:
        asked.append(request.full_url)
        return Response(data, len(data))

    monkeypatch.setattr(remote.urllib.request, "urlopen", open_address)
    for _ in range(2):
        assert read_state_dict("detectron2://ImageNetPretrained/torchvision/R-50.pkl").keys() == STATE.keys()
    assert asked == ["https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl"]
    kept = tmp_path / "cache/dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl"
    assert kept.read_bytes() == data


def test_without_network_the_message_says_which_file_goes_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path))

    def fail(request: Any, timeout: float) -> Response:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(remote.urllib.request, "urlopen", fail)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route\): fetch it elsewhere") as caught:
        read_state_dict("https://example.org/a/b.pkl")
    assert str(tmp_path / "example.org/a/b.pkl") in str(caught.value)


def test_a_broken_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(remote.urllib.request, "urlopen", lambda request, timeout: Response(b"abc", 10))
    with pytest.raises(UserError, match="ended after 3 of 10 bytes"):
        read_state_dict("https://example.org/b.pkl")
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


@pytest.mark.parametrize(
    "source", ["ftp://a/b.pkl", "https://a/../../b", "http://a/b.pkl", "https:///b.pkl", "s3://a/b"]
)
def test_other_addresses_are_refused(source: str) -> None:
    with pytest.raises(UserError, match="not an address"):
        read_state_dict(source)


def test_files_that_recipes_name_without_saying_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "R-101.pkl"
    with pytest.raises(UserError, match=r"download https://\S+/resnet101-63fe2227\.pth and set MODEL\.WEIGHTS to it"):
        read_state_dict(path)
    (tmp_path / "resnet101-63fe2227.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"resnet101-63fe2227\.pth does: set MODEL\.WEIGHTS to that one"):
        read_state_dict(path)


def test_numbers_keep_type_and_value_through_every_format(tmp_path: Path) -> None:
    state = {"a": torch.arange(3), "b": torch.rand(4).half(), "c": torch.tensor(5)}
    for kind in KINDS:
        back = read_state_dict(save(tmp_path / kind, kind, state))
        assert all(back[name].dtype == state[name].dtype and torch.equal(back[name], state[name]) for name in state)
    assert np.asarray(back["a"]).tolist() == [0, 1, 2]

"""The restricted unpickler: what numpy writes is read, everything else is refused."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskformer.checkpoint.files import read_weight_file
from maskformer.errors import UserError
from maskformer.pickles import dump_pickle


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


class Calls:
    """Pickles as a call of `function`: what a hostile file does."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


ARRAYS = {
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big_endian": np.arange(5, dtype=">f4"),
    "half": np.array([0.5, -2], dtype=np.float16),
    "int64": np.arange(4).reshape(2, 2),
    "bytes": np.array([0, 127, 128, 255], dtype=np.uint8),
    "bool": np.array([True, False]),
    "scalar": np.array(3.5, dtype=np.float32),
    "numpy_scalar": np.float64(2.25),
    "empty": np.zeros((0, 3), dtype=np.float32),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    content = {"model": OrderedDict(ARRAYS), "__author__": "someone", "matching_heuristics": True, "epoch": (1, None)}
    file = read_weight_file(write(tmp_path / "a.pkl", pickle.dumps(content, protocol)))
    assert file.matching_heuristics
    assert list(file.tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        native = np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("="))
        assert torch.equal(file.tensors[name], torch.from_numpy(native)), name


@pytest.mark.parametrize("order", ["<", ">"])
def test_pickle_of_python_2_is_read(tmp_path: Path, order: str) -> None:
    """Python 2 wrote an array's bytes as a string, which latin1 reads back."""
    data = (
        b"\x80\x02}q\x00U\x05modelq\x01}q\x02U\x01wq\x03cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\n"
        b"q\x05K\x00\x85q\x06U\x01bq\x07\x87q\x08Rq\x09(K\x01K\x02\x85q\x0acnumpy\ndtype\nq\x0bU\x02f4q\x0cK\x00K\x01"
        b"\x87q\x0dRq\x0e(K\x03U\x01"
        + order.encode()
        + b"q\x0fNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x10b\x89U\x08"
        + np.array([1.5, -3], dtype=order + "f4").tobytes()
        + b"q\x11tq\x12bss."
    )
    assert read_weight_file(write(tmp_path / "a.pkl", data)).tensors["w"].tolist() == [1.5, -3]


def test_written_pickles_name_numpy_as_numpy_1_does(tmp_path: Path) -> None:
    arrays = {name: array for name, array in ARRAYS.items() if isinstance(array, np.ndarray)}
    data = dump_pickle({"model": arrays})
    assert b"numpy._core" not in data
    back = pickle.loads(data)["model"]
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())
    assert all(back[name].dtype == array.dtype.newbyteorder("=") for name, array in arrays.items())


def harmless() -> Any:
    return np.zeros(2, dtype=np.float32)


def nested_in_an_array() -> Any:
    array = np.empty(1, dtype=object)
    array[0] = Calls(os.system, "true")
    return array


def persistent(_: Any) -> bytes:
    """A pickle whose value is an object stored elsewhere, as in PyTorch's own files."""
    return b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00wX\x07\x00\x00\x00storageQss."


HOSTILE = {
    "os.system": Calls(os.system, "true"),
    "builtins.eval": Calls(eval, "1"),
    "builtins.getattr": Calls(getattr, OrderedDict, "fromkeys"),
    "torch.storage": Calls(torch.storage._load_from_bytes, b""),
    "torch._utils": Calls(torch._utils._rebuild_tensor_v2, None),
    "numpy.load": Calls(np.load, "x", None, True),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "text array": np.array(["a"]),
    "object array": np.array([None, {}], dtype=object),
    "call inside an object array": nested_in_an_array(),
    "record array": np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
    "date array": np.zeros(2, dtype="datetime64[s]"),
    "array class": np.rec.array([1.0]),
}


@pytest.mark.parametrize("place", ["model", "beside", "deep"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("poison", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path: Path, poison: str, protocol: int, place: str) -> None:
    value = HOSTILE[poison]
    content: dict[str, Any] = {"model": {"w": harmless()}}
    if place == "model":
        content["model"]["v"] = value
    elif place == "beside":
        content["optimizer"] = value
    else:
        content["x"] = [{"y": (OrderedDict(z=[value]),)}]
    path = write(tmp_path / "a.pkl", pickle.dumps(content, protocol))
    with pytest.raises(UserError, match="asks for") as caught:
        read_weight_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl", pickle.dumps({"model": Calls(os.system, "touch " + str(tmp_path / "pwned"))}))
    with pytest.raises(UserError, match=r"asks for (posix|nt)\.system, but weights need only arrays"):
        read_weight_file(path)
    assert not (tmp_path / "pwned").exists()


HAND_WRITTEN = {
    "stored elsewhere": persistent(None),
    "import by INST": b"(S'true'\nios\nsystem\n.",
    "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    "state of the reader": b"\x80\x02cnumpy\ndtype\nN}X\x0b\x00\x00\x00__globals__K\x01s\x86b.",
    "attribute of the reader": b"\x80\x02c_codecs\nencode\n}X\x08\x00\x00\x00__call__K\x01sb.",
    "another codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    "registered extension": b"\x80\x02\x82\x01.",
    "array of a set": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nc__builtin__\nset\nK\x00\x85C\x01b\x87R.",
    "huge array": b"\x80\x03}X\x01\x00\x00\x00wcnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f4"
    b"K\x00K\x01\x87RC\x04abcd\x86Rsb.",
    "no end": b"\x80\x04}",
    "nothing on the stack": b"\x80\x04b.",
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_pickles_are_refused(tmp_path: Path, name: str) -> None:
    before = set(sys.modules)
    with pytest.raises(UserError):
        read_weight_file(write(tmp_path / "a.pkl", HAND_WRITTEN[name]))
    assert not {module for module in set(sys.modules) - before if not module.startswith("maskformer")}
    # The reader itself is unharmed.
    path = write(tmp_path / "b.pkl", pickle.dumps({"model": ARRAYS}, 2))
    assert list(read_weight_file(path).tensors) == list(ARRAYS)


def claim(shape: tuple[Any, ...], raw: bytes) -> bytes:
    """A pickle of an array that claims a shape which its bytes do not have."""
    true = np.zeros(4, dtype=np.float32)
    reconstruct, arguments, state = true.__reduce__()

    class Liar:
        def __reduce__(self) -> tuple[Any, ...]:
            return reconstruct, arguments, (state[0], shape, state[2], state[3], raw)

    return pickle.dumps({"model": {"w": Liar()}}, 2)


@pytest.mark.parametrize("shape", [(5,), (3,), (2**40, 2**40), (-1, -4), (4.0,), ("4",), (0, 10), (True, 4)], ids=str)
def test_arrays_whose_bytes_do_not_fit_are_refused(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    with pytest.raises(UserError, match="damaged at w"):
        read_weight_file(write(tmp_path / "a.pkl", claim(shape, bytes(16))))


def test_deeply_nested_and_cyclic_containers_do_no_harm(tmp_path: Path) -> None:
    cycle: dict[str, Any] = {"model": {"w": harmless()}}
    cycle["itself"] = cycle
    assert list(read_weight_file(write(tmp_path / "a.pkl", pickle.dumps(cycle))).tensors) == ["w"]
    deep = b"\x80\x02}(X\x05\x00\x00\x00model}X\x01\x00\x00\x00x" + b"]" * 200_000 + b"a" * 199_999 + b"su."
    with pytest.raises(UserError):
        read_weight_file(write(tmp_path / "b.pkl", deep))

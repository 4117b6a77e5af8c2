"""Reading pickles that hold numpy arrays and plain containers, and nothing else.

A pickle is a program, and the standard reader runs it. This reader answers only the few names that numpy arrays need,
and answers them with inert stand-ins: neither numpy nor any other library sees a byte of the file before its type,
shape and length have been checked here.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

_PLAIN_TYPE = re.compile(r"[<>=|]?[biuf](1|2|4|8)")
_TEXT_TYPE = re.compile(r"[US][1-9]\d{0,5}|O[48]?")
_UNREAD_TYPE = re.compile(r"[US]0|c(8|16|32)|f16|[mM]8")
_UNREAD_NAMES = ("range", "xrange", "complex", "bytearray", "slice")


class RefusedError(Exception):
    """The pickle asks for something that data does not need; the message says what, as a noun."""


class CodeRefusedError(RefusedError):
    """The pickle asks for something that the standard reader would run, or tries to change this one."""


class Unread:
    """A harmless value of a type that nobody needs; what the file says of it is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class InertArray:
    """A numpy array as the file describes it: not yet checked, not yet built."""

    __slots__ = ("dtype", "fortran", "raw", "shape")

    def __init__(self, shape: Any = (0,), dtype: Any = None, raw: Any = b"", fortran: Any = False) -> None:
        self.shape, self.dtype, self.raw, self.fortran = shape, dtype, raw, fortran

    def __setstate__(self, state: Any) -> None:
        _version, self.shape, self.dtype, self.fortran, self.raw = state

    def to_numpy(self) -> np.ndarray:
        """Returns the array; its memory may be read-only.

        Raises:
            RefusedError: it has no type.
            ValueError: shape, type and number of bytes do not belong together.
        """
        if not isinstance(self.dtype, _Dtype):
            raise RefusedError("an array without a number type")
        dtype = self.dtype.to_numpy()
        shape = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"an array of shape {shape!r}")
        # Python 2 wrote bytes as text: read as latin1, each character is one byte.
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw
        if not isinstance(raw, (bytes, bytearray)) or len(raw) != prod(shape) * dtype.itemsize:
            raise ValueError(f"an array of shape {shape} whose bytes are too few or too many")
        array = np.frombuffer(raw, dtype).reshape(shape, order="F" if self.fortran else "C")
        return array.astype(dtype.newbyteorder("="), copy=False)

    def to_list(self) -> list[Any]:
        """Returns the elements of an array of one axis, also one of text or of objects.

        Raises:
            RefusedError, ValueError: as `to_numpy`; or there are several axes.
        """
        if not isinstance(self.shape, tuple) or len(self.shape) != 1:
            raise ValueError(f"an array of shape {self.shape!r} where a list is needed")
        if isinstance(self.raw, list):  # of objects, each of which this reader has made
            return list(self.raw)
        values: list[Any] = self.to_numpy().tolist()
        return values


class _Inert:
    """An object the pickle can name and call, but not change."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise CodeRefusedError("a change of the reader's own objects")


class _Dtype:
    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, ""

    def __setstate__(self, state: Any) -> None:
        _version, order, *structure = state
        if any(part is not None for part in structure[:3]):
            raise RefusedError("an array of records")
        self.order = order if order in ("<", ">") else ""

    def to_numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code.lstrip("<>=|") if self.order else self.code)


class _Ndarray(_Inert):
    __slots__ = ()


class _MakeDtype(_Inert):
    __slots__ = ("types",)

    def __init__(self, *types: re.Pattern[str]) -> None:
        self.types = types

    def __call__(self, code: Any, _align: Any = False, _copy: Any = True) -> _Dtype:
        if not isinstance(code, str) or not any(pattern.fullmatch(code) for pattern in self.types):
            raise RefusedError(f"an array of type {code!r}, which is not a number type")
        return _Dtype(code)


class _Reconstruct(_Inert):
    __slots__ = ()

    def __call__(self, kind: Any, _shape: Any, _code: Any) -> InertArray:
        if not isinstance(kind, _Ndarray):
            raise RefusedError("a numpy array of a class other than ndarray")
        return InertArray()


class _Scalar(_Inert):
    __slots__ = ()

    def __call__(self, dtype: Any, raw: Any) -> InertArray:
        return InertArray((), dtype, raw)


class _FromBuffer(_Inert):
    __slots__ = ()

    def __call__(self, raw: Any, dtype: Any, shape: Any, order: Any) -> InertArray:
        return InertArray(shape, dtype, raw, order == "F")


class _Encode(_Inert):
    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise RefusedError(f"text encoded as {encoding!r}")
        return text.encode("latin1")


class _NoBytes(_Inert):
    """How protocols before 3 write the bytes of an empty array."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


class _MakeUnread(_Inert):
    __slots__ = ()

    def __call__(self, *_: Any) -> Unread:
        return Unread()


_ANSWERS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Ndarray(),
    ("numpy", "dtype"): _MakeDtype(_PLAIN_TYPE),
    ("_codecs", "encode"): _Encode(),
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):
    _ANSWERS[_core + ".multiarray", "_reconstruct"] = _Reconstruct()
    _ANSWERS[_core + ".multiarray", "scalar"] = _Scalar()
    _ANSWERS[_core + ".numeric", "_frombuffer"] = _FromBuffer()
for _builtins in ("builtins", "__builtin__"):
    _ANSWERS[_builtins, "bytes"] = _NoBytes()
    _ANSWERS[_builtins, "set"] = set
    _ANSWERS[_builtins, "frozenset"] = frozenset


_TEXT_ANSWERS = _ANSWERS | {("numpy", "dtype"): _MakeDtype(_PLAIN_TYPE, _TEXT_TYPE, _UNREAD_TYPE)}
_TEXT_ANSWERS |= {(module, name): _MakeUnread() for module in ("builtins", "__builtin__") for name in _UNREAD_NAMES}


class _RestrictedUnpickler(pickle.Unpickler):
    answers = _ANSWERS

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.answers[module, name]
        except KeyError:
            raise CodeRefusedError(f"{module}.{name}") from None

    def persistent_load(self, identity: Any) -> Any:
        raise RefusedError("an object stored outside of it")


class _TextUnpickler(_RestrictedUnpickler):
    answers = _TEXT_ANSWERS


def load_pickle(path: Path, *, texts: bool = False) -> Any:
    """Reads one pickle of plain containers and arrays of numbers.

    Args:
        path: the file.
        texts: read also arrays of text and of objects; what is in them is read by the same rules. Ranges and the like
            are then `Unread`.

    Returns:
        The object; its arrays and numpy's scalars are `InertArray`, to be built with `InertArray.to_numpy` or
        `InertArray.to_list`.

    Raises:
        RefusedError: the pickle asks for anything else; a `CodeRefusedError` if for what could be code.
        Exception: any of the many that a damaged pickle can raise.
    """
    with path.open("rb") as file:
        return (_TextUnpickler if texts else _RestrictedUnpickler)(file, encoding="latin1").load()


def dump_pickle(content: Any) -> bytes:
    """Pickles arrays and plain containers so that every numpy since 1.x reads them.

    numpy 2 names its array constructor by a module that numpy 1 lacks, while the old name works in both. Protocol 3
    spells it once, as text, before the first array; later arrays refer back to it.
    """
    data = pickle.dumps(content, protocol=3)
    return data.replace(b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\n_reconstruct\n", 1)

"""Weight files: safe reading, whatever their format, and atomic writing.

Formats are told apart by content, not by extension: pickles of numpy arrays (read by `pickles`), PyTorch files (read
with ``weights_only=True``) and safetensors. Nothing in a file is ever executed.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maskformer.errors import UserError
from maskformer.pickles import InertArray, RefusedError, load_pickle
from maskformer.writing import atomic_write as atomic_write
from maskformer.writing import write_text as write_text

_ZIP = b"PK\x03\x04"
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_FIRST_BYTES_OF_TEXT_PICKLES = (b"(", b"}", b"c")
_WANTED_GLOBAL = re.compile(r"GLOBAL (\w[\w.]*\.\w+)")
_STATE_KEYS = ("model", "state_dict")
_ABOUT = ("__author__", "matching_heuristics")


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds.

    Attributes:
        path: the file or folder on this machine, or the address of weights that are no file.
        tensors: its tensors on the CPU, under the names the file uses; they may be mapped from disk, read only.
        matching_heuristics: Detectron2's flag: names may lack their beginning (see `layouts.match_by_suffix`).
    """

    path: Path | str
    tensors: dict[str, Tensor]
    matching_heuristics: bool = False


def read_weight_file(path: Path) -> WeightFile:
    """Reads the tensors of a ``.pkl``, ``.pth`` or ``.safetensors`` file.

    Raises:
        UserError: the file is damaged, is no weight file, or holds more than numbers.
    """
    kind = recognise(path)
    if kind == "safetensors":
        content: Any = _read_safetensors(path)
    elif kind == "pickle":
        content = _read_pickle(path)
    else:
        content = read_torch_file(path, mapped=kind == "torch")
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__} instead of named tensors: it is no weight file")
    state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    tensors = {_name(name, path): _tensor(value, name, path) for name, value in state.items() if name not in _ABOUT}
    if not tensors:
        raise UserError(f"{path} holds no tensors: name a file with weights")
    return WeightFile(path, _without_prefix(tensors, "module."), bool(content.get("matching_heuristics", False)))


def recognise(path: Path) -> str:
    """Tells the format of a file by its first bytes.

    Returns:
        ``"torch"``, ``"torch legacy"``, ``"pickle"`` or ``"safetensors"``.

    Raises:
        UserError: the file cannot be opened or is none of these.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): correct the path of the weights") from error
    if not start:
        raise UserError(f"{path} is empty: download or copy it again")
    if start.startswith(_ZIP):
        return "torch"
    if start.startswith(_LEGACY_TORCH):
        return "torch legacy"
    if len(start) > 8 and start[8:9] == b"{" and 2 <= struct.unpack("<Q", start[:8])[0] <= size - 8:
        return "safetensors"
    if start[:1] == b"\x80" or start.startswith(_FIRST_BYTES_OF_TEXT_PICKLES):
        return "pickle"
    raise UserError(f"{path} is {_what_else(start)}")


def _what_else(start: bytes) -> str:
    text = start.lstrip().lower()
    if text.startswith(b"<"):
        return "a web page, saved in the place of weights: download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "only a pointer to weights kept in Git LFS: fetch them with `git lfs pull`"
    return "damaged or no weight file (.pkl, .pth and .safetensors are read): download or copy it again"


def _read_pickle(path: Path) -> Any:
    try:
        return load_pickle(path)
    except RefusedError as refusal:
        raise UserError(
            f"{path} asks for {_first_line(refusal)}, but weights need only arrays of numbers and plain containers: "
            f"do not trust this file, or have its source save numpy arrays or safetensors"
        ) from refusal
    except Exception as error:  # a damaged pickle can raise almost anything, and all of it means the same
        raise UserError(f"{path} is damaged or cut short ({_first_line(error)}): download or copy it again") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or cut short ({_first_line(error)}): download or copy it again") from error


def read_torch_file(path: Path, *, mapped: bool = False) -> Any:
    """Reads a PyTorch file of tensors and plain containers onto the CPU.

    Args:
        path: the file.
        mapped: leave tensors on disk until they are used; saves memory when only some are.

    Raises:
        UserError: damaged, or it needs more than tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        wanted = _WANTED_GLOBAL.search(str(error))
        if wanted is None:
            raise UserError(
                f"{path} is damaged or holds more than tensors ({_first_line(error)}): "
                f"copy it again, or have its source save the state dict alone"
            ) from error
        raise UserError(
            f"{path} asks for {wanted[1]}, but weights need only tensors and plain containers: "
            f"do not trust this file, or have its source save the state dict alone"
        ) from error
    except Exception as error:  # a damaged file can raise almost anything, and all of it means the same
        raise UserError(f"{path} is damaged or cut short ({_first_line(error)}): download or copy it again") from error


def _name(name: Any, path: Path) -> str:
    """A name as it may stand in a message: what a file says must not reach a terminal unseen."""
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"{path} is damaged, it names a tensor {name!a:.60}: download or copy it again")
    return name


def _tensor(value: Any, name: str, path: Path) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, InertArray):
        raise UserError(
            f"{path}: the entry {name} is a {type(value).__name__} where weights have an array: "
            f"have its source save the state dict alone"
        )
    try:
        array = value.to_numpy()
        # A copy: arrays over the file's bytes are read-only, and PyTorch has no unsigned types beyond 8 bits to share.
        return torch.from_numpy(np.array(array))
    except (ValueError, TypeError, RefusedError) as error:
        raise UserError(f"{path} is damaged at {name} ({_first_line(error)}): download or copy it again") from error


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes what data-parallel training puts before every name."""
    if not all(name.startswith(prefix) for name in tensors):
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".:")[:200] if lines else type(error).__name__
    return text if text.isprintable() else ascii(text)

"""Checkpoints of a run: everything that is needed to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskformer.checkpoint.files import atomic_write, read_torch_file, recognise
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

FINAL_NAME = "model_final.pth"
LAST_NAME = "last_checkpoint"
_STATE_KEYS = ("model", "optimizer", "scheduler", "scaler", "iteration", "rng", "position")
KEYS = (*_STATE_KEYS, "config", "metadata", "versions", "extra")
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


def save_checkpoint(
    folder: str | Path,
    iteration: int,
    *,
    model: nn.Module | Mapping[str, Tensor],
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    rng: Sequence[Any] = (),
    position: int = 0,
    config_text: str = "",
    metadata: Any = None,
    versions: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    name: str | None = None,
    keep_last: int = 0,
    newest: bool = True,
) -> Path:
    """Writes one complete checkpoint, then names it in ``last_checkpoint``, then removes old ones.

    Args:
        folder: the run's ``OUTPUT_DIR``.
        iteration: number of the last finished step, from 0.
        model: the meta-architecture, or its state dict.
        optimizer: anything with ``state_dict()``, or such a dict, or None.
        scheduler: likewise.
        scaler: likewise.
        rng: states of the random generators, one per rank.
        position: of the training sampler.
        config_text: the whole config as YAML.
        metadata: of the training data set (names, things, colours, ignore label): a mapping or a dataclass.
        versions: of the libraries.
        extra: anything else of tensors, numbers, text and containers.
        name: of the file; None for ``model_%07d.pth``.
        keep_last: how many numbered files stay; 0 for all.
        newest: whether ``last_checkpoint`` names it; not for files that no run is resumed from.

    Returns:
        The file written.

    Raises:
        UserError: the folder cannot be written.
        TypeError: a state holds something other than tensors, numbers, text and containers.
    """
    states = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    content = {
        **{key: _state(state) for key, state in states.items()},
        "iteration": int(iteration),
        "rng": list(rng),
        "position": int(position),
        "config": config_text,
        "metadata": _fields(metadata),
        "versions": dict(versions or {}),
        "extra": dict(extra or {}),
    }
    path = Path(folder) / (name or f"model_{iteration:07d}.pth")
    _write(path, content, newest)
    _remove_old(path, keep_last)
    return path


def _write(path: Path, content: Mapping[str, Any], newest: bool) -> None:
    """The file; then, if it is the newest, its name in ``last_checkpoint``, which thus always names a complete file."""
    plain = {key: _plain(value, key) for key, value in content.items()}
    with atomic_write(path) as file:
        torch.save(plain, file)
    if not newest:
        return
    with atomic_write(path.with_name(LAST_NAME)) as file:
        file.write(path.name.encode())


def save_model(path: str | Path, *, model: nn.Module, metadata: Any = None, config_text: str = "") -> Path:
    """Writes weights with what their classes mean, and no state of a run: all that predicting needs.

    Args:
        path: of the file.
        model: the meta-architecture.
        metadata: of its classes: a mapping or a dataclass.
        config_text: the whole config as YAML.

    Returns:
        The file written.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path).expanduser()
    content = {"model": model.state_dict(), "metadata": _fields(metadata), "config": config_text}
    with atomic_write(path) as file:
        torch.save({key: _plain(value, key) for key, value in content.items()}, file)
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of `save_checkpoint` onto the CPU; nothing in it is executed.

    Returns:
        A dict with `KEYS`.

    Raises:
        UserError: missing, damaged, or only weights.
    """
    return _load(Path(path), mapped=False)


def find_last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, None if there is none.

    It is what ``last_checkpoint`` names. Where that is missing or names no readable file, the readable checkpoint of
    the highest iteration is taken, with a warning.

    Raises:
        UserError: there are checkpoints, but none can be read; starting anew would not be what was meant.
    """
    folder = Path(folder)
    pointer = folder / LAST_NAME
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    if named:
        path = folder / Path(named).name
        if _iteration(path) is not None:
            return path
    candidates = [
        path for path in folder.glob("model_*.pth") if _NUMBERED.fullmatch(path.name) or path.name == FINAL_NAME
    ]
    found = [(iteration, path) for path in candidates if (iteration := _iteration(path)) is not None]
    if not found and (candidates or named):
        raise UserError(f"{folder} has no checkpoint that can be read: restore one, or start anew without --resume")
    if not found:
        return None
    # At the same iteration the numbered file is as good as the final one; the name only decides the tie.
    newest = max(found, key=lambda pair: (pair[0], pair[1].name))[1]
    problem = f"names {named}, which cannot be read" if named else "is missing"
    logger.warning("%s %s; continuing from the newest readable checkpoint, %s", pointer, problem, newest.name)
    return newest


def restore_model(model: nn.Module, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Gives a model exactly the weights of a checkpoint.

    Raises:
        UserError: names or shapes differ: the config is not the one of the interrupted run.
    """
    saved, own = checkpoint["model"], model.state_dict()
    different = [name for name in own.keys() | saved.keys() if not _same_shape(own.get(name), saved.get(name))]
    if different:
        raise UserError(
            f"{path} was saved by another model ({len(different)} tensors differ, such as {min(different)}): resume "
            f"with the config of that run, or set MODEL.WEIGHTS to the file and start a new run in another OUTPUT_DIR"
        )
    model.load_state_dict(saved)


def _same_shape(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


def _load(path: Path, *, mapped: bool) -> dict[str, Any]:
    kind = recognise(path)
    content = read_torch_file(path, mapped=mapped) if kind == "torch" else None
    if not isinstance(content, dict) or not set(KEYS) <= content.keys():
        raise UserError(f"{path} holds weights but no state of a run: set MODEL.WEIGHTS to it instead of resuming")
    return content


def _iteration(path: Path) -> int | None:
    """The iteration of a checkpoint, read without its tensors; None if it is no complete checkpoint."""
    try:
        return int(_load(path, mapped=True)["iteration"])
    except UserError as error:
        logger.warning("%s", error)
        return None


def _state(source: Any) -> Any:
    return source.state_dict() if hasattr(source, "state_dict") else source


def _fields(metadata: Any) -> Any:
    if dataclasses.is_dataclass(metadata) and not isinstance(metadata, type):
        return {each.name: getattr(metadata, each.name) for each in dataclasses.fields(metadata)}
    return metadata


def _plain(value: Any, where: str) -> Any:
    """Only what ``weights_only`` reads back: numpy becomes torch or Python, paths become text, the rest is refused."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, np.generic):
        return value.item()
    for base in (str, int, float):  # such as torch.__version__, whose own class is not among what can be read
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Counter):
        return value
    if isinstance(value, Mapping):
        items = ((_plain(key, where), _plain(item, f"{where}.{key}")) for key, item in value.items())
        return OrderedDict(items) if isinstance(value, OrderedDict) else dict(items)
    if isinstance(value, (list, tuple)):
        items_of = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items_of) if isinstance(value, tuple) else items_of
    raise TypeError(f"a checkpoint cannot hold {where}, a {type(value).__name__}: convert it to plain containers")


def _remove_old(saved: Path, keep_last: int) -> None:
    """Keeps the newest numbered files, and drops what killed runs left half-written."""
    for leftover in saved.parent.glob(".model_*.pth.*.tmp"):
        leftover.unlink(missing_ok=True)
    if keep_last <= 0:
        return
    numbered = sorted(
        (int(match[1]), path) for path in saved.parent.iterdir() if (match := _NUMBERED.fullmatch(path.name))
    )
    for _, path in numbered[:-keep_last]:
        if path != saved:
            path.unlink(missing_ok=True)

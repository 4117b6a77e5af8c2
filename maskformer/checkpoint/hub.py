"""Models of the Hugging Face Hub: ``hf://owner/name[@revision]``, through its own client and its own cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

from maskformer.checkpoint.files import WeightFile, read_weight_file
from maskformer.errors import UserError

PREFIX = "hf://"
# In the order of preference; an index names the files that a large model is spread over.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def weights_in(folder: Path) -> Path | None:
    """The file of weights, or the index of several, in a folder of the Hub's layout; None if there is none."""
    return next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)


def read_folder(folder: Path) -> WeightFile:
    """Reads the weights of a folder that transformers saved.

    Raises:
        UserError: a file is missing, damaged or holds more than numbers.
    """
    path = weights_in(folder)
    if path is None:
        raise UserError(f"{folder} has none of {', '.join(WEIGHT_NAMES)}: name a weight file, or a folder with one")
    if path.suffix != ".json":
        return WeightFile(folder, read_weight_file(path).tensors)
    tensors = {}
    for name in shards(path):
        if not (folder / name).is_file():
            raise UserError(f"{path} names {name}, which is not there: download or copy the whole folder again")
        tensors.update(read_weight_file(folder / name).tensors)
    return WeightFile(folder, tensors)


def shards(index: Path) -> list[str]:
    """The files that an index names, in order.

    Raises:
        UserError: the index is damaged, or names files outside its folder.
    """
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged, it has no weight_map: download or copy it again") from error
    if not names:
        raise UserError(f"{index} has an empty weight_map: download or copy it again")
    for name in names:
        inside = isinstance(name, str) and name.isprintable() and name not in ("", "..") and Path(name).name == name
        if not inside:
            raise UserError(f"{index} names {name!a:.60}, which is no file of its folder: do not trust this folder")
    return names


def fetch(address: str) -> Path:
    """Brings a model of the Hub into the Hub's cache, unless it is there.

    Args:
        address: ``hf://owner/name`` or ``hf://owner/name@revision`` (branch, tag or commit).

    Returns:
        The folder with its ``config.json`` and weights.

    Raises:
        UserError: there is no such model, it has no weights, or it cannot be had now.
    """
    owner_and_name, revision = _parts(address)
    folder = _download(address, owner_and_name, revision, "config.json").parent
    revision = _commit_of(folder) or revision  # what is downloaded next shall be of the same state
    for name in WEIGHT_NAMES:
        try:
            path = _download(address, owner_and_name, revision, name)
        except _AbsentError:
            continue
        for shard in shards(path) if path.suffix == ".json" else ():
            _download(address, owner_and_name, revision, shard)
        return folder
    raise UserError(f"{address} has none of {', '.join(WEIGHT_NAMES)}: name a model with weights")


class _AbsentError(UserError):
    """The model is there, or may be, but this file of it is not to be had."""


def pinned(address: str) -> str:
    """The address with the commit that it means now, so that whoever reads it next gets the same model.

    Raises:
        UserError: see `fetch`.
    """
    commit = _commit_of(fetch(address))
    return f"{PREFIX}{_parts(address)[0]}@{commit}" if commit else address


def _parts(address: str) -> tuple[str, str | None]:
    """Owner and name, and the revision."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(
            f"{address} names no model of the Hugging Face Hub: write hf://owner/name or hf://owner/name@tag"
        )
    return match[1], match[2]


def _commit_of(folder: Path) -> str | None:
    """The Hub's cache has a folder for each commit."""
    return folder.name if _COMMIT.fullmatch(folder.name) else None


def _download(address: str, owner_and_name: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(owner_and_name, name, revision=revision))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise UserError(
            f"{address} is not on the Hugging Face Hub, or not for you: check it, or `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{address} is on the Hugging Face Hub without revision {revision!r}: name another") from error
    except errors.LocalEntryNotFoundError as error:
        raise _AbsentError(
            f"{address}: {name} is not in the Hub's cache and the Hub cannot be reached: download the model elsewhere "
            f"and set MODEL.WEIGHTS to its folder"
        ) from error
    except errors.EntryNotFoundError as error:
        raise _AbsentError(f"{address} has no {name}: name a model that transformers saved") from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{address} cannot be downloaded ({reason}): try again, or set MODEL.WEIGHTS to a folder with the model"
        ) from error
